"""Time and peak memory of dense features over sizes, each case in a process of its own, as JSON.

    python tools/measure_features.py --sizes 256,512,1024 --methods uplift --memory 300MB > features.json

Weights are random: neither depends on them. The backbone is one block of a ViT-S/16, so that the figures are about the
upsampling; ``seconds`` leaves the backbone out. The result goes to a .npy file (``use``: PCA, similarity and segments
of it after that).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def one(side: int, method: str, memory: str) -> dict:
    import timm
    import torch

    from uplift_core import PRESETS, UPLiFT, dense_features
    from uplift_core.backbones import Backbone
    from uplift_core.features import fit_pca, segments, similarity
    from uplift_core.measure import peak_memory

    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0, depth=1, dynamic_img_size=True)
    backbone = Backbone(vit, "vit_small_patch16_224")
    low = {}
    encode = backbone.encode

    def timed(image):
        begun = time.perf_counter()
        found = encode(image)
        low["seconds"] = time.perf_counter() - begun
        return found

    backbone.encode = timed
    model = UPLiFT(PRESETS["dinov3-splus16"]).eval().requires_grad_(False) if method == "uplift" else method
    image = torch.rand(3, side, side)
    cpu = torch.device("cpu")
    base = peak_memory(cpu)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        begun = time.perf_counter()
        found = dense_features(image, backbone=backbone, model=model, memory_budget=memory or None,
                               storage=Path(folder) / "f.npy")
        seconds = time.perf_counter() - begun - low["seconds"]
        made = peak_memory(cpu)
        begun = time.perf_counter()
        fit_pca(found).picture(found)
        similarity(found, [(3, 3)])
        segments(found, 5)
        return {"method": method, "side": side, "tokens": (side // 16) ** 2, "seconds": seconds,
                "backbone_seconds": low["seconds"], "use_seconds": time.perf_counter() - begun, "base": base,
                "peak": made, "peak_after_use": peak_memory(cpu), "file": side * side * 384 * 2}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--sizes", default="256,512,1024")
    words.add_argument("--methods", default="uplift")
    words.add_argument("--memory", default="")
    words.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.one:
        print(json.dumps(one(int(given.one[0]), given.one[1], given.memory)))
        return
    rows = []
    for side in given.sizes.split(","):
        for method in given.methods.split(","):
            command = [sys.executable, __file__, "--memory", given.memory, "--one", side, method]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps({"processor": platform.machine(), "threads": 1, "memory_budget": given.memory, "rows": rows},
                     indent=2))


if __name__ == "__main__":
    main()
