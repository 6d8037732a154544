"""Every workflow that comes along, run in a real ComfyUI; what its nodes made against the core called directly."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from hosts.comfyui.comfy_host import HERE, ROOT
from hosts.comfyui.workflow import NOTES, WORKFLOWS, to_api
from uplift_core import load, load_vae, match_color, upscale_image, upscale_latents
from uplift_core.assets import asset

pytestmark = pytest.mark.slow

SMALL = {"ckpt_name": "random_sd15.ckpt", "model_name": "small.safetensors", "image": "small.png", "width": 64,
         "height": 64, "steps": 2}
"""In place of the weights and sizes of the workflows: random weights, small pictures."""


def workflow(number):
    return next(path for path in WORKFLOWS if path.stem.startswith(f"UPLiFT {number} "))


def taken(graph, kind):
    """The number of the only node of a class, and its inputs."""
    (found,) = [(number, node["inputs"]) for number, node in graph.items() if node["class_type"] == kind]
    return found


def run(comfy, base, path, taps, **changes):
    """Runs a workflow, and reads what came out of the sockets in ``taps``: name -> link."""
    graph = to_api(path, comfy.get("/object_info"), **changes)
    links = taps(graph)
    for name, link in links.items():
        graph[f"tap_{name}"] = {"class_type": "ProbeSave", "inputs": {"value": list(link), "name": f"tap_{name}"}}
    outputs, _ = comfy.run(graph)
    return outputs, {name: torch.load(base / "output" / f"tap_{name}.pt") for name in links}


def close(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.std()))


@pytest.fixture(scope="module")
def small(base):
    return load(base / "models/uplift/small.safetensors", device="cpu")


def test_text_to_image(comfy, base, small):
    def taps(graph):
        up, inputs = taken(graph, "UPLiFTLatentUpscale")
        matched, colors = taken(graph, "UPLiFTColorMatch")
        return {"latent": inputs["samples"], "larger": (up, 0), "guide": (up, 1), "decoded": colors["image"],
                "matched": (matched, 0)}

    outputs, got = run(comfy, base, workflow(1), taps, **SMALL)
    latent, guide = got["latent"]["samples"], got["guide"].movedim(-1, 1)
    assert latent.shape == (1, 4, 8, 8) and got["matched"].shape == (1, 128, 128, 3)
    close(got["larger"]["samples"], upscale_latents(small, latent, guide, scale=2, seed=0))
    close(got["matched"].movedim(-1, 1), match_color(got["decoded"].movedim(-1, 1), guide, "mean").clamp(0, 1))
    assert any("images" in output for output in outputs.values())


def test_hires_fix(comfy, base, small):
    def taps(graph):
        up, inputs = taken(graph, "UPLiFTLatentUpscale")
        (second,) = [number for number, node in graph.items() if node["class_type"] == "KSampler"
                     and node["inputs"]["latent_image"] == [up, 0]]
        assert 0.2 <= graph[second]["inputs"]["denoise"] <= 0.35
        return {"latent": inputs["samples"], "larger": (up, 0), "guide": (up, 1), "second": (second, 0)}

    _, got = run(comfy, base, workflow(2), taps, **SMALL)
    close(got["larger"]["samples"], upscale_latents(small, got["latent"]["samples"], got["guide"].movedim(-1, 1),
                                                    scale=2, seed=0))
    assert got["second"]["samples"].shape == (1, 4, 16, 16)
    assert not torch.equal(got["second"]["samples"], got["larger"]["samples"])


def test_photo(comfy, base):
    def taps(graph):
        up, inputs = taken(graph, "UPLiFTImageUpscale")
        return {"image": inputs["image"], "large": (up, 0)}

    _, got = run(comfy, base, workflow(3), taps, **SMALL)
    assert got["large"].shape == (1, 192, 256, 3)
    # Pinned to the pixels that were given, whatever random weights make of it in between.
    shrunk = torch.nn.functional.interpolate(got["large"].movedim(-1, 1), size=(48, 64), mode="bilinear",
                                             antialias=True)
    assert (shrunk - got["image"].movedim(-1, 1)).abs().mean() < 0.05


def test_side_by_side(comfy, base, small):
    def taps(graph):
        up, inputs = taken(graph, "UPLiFTLatentUpscale")
        both, _ = taken(graph, "ImageStitch")
        return {"latent": inputs["samples"], "image": inputs["image"], "larger": (up, 0), "both": (both, 0)}

    _, got = run(comfy, base, workflow(4), taps, **SMALL)
    close(got["larger"]["samples"], upscale_latents(small, got["latent"]["samples"], got["image"].movedim(-1, 1),
                                                    scale=2, seed=0))
    assert got["both"].shape[1:3] == (96, 2 * 128 + 8)


def test_offline_photo_as_it_stands(comfy, base):
    graph = to_api(workflow(5), comfy.get("/object_info"))
    outputs, _ = comfy.run(graph)
    (image,) = [entry for output in outputs.values() for entry in output.get("images", [])]
    saved = np.asarray(Image.open(base / "output" / image["filename"]))
    picture = Image.open(asset("samples/chelsea.png"))
    expected = upscale_image(load("uplift-mini", device="cpu"), load_vae("tiny", device="cpu"), picture, scale=2,
                             seed=0, consistency=True)
    assert saved.shape == (picture.height * 2, picture.width * 2, 3)
    assert np.abs(saved.astype(int) - np.asarray(expected)).max() <= 1


FEATURES = {**SMALL, "model_name": "vit_tiny.safetensors", "backbone": "vit_tiny_patch16_224.safetensors",
            "resolution": 64}


def with_model(graph):
    """The workflows name a published backbone, which knows its UPLiFT; the one of the tests has to be told."""
    graph["model"] = {"class_type": "UPLiFTModelLoader", "inputs": {"model_name": "vit_tiny.safetensors",
                                                                   "dtype": "auto"}}
    for node in graph.values():
        if node["class_type"] == "UPLiFTDenseFeatures":
            node["inputs"]["model"] = ["model", 0]
    return graph


def test_click_to_inpaint(comfy, base):
    def taps(graph):
        with_model(graph)
        mask, _ = taken(graph, "UPLiFTFeatureMask")
        sampler, inputs = taken(graph, "KSampler")
        return {"mask": (mask, 0), "before": inputs["latent_image"], "after": (sampler, 0)}

    click = {"points": json.dumps([{"x": 20, "y": 20}]), "threshold": 0.97, "softness": 0.0, "expand": 0}
    _, got = run(comfy, base, workflow(6), taps, **{**FEATURES, **click})
    mask, before, after = got["mask"], got["before"]["samples"], got["after"]["samples"]
    assert mask.shape == (1, 48, 64) and 0 < mask.mean() < 1
    change = (after - before).abs().amax(1)[0]
    grown = torch.nn.functional.adaptive_max_pool2d(got["before"]["noise_mask"].reshape(1, 1, 48, 64), (6, 8))[0, 0]
    assert change[grown == 0].max() < 1e-3 and change[grown > 0].max() > 0.1


def test_gallery(comfy, base):
    def taps(graph):
        with_model(graph)
        both, _ = taken(graph, "ImageStitch")
        cut, _ = taken(graph, "UPLiFTFeatureSegments")
        return {"both": (both, 0), "masks": (cut, 0)}

    changes = {name: value for name, value in FEATURES.items() if name not in ("width", "height")}
    _, got = run(comfy, base, workflow(7), taps, **changes)
    assert got["both"].shape[1] == 448 and got["masks"].sum(0).eq(1).all()


@pytest.mark.parametrize("path", sorted((HERE / "saved").glob("*.json")), ids=lambda path: path.stem)
def test_saved_by_an_earlier_version(comfy, path):
    """Graphs as earlier versions of this pack saved them; they must go on running. Add, never change."""
    changes = SMALL if "CheckpointLoaderSimple" in path.read_text() else {}
    comfy.run(to_api(path, comfy.get("/object_info"), **changes))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_file(comfy, path):
    """Known nodes, links that fit at both ends, values for all widgets, a picture beside it."""
    data, info = json.loads(path.read_text()), comfy.get("/object_info")
    nodes = {node["id"]: node for node in data["nodes"]}
    for node in data["nodes"]:
        assert node["type"] in NOTES or node["type"] in info
    for number, source, output, target, slot, kind in data["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[source]["outputs"][output]["type"] == kind == info[nodes[source]["type"]]["output"][output]
        assert nodes[target]["inputs"][slot]["link"] == number
    assert path.with_suffix(".jpg").is_file()


def test_texts_are_those_of_the_nodes(comfy):
    """Every node has a help page and its texts in both languages; the English ones are the nodes' own."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_locale", ROOT / "tools/make_locale.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    now = maker.texts(comfy.get("/object_info"))
    english, chinese = (json.loads((ROOT / f"locales/{name}/nodeDefs.json").read_text()) for name in ("en", "zh"))
    assert english == now, "run tools/make_locale.py"
    for node, texts in english.items():
        assert set(chinese[node]) == set(texts)
        assert set(chinese[node].get("inputs", {})) == set(texts.get("inputs", {})), node
        assert set(chinese[node]["outputs"]) == set(texts["outputs"]), node
        assert all(re.search("[\u4e00-\u9fff]", entry["tooltip"]) for entry in chinese[node].get("inputs", {}).values())
        pages = [ROOT / f"web/docs/{node}.md", ROOT / f"web/docs/{node}/zh.md"]
        assert all(page.read_text().startswith("# ") for page in pages)
        text = pages[0].read_text()
        assert all(option in text for option in texts.get("inputs", {}) if option != "photo"), node
