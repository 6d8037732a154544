"""Time and peak memory of enlarging features, by UPLiFT, by the baselines and by networks of others where the user has
them. The features are random numbers, so that no backbone is in the figures; weights are random too."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .baselines import BASELINES, Upsampler, Whole, baseline
from .benchmark import Measurement, in_own_process
from .cascade import UpliftWindows
from .config import PRESETS
from .dense import DenseFeatures, enlarge, into, load_features
from .devices import choose_device
from .errors import InputError
from .feature_files import FeatureFile
from .features import fit_pca, segments, similarity
from .measure import peak_memory, start_peak
from .memory import parse_bytes
from .model import UPLiFT
from .peers import PEERS, Features, folder_of, installed, load_peer

METHODS = ("uplift", *BASELINES)


@dataclass
class FeatureMeasurement(Measurement):
    """``use_seconds``, ``use_peak``: a PCA picture, the likeness to a point and five segments of the result, after it
    and without what made it (0 where they were not asked for)."""

    use_seconds: float = 0.0
    use_peak: int = 0


def measure(method: str, image: int, *, channels: int = 384, patch: int = 16, tile: str | int | None = "auto",
            memory: str | None = None, threads: int = 0, device: str = "auto", stored: bool = False, use: bool = False
            ) -> FeatureMeasurement:
    """Enlarge ``channels`` features of every ``patch`` x ``patch`` pixels of a square picture to one for every pixel,
    in this process. UPLiFT and the interpolations go window by window into a float32 tensor (``stored``: a float16
    file), networks of others give the whole."""
    if threads:
        torch.set_num_threads(threads)
    where = choose_device(device)
    torch.manual_seed(0)
    grid = image // patch
    picture = torch.rand(1, 3, grid * patch, grid * patch)
    low = torch.randn(1, channels, grid, grid, device=where)
    net: Any = None
    if method == "uplift":
        config = replace(PRESETS["dinov3-splus16"], channels=channels, patch=patch)
        net = UPLiFT(config).eval().requires_grad_(False).to(where)
    elif method in PEERS:
        net = load_peer(method, Features(channels, patch), weights=False).to(where)
    base = peak_memory(where)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        upsampler: Upsampler = (UpliftWindows(net, picture, low, patch) if method == "uplift" else
                                baseline(method, picture, low, patch, patch=patch, network=net))
        found = DenseFeatures(None, upsampler.size, 1.0, method)
        shape = (channels, *upsampler.size)
        budget = parse_bytes(memory)
        if isinstance(upsampler, Whole):
            found.data = upsampler.result[0]
        elif stored:
            with FeatureFile(Path(folder) / "features.npy", shape, torch.float16, False) as file:
                enlarge(upsampler, upsampler.size, file.write, tile=tile, budget=budget)
                file.finish(found.metadata())
            found = load_features(Path(folder) / "features.npy")
        else:
            found.data = torch.empty(shape)
            enlarge(upsampler, upsampler.size, into(found.data), tile=tile, budget=budget)
        if where.type != "cpu":
            getattr(torch, where.type).synchronize()
        row = FeatureMeasurement(f"{channels} features", method, image, _steps(patch), grid * grid,
                                 time.perf_counter() - begun, peak_memory(where), base)
        del upsampler, net, picture, low
        if use:
            start_peak(where)
            begun = time.perf_counter()
            fit_pca(found).picture(found)
            similarity(found, [(3, 3)])
            segments(found, 5)
            row = replace(row, use_seconds=time.perf_counter() - begun, use_peak=peak_memory(where))
        del found  # before its file goes
    return row


def _steps(patch: int) -> int:
    return (patch - 1).bit_length()


def available() -> list[str]:
    """The methods that can be measured on this machine."""
    return [m for m in METHODS if m not in PEERS or m in installed()]


def compare(methods: list[str], sizes: list[int], *, rounds: int = 1, patch: int = 16, **options: Any
            ) -> list[FeatureMeasurement]:
    """All methods at all sizes, each in a process of its own, in turns; medians over the rounds.

    Raises InputError for unknown methods and sizes, UpliftError for networks of others that are not here."""
    for method in methods:
        if method not in METHODS:
            raise InputError(f"unknown method {method}; choose of {', '.join(METHODS)}")
        if method in PEERS:
            folder_of(method)
    if small := [image for image in sizes if image < patch]:
        raise InputError(f"a picture of {small[0]} pixels is smaller than a patch of {patch}")
    rows = []
    for image in sizes:
        taken: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for _ in range(rounds):
            for method in methods:
                request = json.dumps({"method": method, "image": image, "patch": patch, **options})
                command = [sys.executable, "-m", "uplift_core.feature_benchmark", request]
                taken[method].append(in_own_process(method, image, command))
        for results in taken.values():
            middle = {name: type(results[0][name])(statistics.median(r[name] for r in results))
                      for name in ("seconds", "peak", "base", "use_seconds", "use_peak")}
            rows.append(replace(FeatureMeasurement(**results[0]), **middle,
                                all_seconds=[r["seconds"] for r in results]))
    return rows


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(**json.loads(sys.argv[1])))) + "\n")
