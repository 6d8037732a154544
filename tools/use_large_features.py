"""Time and memory of what is done with features in a file that is larger than memory need be:

    taskset -c 1 python tools/use_large_features.py --side 4096

The features are made up (blocks of random vectors and some noise of their own), in a file of half precision that is
gone afterwards; the folder is that of TMPDIR.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from uplift_core import DenseFeatures, load_features
from uplift_core.feature_files import FeatureFile
from uplift_core.features import fit_pca, segments, similarity
from uplift_core.measure import AnonymousPeak, peak_memory, start_peak

USES: dict[str, Callable[[DenseFeatures], object]] = {
    "PCA picture": lambda found: fit_pca(found).picture(found),
    "likeness to a point": lambda found: similarity(found, [(3, 3)]),
    "five segments": lambda found: segments(found, 5, clean=1),
}


def make(path: Path, channels: int, side: int) -> DenseFeatures:
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(channels, side // 16 + 1, side // 16 + 1, generator=generator)
    noise = 0.1 * torch.randn(channels, 16, side, generator=generator)
    found = DenseFeatures(None, (side, side), 1.0, "made up")
    with FeatureFile(path, (channels, side, side), torch.float16, False) as file:
        for lo in range(0, side, 16):
            rows = grid[:, lo // 16].repeat_interleave(16, 1)[:, None, :side] + noise
            file.write(slice(lo, min(side, lo + 16)), slice(0, side), rows[:, :side - lo])
        file.finish(found.metadata())
    return load_features(path)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--side", type=int, default=4096)
    options.add_argument("--channels", type=int, default=384)
    options.add_argument("--threads", type=int, default=1)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        found = make(Path(folder) / "f.npy", asked.channels, asked.side)
        size = (Path(folder) / "f.npy").stat().st_size
        print(f"{'x'.join(map(str, found.shape))}, {size / 1e9:.1f} GB, written in {time.perf_counter() - begun:.0f} s")
        for name, use in USES.items():
            start_peak(cpu)
            begun, processor = time.perf_counter(), time.process_time()
            with AnonymousPeak() as peak:
                use(found)
            print(f"{name}: {time.perf_counter() - begun:.0f} s ({time.process_time() - processor:.0f} s of the "
                  f"processor), {peak.grown / 2**20:.0f} MB more of its own, peak {peak_memory(cpu) / 2**20:.0f} MB "
                  "in all", flush=True)
        del found


if __name__ == "__main__":
    main()
