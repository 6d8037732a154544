"""Published weights fetched by the loader, from a hub on this machine's loopback, in a real ComfyUI."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from hosts.comfyui.comfy_host import ComfyHost, graph
from hub_standin import HubStandIn
from rule_weights import published_shapes, rule_state
from uplift_core.registry import KNOWN

pytestmark = pytest.mark.slow

KNOWN_MODEL = KNOWN["dinov2-s14"]


def test_loader_downloads_once_into_its_folder(base, comfy_home, tmp_path):
    content = save(rule_state(published_shapes("dinov2-s14")))
    torch.save(torch.rand(1, 32, 32, 3), tmp_path / "image.pt")
    run = graph(model=("UPLiFTModelLoader", {"model_name": f"{KNOWN_MODEL.filename} (download)", "dtype": "fp32"}),
                image=("ProbeImage", {"path": str(tmp_path / "image.pt")}),
                features=("UPLiFTDenseFeatures", {"image": ("image", 0), "backbone": "vit_tiny_patch16_224.safetensors",
                                                  "resolution": 0, "scale": "1x", "tile": "auto",
                                                  "model": ("model", 0)}),
                pca=("ProbeSave", {"value": ("features", 1), "name": "pca"}))
    with HubStandIn.serving({f"{KNOWN_MODEL.repo}/{KNOWN_MODEL.filename}": content}) as hub:
        host = ComfyHost(base, comfy_home, environment={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
                                                        "HF_HOME": str(tmp_path / "hf")})
        try:
            _, events = host.run(run)
            progress = [event["data"]["value"] for event in events if event["type"] == "progress"
                        and event["data"]["node"] == "model"]
            assert progress and progress == sorted(progress) and progress[-1] == 500
            file = base / "models/uplift" / KNOWN_MODEL.filename
            assert file.read_bytes() == content and not list(file.parent.glob("*.incomplete"))
            run["model"]["inputs"]["dtype"] = "auto"  # loaded again, from the file
            host.run(run)
            assert hub.bodies == 1
        finally:
            host.close()
            (base / "models/uplift" / KNOWN_MODEL.filename).unlink(missing_ok=True)
