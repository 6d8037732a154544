"""The feature nodes in a real ComfyUI, their numbers against the core called directly."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from hosts.comfyui.comfy_host import Failed, graph
from rule_weights import published_shapes, rule_state
from uplift_core import dense_features, load, load_features
from uplift_core.backbones import load_backbone
from uplift_core.features import feature_mask, heat_picture, pca_pictures, segment_masks, segments, similarity

pytestmark = pytest.mark.slow

VIT = "vit_tiny_patch16_224.safetensors"
LOADER = ("UPLiFTModelLoader", {"model_name": "vit_tiny.safetensors", "dtype": "auto"})
POINTS = json.dumps([{"x": 10, "y": 20}, {"x": 40, "y": 5, "label": 0}])


@pytest.fixture
def put(tmp_path):
    def write(value, name="value"):
        path = tmp_path / f"{name}.pt"
        torch.save(value, path)
        return str(path)
    return write


@pytest.fixture
def saved(base):
    return lambda name: torch.load(base / "output" / f"{name}.pt")


@pytest.fixture(scope="module")
def core(base):
    backbone = load_backbone(base / "models/uplift_backbones" / VIT)
    model = load(base / "models/uplift/vit_tiny.safetensors", device="cpu")
    return lambda picture, **options: dense_features(picture, backbone=backbone, model=model, **options)


def some_image(batch=1, height=37, width=53, seed=1):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def features_graph(path, more=None, **options):
    nodes = {"model": LOADER, "image": ("ProbeImage", {"path": path}), "features": ("UPLiFTDenseFeatures", {
        "image": ("image", 0), "backbone": VIT, "resolution": 0, "scale": "pixel", "tile": "auto",
        "model": ("model", 0), **options})}
    return graph(**nodes, **(more or {"pca": ("ProbeSave", {"value": ("features", 1), "name": "pca"})}))


def mask_nodes(points=POINTS, threshold=0.5, softness=0.1, **more):
    return {"mask": ("UPLiFTFeatureMask", {"features": ("features", 0), "points": points, "threshold": threshold,
                                           "softness": softness, **more}),
            "out": ("ProbeSave", {"value": ("mask", 0), "name": "mask"}),
            "heat": ("ProbeSave", {"value": ("mask", 1), "name": "heat"})}


@pytest.mark.parametrize("scale, resolution, tile", [("pixel", 0, "auto"), ("2x", 0, "off"), ("1x", 0, "auto"),
                                                     ("8x", 0, "256"), ("pixel", 32, "auto")])
def test_pca_is_the_core(comfy, put, saved, core, scale, resolution, tile):
    image = some_image(2)
    comfy.run(features_graph(put(image), scale=scale, resolution=resolution, tile=tile))
    maps = [core(one.movedim(-1, 0), scale="pixel" if scale == "pixel" else int(scale[0]),
                 resolution=resolution or None) for one in image]
    expected = torch.stack(pca_pictures(maps)).movedim(1, -1)
    got = saved("pca")
    assert got.shape == expected.shape and (got - expected).abs().max() < 1e-3


def test_colors_of_other_features(comfy, put, saved, core):
    image = some_image()
    run = features_graph(put(image), {})
    run["coarse"] = {"class_type": "UPLiFTDenseFeatures", "inputs": {**run["features"]["inputs"], "scale": "1x",
                                                                     "colors_of": ["features", 0]}}
    run |= graph(pca=("ProbeSave", {"value": ("coarse", 1), "name": "pca"}))
    comfy.run(run)
    fine, coarse = (core(image[0].movedim(-1, 0), scale=scale) for scale in ("pixel", 1))
    expected = pca_pictures([coarse], like=[fine])[0].movedim(0, -1)
    assert (saved("pca")[0] - expected).abs().max() < 1e-3


def test_mask_and_heat_map(comfy, put, saved, core):
    image = some_image()
    outputs, _ = comfy.run(features_graph(put(image), mask_nodes()))
    found = core(image[0].movedim(-1, 0))
    near = similarity(found, [(10, 20)], [(40, 5)])
    assert (saved("mask")[0] - feature_mask(near, (37, 53), threshold=0.5, softness=0.1)).abs().max() < 1e-2
    assert (saved("heat")[0] - heat_picture(near, image[0].movedim(-1, 0)).movedim(0, -1)).abs().max() < 1e-2
    shown = outputs["mask"]
    assert shown["uplift_picture"][0]["type"] == "temp" and shown["uplift_size"] == [[53, 37]]


def test_another_point_computes_the_mask_alone(comfy, put):
    """Run after a click: the features are those of the run before. The node's own play button: the mask and no more."""
    run = features_graph(put(some_image(seed=9)), mask_nodes())

    def done(**options):
        _, events = comfy.run(run, **options)
        return {event["data"]["node"] for event in events if event["type"] == "executing"} - {None}

    assert {"image", "features", "mask"} <= done()
    run["mask"]["inputs"]["points"] = json.dumps([{"x": 3, "y": 3}])
    assert done() == {"mask", "out", "heat"}
    run["mask"]["inputs"]["points"] = json.dumps([{"x": 4, "y": 4}])
    assert done(only=["mask"]) == {"mask"}


def test_points_of_the_first_picture_find_it_in_the_others(comfy, put, saved, core):
    image = some_image(2)
    comfy.run(features_graph(put(image), mask_nodes()))
    first, second = (core(one.movedim(-1, 0)) for one in image)
    expected = feature_mask(similarity(second, [(10, 20)], [(40, 5)], of=first), (37, 53), threshold=0.5, softness=0.1)
    assert (saved("mask")[1] - expected).abs().max() < 1e-2


def test_points_count_in_the_given_picture_at_any_resolution(comfy, put, saved):
    path = put(some_image(1, 64, 96))
    comfy.run(features_graph(path, mask_nodes(json.dumps([{"x": 95, "y": 63}])), resolution=48))
    assert saved("mask").shape == (1, 64, 96) and saved("mask")[0, 63, 95] > 0.9


def test_rough_mask_marks(comfy, put, saved, core):
    image, rough = some_image(), torch.zeros(1, 37, 53)
    rough[:, 5:9, 5:9] = 1
    nodes = {"rough": ("ProbeMask", {"path": put(rough, "rough")}), **mask_nodes("[]", mask=("rough", 0))}
    comfy.run(features_graph(put(image), nodes))
    near = similarity(core(image[0].movedim(-1, 0)), mask=rough[0])
    assert (saved("mask")[0] - feature_mask(near, (37, 53), threshold=0.5, softness=0.1)).abs().max() < 1e-2


def test_nothing_marked_shows_the_picture_and_an_empty_mask(comfy, put, saved):
    outputs, _ = comfy.run(features_graph(put(some_image()), mask_nodes("[]")))
    assert saved("mask").max() == 0 and outputs["mask"]["uplift_picture"]


@pytest.mark.parametrize("points, words", [
    ('[{"x": 99, "y": 2}]', "outside the picture of 53x37"), ("[1", "expected a list like"),
    ('{"x": 1}', "expected a list like"), ('[{"x": 1, "y": 1, "label": 7}]', "label"),
    ('[{"x": 1, "y": 1, "label": 0}]', None)])
def test_bad_points(comfy, put, points, words):
    run = features_graph(put(some_image()), mask_nodes(points))
    if words is None:  # only what is not meant: nothing is marked
        comfy.run(run)
        return
    with pytest.raises(Failed, match=words):
        comfy.run(run)
    assert comfy.get("/system_stats")


def test_empty_mask_and_wrong_size(comfy, put):
    for rough, words in ((torch.zeros(1, 37, 53), "mask is empty"), (torch.ones(1, 8, 8), "the picture 53x37")):
        path = put(rough, f"rough{rough.shape[1]}")  # a name of its own: ComfyUI remembers results by inputs
        nodes = {"rough": ("ProbeMask", {"path": path}), **mask_nodes("[]", mask=("rough", 0))}
        with pytest.raises(Failed, match=words):
            comfy.run(features_graph(put(some_image()), nodes))


def test_segments(comfy, put, saved, core):
    image = some_image(2)
    nodes = {"cut": ("UPLiFTFeatureSegments", {"features": ("features", 0), "segments": 4, "seed": 3, "clean": 1}),
             "out": ("ProbeSave", {"value": ("cut", 0), "name": "cut"}),
             "picture": ("ProbeSave", {"value": ("cut", 1), "name": "picture"})}
    comfy.run(features_graph(put(image), nodes))
    expected = torch.cat([segment_masks(segments(core(one.movedim(-1, 0)), 4, seed=3, clean=1), (37, 53))
                          for one in image])
    got = saved("cut")
    assert got.shape == expected.shape and (got != expected).float().mean() < 1e-3
    assert saved("picture").shape == (2, 37, 53, 3)


@pytest.mark.parametrize("kind", ["safetensors", "npy"])
def test_save(comfy, put, base, core, kind):
    image = some_image()
    nodes = {"keep": ("UPLiFTSaveFeatures", {"features": ("features", 0), "filename_prefix": "dino/f", "format": kind,
                                             "dtype": "fp32"})}
    outputs, _ = comfy.run(features_graph(put(image), nodes))
    (name,) = outputs["keep"]["text"]
    kept = load_features(base / "output" / name)
    expected = core(image[0].movedim(-1, 0))
    assert kept.image_size == (37, 53) and kept.shape == expected.shape
    assert (kept.read(slice(None)) - expected.read(slice(None))).abs().max() < 1e-2


@pytest.mark.parametrize("height, width", [(15, 15), (3, 400), (1, 1)])
def test_odd_sizes_and_one_color(comfy, put, saved, height, width):
    comfy.run(features_graph(put(torch.full((1, height, width, 3), 0.5))))
    assert saved("pca").shape == (1, height, width, 3) and saved("pca").isfinite().all()


def test_alpha(comfy, put, saved):
    image = torch.cat([some_image(1, 20, 30), torch.full((1, 20, 30, 1), 0.4)], 3)
    comfy.run(features_graph(put(image, "alpha")))
    assert saved("pca").shape == (1, 20, 30, 3) and saved("pca").isfinite().all()


def test_backbone_out_of_reach(comfy, put):
    """The published weights are not here and there is no network: file, address and folder are named."""
    run = features_graph(put(some_image()), backbone="dinov2-s14", scale="1x")
    with pytest.raises(Failed, match="vit_small_patch14_dinov2") as failed:
        comfy.run(run)
    assert "https://" in failed.value.message and "models/uplift_backbones as " in failed.value.message


@pytest.fixture
def published(base):
    """Untrained files of the names and shapes of the published DINOv2 pair, in ComfyUI's folders."""
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    files = {base / "models/uplift_backbones/vit_small_patch14_dinov2.lvd142m.safetensors": vit.state_dict(),
             base / "models/uplift/uplift_dinov2-s14.safetensors": rule_state(published_shapes("dinov2-s14"))}
    for path, state in files.items():
        save_file(state, path)
    yield list(files)
    for path in files:
        path.unlink()


def test_the_uplift_of_a_backbone_is_found_by_itself(comfy, put, saved, published):
    image = some_image()
    run = features_graph(put(image), backbone="dinov2-s14", scale="2x")
    del run["model"], run["features"]["inputs"]["model"]
    comfy.run(run)
    found = dense_features(image[0].movedim(-1, 0), backbone=load_backbone(published[0]), model=str(published[1]),
                           scale=2)
    assert found.shape == (384, 6, 8)
    assert (saved("pca")[0].movedim(-1, 0) - pca_pictures([found])[0]).abs().max() < 1e-3


def test_wrong_model_for_the_backbone(comfy, put):
    run = features_graph(put(some_image()))
    run["model"]["inputs"]["model_name"] = "small.safetensors"
    with pytest.raises(Failed, match="192 channels of patch 16"):
        comfy.run(run)


def test_a_long_narrow_picture(comfy, put, saved, core):
    picture = some_image(1, 40, 3000)
    comfy.run(features_graph(put(picture), resolution=0))
    expected = pca_pictures([core(picture.movedim(-1, 1)[0])])[0]
    assert saved("pca").shape == (1, 40, 3000, 3)
    assert (saved("pca")[0].movedim(-1, 0) - expected).abs().max() < 0.02


def test_features_larger_than_memory_wait_in_a_file_that_goes_with_them(comfy, put, saved, base):
    """The limit is put to nothing; then the features are dropped, as another picture takes their place."""
    temp = base / "temp"
    run = features_graph(put(some_image(seed=7), "kept"), {**mask_nodes(), "pca": ("ProbeSave", {
        "value": ("features", 1), "name": "pca"})})
    run |= graph(kept=("ProbeKept", {"image": ("image", 0), "kept": 0}))
    run["features"]["inputs"]["image"] = ["kept", 0]
    comfy.run(run)
    from_file = [saved(name) for name in ("pca", "mask", "heat")]
    (file,) = temp.glob("uplift_features_*.npy")
    assert file.stat().st_size > 2 * 192 * 37 * 53
    run["kept"]["inputs"]["kept"] = 512 << 20
    comfy.run(run)
    assert not list(temp.glob("uplift_features_*"))
    for name, expected in zip(("pca", "mask", "heat"), from_file):
        assert torch.equal(saved(name), expected)
