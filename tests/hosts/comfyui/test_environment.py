"""The pack in Python environments and with settings that users have: packages missing or broken, half precision,
weights fetched by the loader. Each ComfyUI here serves two tests, since its start takes longer than they do.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from hosts.comfyui.comfy_host import ComfyHost, graph
from hosts.comfyui.workflow import WORKFLOWS, to_api
from hub_standin import HubStandIn
from rule_weights import published_shapes, rule_state
from uplift_core import load, load_vae, upscale_image
from uplift_core.assets import asset
from uplift_core.registry import KNOWN

pytestmark = pytest.mark.slow

OPTIONAL = ("accelerate", "diffusers", "gradio", "matplotlib", "rich", "skimage", "timm", "typer")
HIDE = """
import importlib.machinery, sys
class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in {names!r} else importlib.machinery.PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hidden
"""


PUBLISHED = KNOWN["dinov2-s14"]


@contextmanager
def host_with(base, comfy_home, **environment):
    host = ComfyHost(base, comfy_home, environment=environment)
    try:
        yield host
    finally:
        host.close()


@pytest.fixture(scope="module")
def hub():
    """A hub on this machine's loopback with one published file."""
    content = save(rule_state(published_shapes("dinov2-s14")))
    with HubStandIn.serving({f"{PUBLISHED.repo}/{PUBLISHED.filename}": content}) as running:
        running.content = content
        yield running


@pytest.fixture(scope="module")
def fresh(base, comfy_home, tmp_path_factory, hub):
    """None of the optional packages is there."""
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "sitecustomize.py").write_text(HIDE.format(names=OPTIONAL))
    with host_with(base, comfy_home, PYTHONPATH=os.fspath(folder), HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0",
                   HF_HOME=str(folder / "hf")) as host:
        yield host


@pytest.fixture(scope="module")
def broken(base, comfy_home, tmp_path_factory):
    """timm cannot be imported; half precision is wanted, as on most graphics cards and never on a CPU."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "timm").mkdir()
    (folder / "timm" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with host_with(base, comfy_home, PYTHONPATH=os.fspath(folder), PROBE_FP16="1") as host:
        yield host


def nodes_of(host):
    return {name for name in host.get("/object_info") if name.startswith("UPLiFT")}


def lines_about(host, word):
    return [line for line in host.log().splitlines() if word in line]


def test_a_fresh_environment_upscales_the_photo(fresh, base):
    """One node is left out with one line, the first workflow runs."""
    host = fresh
    there = nodes_of(host)
    assert {"UPLiFTLatentUpscale", "UPLiFTFeatureMask"} < there and "UPLiFTDenseFeatures" not in there
    (line,) = lines_about(host, "timm")
    assert "UPLiFTDenseFeatures" in line and "pip install timm" in line
    path = next(path for path in WORKFLOWS if path.stem.startswith("UPLiFT 5 "))
    outputs, _ = host.run(to_api(path, host.get("/object_info")))
    (name,) = [image["filename"] for output in outputs.values() for image in output.get("images", ())
               if image["type"] == "output"]
    made = np.asarray(Image.open(base / "output" / name).convert("RGB"))
    photo = Image.open(asset("samples/chelsea.png")).convert("RGB")
    assert made.shape == (2 * photo.height, 2 * photo.width, 3)
    shrunk = np.asarray(Image.fromarray(made).resize(photo.size, Image.Resampling.BOX))
    assert np.abs(shrunk.astype(int) - np.asarray(photo)).mean() < 3


def test_loader_downloads_once_into_its_folder(fresh, hub, base):
    run = graph(model=("UPLiFTModelLoader", {"model_name": f"{PUBLISHED.filename} (download)", "dtype": "fp32"}),
                take=("ProbeTake", {"value": ("model", 0)}))
    file = base / "models/uplift" / PUBLISHED.filename
    try:
        _, events = fresh.run(run)
        progress = [event["data"]["value"] for event in events if event["type"] == "progress"
                    and event["data"]["node"] == "model"]
        assert progress and progress == sorted(progress) and progress[-1] == 500
        assert file.read_bytes() == hub.content and not list(file.parent.glob("*.incomplete"))
        run["model"]["inputs"]["dtype"] = "auto"  # loaded again, from the file
        fresh.run(run)
        assert hub.bodies == 1
    finally:
        file.unlink(missing_ok=True)


def test_a_broken_package_takes_its_node_alone_and_is_called_broken(broken):
    host = broken
    there = nodes_of(host)
    assert {"UPLiFTLatentUpscale", "UPLiFTFeatureMask"} < there and "UPLiFTDenseFeatures" not in there
    (line,) = lines_about(host, "timm")
    assert "UPLiFTDenseFeatures" in line and "torchvision::nms does not exist" in line
    assert "cannot be imported" in line


def test_half_precision_where_the_host_wants_it_and_weights_freed_between_runs(broken, tmp_path, base):
    picture = torch.rand(1, 64, 80, 3, generator=torch.Generator().manual_seed(1))
    torch.save(picture, tmp_path / "picture.pt")
    host = broken

    def run(name, seed=5):
        host.run(graph(
            model=("UPLiFTModelLoader", {"model_name": "uplift-mini (bundled)", "dtype": "auto"}),
            vae=("UPLiFTTinyVAE", {}), image=("ProbeImage", {"path": str(tmp_path / "picture.pt")}),
            up=("UPLiFTImageUpscale", {"model": ("model", 0), "vae": ("vae", 0), "image": ("image", 0), "scale": "2x",
                                       "seed": seed, "noise_strength": 1.0, "tile": "auto", "color_fix": "mean",
                                       "consistency": True}),
            out=("ProbeSave", {"value": ("up", 0), "name": name})))
        return torch.load(base / "output" / f"{name}.pt")

    first = run("first")
    exact = upscale_image(load("uplift-mini", device="cpu"), load_vae("tiny"), picture.movedim(-1, 1), scale=2, seed=5,
                          consistency=True).movedim(1, -1)
    assert torch.isfinite(first).all() and first.shape == (1, 128, 160, 3)
    assert 1e-5 < (first - exact).abs().max() < 0.05  # half precision, and no worse than that
    run("between", seed=6)  # so that the last run is not the first one's, kept
    host.post("/free", {"unload_models": True, "free_memory": True})
    assert torch.equal(run("again"), first)
