"""Dense features: windows are the whole, sizes are exact, files are whole or absent; what is done with features finds
what was planted."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from golden_cases import difference, golden, ruled
from uplift_core import PRESETS, DenseFeatures, dense_features, load_features
from uplift_core.errors import Cancelled, DownloadError, InputError, OutOfMemory, UpliftError
from uplift_core.features import (
    correspondences,
    feature_mask,
    fit_pca,
    pca_pictures,
    segment_masks,
    segments,
    similarity,
)
from uplift_core.model import imagenet_normalise
from uplift_core.upscaling import pad_to

timm = pytest.importorskip("timm", reason="timm is not installed")

from uplift_core.backbones import BACKBONES, Backbone, load_backbone  # noqa: E402

TOLERANCE = 1e-4


def backbone(space="dinov3-splus16"):
    """An untrained ViT of one block with the published model's patch and channels."""
    torch.manual_seed(0)
    name = "vit_small_patch14_dinov2" if space == "dinov2-s14" else "vit_small_patch16_224"
    net = timm.create_model(name, pretrained=False, num_classes=0, depth=1, dynamic_img_size=True)
    return Backbone(net, BACKBONES[space])


def picture(height=37, width=53, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def features(image, space="dinov3-splus16", **options):
    return dense_features(image, backbone=backbone(space), model=ruled(PRESETS[space]),
                          **{"dtype": torch.float32, "tile": None, **options})


def planted(noise=0.05, h=48, w=64, c=24, seed=1):
    """Three regions, a feature of their own each, plus noise: the map ``c h w`` and the regions ``h w``."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    regions = torch.where(x < w // 3, 0, torch.where((y - h / 2) ** 2 + (x - 46) ** 2 < 150, 1, 2))
    own = F.normalize(torch.randn(3, c, generator=g), dim=1)
    data = own[regions].permute(2, 0, 1) + noise * torch.randn(c, h, w, generator=g)
    return DenseFeatures(data, (h * 2, w * 2), 2.0), regions


def iou(a, b):
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("space", ["dinov2-s14", "dinov3-splus16"])
def test_pixel_features_are_the_models_definition(space):
    image = picture()
    net, teacher = ruled(PRESETS[space]), backbone(space)
    padded = pad_to(image[None], teacher.patch)
    expected = net(imagenet_normalise(padded), teacher.encode(padded), 4, noise=None, form="plain",
                   outsize=tuple(padded.shape[2:]))[0, :, :37, :53]
    found = features(image, space)
    assert (found.model, found.backbone) == (space, BACKBONES[space])
    assert found.shape == (384, 37, 53) and found.stride == 1 and found.method == "uplift"
    assert difference(found.data, expected) < TOLERANCE
    twice = net(imagenet_normalise(padded), teacher.encode(padded), 1, noise=None, form="plain")[0]
    found = features(image, space, scale=2)
    assert difference(found.data, twice[:, :found.shape[1], :found.shape[2]]) < TOLERANCE


@pytest.mark.parametrize("space", ["dinov2-s14", "dinov3-splus16"])
def test_the_published_backbones_give_their_last_normed_patches(space):
    """The real architectures, untrained: all of timm's own result but the prefix tokens."""
    if not timm.is_model(BACKBONES[space].split(".")[0]):
        pytest.skip(f"timm {timm.__version__} has no {BACKBONES[space]}")
    teacher, image = load_backbone(space, pretrained=False), picture(3 * 14 if space == "dinov2-s14" else 48, 112)[None]
    found = teacher.encode(image)
    tokens = teacher.module.forward_features(imagenet_normalise(image))
    prefix = teacher.module.num_prefix_tokens
    assert prefix == {"dinov2-s14": 1, "dinov3-splus16": 5}[space] and found.shape[1] == 384
    assert torch.allclose(found.flatten(2).transpose(1, 2), tokens[:, prefix:], atol=1e-5)


def test_a_timm_older_than_dinov3_is_called_that(monkeypatch):
    monkeypatch.setattr(timm, "is_model", lambda name: "dinov3" not in name)
    with pytest.raises(InputError, match=r"timm .* is too old for dinov3-splus16.*--upgrade timm"):
        load_backbone("dinov3-splus16", pretrained=False)


@settings(max_examples=6, deadline=None)
@given(st.integers(15, 50), st.integers(15, 50), st.sampled_from([2, 8, "pixel"]), st.integers(10, 40),
       st.sampled_from(["dinov2-s14", "dinov3-splus16"]))
def test_windows_are_the_whole(height, width, scale, tile, space):
    image = picture(height, width)
    whole = features(image, space, scale=scale)
    assert difference(features(image, space, scale=scale, tile=tile).data, whole.data) < TOLERANCE


@pytest.mark.parametrize("method", ["nearest", "bilinear", "jbu"])
def test_windows_of_baselines_are_the_whole(method):
    options = {"backbone": backbone(), "model": method, "dtype": torch.float32}
    whole = dense_features(picture(), tile=None, **options)
    assert difference(dense_features(picture(), tile=13, **options).data, whole.data) < TOLERANCE


@pytest.mark.parametrize(("scale", "shape"), [(1, (3, 4)), (2, (5, 7)), (4, (10, 14)), (8, (19, 27)),
                                              ("pixel", (37, 53))])
def test_sizes(scale, shape):
    found = features(picture(), scale=scale)
    assert found.shape[1:] == shape and found.image_size == (37, 53)
    assert found.cells([(52.9, 36.9)]) == [(math.ceil(37 / found.stride) - 1, math.ceil(53 / found.stride) - 1)]


@pytest.mark.parametrize("image", [
    Image.new("L", (15, 15), 90), Image.new("RGBA", (20, 17), (10, 200, 30, 40)), Image.new("RGB", (300, 7), "red"),
    Image.new("RGB", (3000, 40), "blue"), Image.new("LA", (15, 15), (90, 30)),
    np.zeros((16, 16, 3), np.uint8)])
def test_odd_pictures_give_finite_features_and_colours(image):
    found = features(image, scale=4)
    assert torch.isfinite(found.data).all() and torch.isfinite(fit_pca(found).picture(found)).all()


def test_nearest_and_bilinear_are_torchs():
    teacher, image = backbone(), picture(48, 64)
    low = teacher.encode(image[None])
    for method, more in (("nearest", {}), ("bilinear", {"align_corners": False})):
        found = dense_features(image, backbone=teacher, model=method, scale=4, dtype=torch.float32)
        assert difference(found.data, F.interpolate(low, scale_factor=4, mode=method, **more)[0]) < TOLERANCE


def test_joint_bilateral_is_its_definition():
    from uplift_core.baselines import JointBilateral
    from uplift_core.resample import Span

    g = torch.Generator().manual_seed(3)
    k, h, w = 4, 4, 5
    image, low = torch.rand(1, 3, h * k, w * k, generator=g), torch.randn(1, 2, h, w, generator=g)
    found = JointBilateral(image, low, k, spatial=0.8, contrast=0.3).window(Span.all(h * k), Span.all(w * k))
    expected = torch.zeros(2, h * k, w * k)
    for y in range(h * k):
        for x in range(w * k):
            total, weights = torch.zeros(2), 0.0
            for i in range(max(0, y // k - 2), min(h, y // k + 3)):
                for j in range(max(0, x // k - 2), min(w, x // k + 3)):
                    far = ((y + 0.5) / k - 0.5 - i) ** 2 + ((x + 0.5) / k - 0.5 - j) ** 2
                    centre = image[0, :, i * k + 1:i * k + 3, j * k + 1:j * k + 3].mean((1, 2))  # the pixel at q
                    apart = float((image[0, :, y, x] - centre).square().sum())
                    weight = math.exp(-far / (2 * 0.8**2) - apart / (2 * 0.3**2))
                    total, weights = total + weight * low[0, :, i, j], weights + weight
            expected[:, y, x] = total / weights
    assert difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("ending", [".npy", ".safetensors"])
def test_files_hold_the_same_and_are_kept(tmp_path, ending):
    path, image = tmp_path / f"f{ending}", picture()
    kept = features(image, scale=4, tile=20, storage=path)
    assert dense_features(image, backbone=backbone(), model="nearest").data.dtype == torch.float16  # unless asked
    assert difference(kept.read(slice(None)), features(image, scale=4).data) < TOLERANCE
    again = load_features(path)
    assert (again.shape, again.stride, again.image_size, again.method) == (kept.shape, 4, (37, 53), "uplift")
    with pytest.raises(InputError, match="overwrite"):
        features(image, scale=4, storage=path)
    if ending == ".safetensors":
        with safe_open(str(path), framework="pt") as file:
            assert tuple(file.get_tensor("features").shape) == kept.shape
    again.save(tmp_path / "copy.npy", dtype=torch.float32)
    assert np.array_equal(np.load(tmp_path / "copy.npy"), kept.read(slice(None)).numpy())


def test_a_stopped_run_leaves_no_file(tmp_path):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 20

    with pytest.raises(Cancelled):
        features(picture(), storage=tmp_path / "f.npy", tile=16, should_stop=stop)
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_its_total():
    seen = []
    features(picture(), scale=4, tile=20, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == pytest.approx(seen[-1][1]) and len(seen) > 2 and seen == sorted(seen)


def test_features_repeat_and_need_no_network():
    assert torch.equal(features(picture(), scale=2).data, features(picture(), scale=2).data)


@pytest.mark.parametrize(("options", "text"), [
    ({"scale": 3}, "scale"), ({"dtype": torch.int8}, "float16"), ({"storage": "x.txt"}, "npy"),
    ({"resolution": 0}, "resolution"), ({"tile": "big"}, "tile")])
def test_bad_options(options, text):
    with pytest.raises(InputError, match=text):
        features(picture(), **options)


def test_a_backbone_that_does_not_fit_says_so(monkeypatch):
    def fails(self, image):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Backbone, "encode", fails)
    with pytest.raises(OutOfMemory, match="dinov3.*, which sees the whole picture at once, does not fit .*20.00 G"
                                          ".*smaller resolution"):
        features(picture())


def test_a_model_of_another_backbone_is_refused():
    with pytest.raises(InputError, match="patch 14"):
        dense_features(picture(), backbone=backbone(), model=ruled(PRESETS["dinov2-s14"]))
    with pytest.raises(InputError, match="channels"):
        dense_features(picture(), backbone=backbone(), model=golden("small-vae_8x_batch2").model)


def test_networks_of_others_are_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UpliftError, match="git clone"):
        dense_features(picture(), backbone=backbone(), model="anyup")


def test_a_network_in_the_hubs_folder_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    folder = tmp_path / "wimmerth_anyup_main"
    folder.mkdir()
    (folder / "hubconf.py").write_text(
        "import torch\nclass Up(torch.nn.Module):\n"
        "    def forward(self, image, low, size):\n"
        "        return torch.nn.functional.interpolate(low, size=size, mode='nearest')\n"
        "def anyup(pretrained):\n    return Up()\n")
    options = {"backbone": backbone(), "scale": 2, "dtype": torch.float32}
    assert torch.equal(dense_features(picture(), model="anyup", **options).data,
                       dense_features(picture(), model="nearest", **options).data)


def test_a_hub_out_of_reach_is_told_with_file_address_and_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(DownloadError) as caught:
        load_backbone("vit_tiny_patch16_224.augreg_in21k", offline=True)
    assert all(part in str(caught.value) for part in ("model.safetensors", "https://", str(tmp_path)))
    with pytest.raises(InputError, match="nonsense"):
        load_backbone("vit_tiny_patch16_224.nonsense", offline=True)
    with pytest.raises(InputError, match="no weights"):
        load_backbone("vit_small_patch16_18x2_224", offline=True)


def test_a_backbone_by_local_file_and_from_the_models_folder(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    net = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0)
    path = tmp_path / "vit_tiny_patch16_224.safetensors"
    save_file(net.state_dict(), str(path))
    monkeypatch.setenv("UPLIFT_MODELS", str(tmp_path))
    one, other = load_backbone(path), load_backbone("vit_tiny_patch16_224", offline=True)
    image = picture(32, 48)[None]
    assert torch.equal(one.encode(image), other.encode(image)) and one.encode(image).shape == (1, 192, 2, 3)


# -- what is done with features ---------------------------------------------------------------------------------------

def test_segments_find_the_planted_regions():
    found, regions = planted(noise=0.1)
    labels = segments(found, 3, seed=5)
    assert torch.equal(labels, segments(found, 3, seed=5))
    assert (torch.bincount(labels.flatten()).diff() <= 0).all()
    for k in range(3):
        assert max(iou(labels == j, regions == k) for j in range(3)) >= 0.95
    masks = segment_masks(labels, found.image_size)
    assert masks.shape == (3, 96, 128) and (masks.sum(0) == 1).all()


def test_the_vote_removes_specks():
    found, regions = planted(noise=0.01)
    found.data[:, 5, 5] = found.data[:, 24, 46]
    found.data[:, 30, 30] = found.data[:, 5, 6]
    raw, clean = segments(found, 3), segments(found, 3, clean=1)
    assert raw[5, 5] != raw[5, 6] and clean[5, 5] == clean[5, 6] and clean[30, 30] == clean[30, 32]
    for k in range(3):
        assert max(iou(clean == j, regions == k) for j in range(3)) >= 0.95


def test_likeness_masks_the_planted_region():
    found, regions = planted()
    target = regions == 1
    for marked in ({"positive": [(92, 48)]}, {"mask": target}, {"mask": target, "negative_mask": regions == 0},
                   {"positive": [(92, 48)], "negative": [(10, 10)]},
                   {"positive": [(92, 48)], "centre": True}):
        near = similarity(found, **marked)
        mask = feature_mask(near, found.image_size, threshold=0.5, softness=0)
        large = target.repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert near.min() >= -1 and near.max() <= 1 and iou(mask > 0.5, large) >= 0.95


def test_negative_points_take_away():
    found, regions = planted()
    both = similarity(found, [(92, 48), (10, 10)])
    less = similarity(found, [(92, 48), (10, 10)], [(11, 11)])
    assert both[regions == 0].mean() > 0.8 > 0.3 > less[regions == 0].mean() and less[regions == 1].mean() > 0.5


def test_bad_marks():
    found, _ = planted()
    for marks, text in (({"positive": [(128, 0)]}, "outside"), ({}, "nothing is marked"),
                        ({"mask": torch.zeros(48, 64)}, "empty"), ({"mask": torch.ones(3, 3)}, "shape"),
                        ({"positive": [5]}, "point")):
        with pytest.raises(InputError, match=text):
            similarity(found, **marks)
    with pytest.raises(InputError, match="segments"):
        segments(found, 0)


def test_correspondences_find_where_it_moved():
    g = torch.Generator().manual_seed(2)
    data = torch.randn(16, 30, 40, generator=g)
    first = DenseFeatures(data, (60, 80), 2.0)
    second = DenseFeatures(data.roll((5, -7), (1, 2)) + 0.05 * torch.randn(16, 30, 40, generator=g), (60, 80), 2.0)
    points = [(21.0, 11.0), (45.0, 31.0)]
    found = correspondences(first, second, points)
    assert found.points == [(x - 14, y + 10) for x, y in points]
    assert found.mutual.all() and (found.likeness > 0.9).all()


def test_pca_is_joint_stable_and_in_range():
    found, regions = planted()
    other = DenseFeatures(found.data.flip(2), found.image_size, 2.0)
    one, two = pca_pictures([found, other])
    assert torch.equal(pca_pictures([other], like=[found, other])[0], two)
    assert difference(two.flip(2), one) < TOLERANCE and one.min() >= 0 and one.max() <= 1
    assert torch.equal(fit_pca([found, other]).components, fit_pca([found, other]).components)
    pca = fit_pca(found)
    assert (pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True)) > 0).all()
    exact = torch.linalg.svd(found.data.flatten(1).T - found.data.flatten(1).mean(1), full_matrices=False)[2][:2]
    assert torch.allclose((pca.components[:2] * exact).sum(1).abs(), torch.ones(2), atol=1e-4)
    inside = [one[:, regions == k] for k in range(3)]
    assert max(x.std(1).max() for x in inside[:1]) < 0.35


def test_pca_does_not_lose_a_small_spread_on_a_large_mean():
    found, _ = planted()
    moved = DenseFeatures(found.data + 1000, found.image_size, 2.0)
    assert torch.allclose((fit_pca(moved).components[:2] * fit_pca(found).components[:2]).sum(1),
                          torch.ones(2), atol=1e-2)


def test_constant_features_give_a_gray_picture():
    flat = DenseFeatures(torch.full((8, 5, 6), 3.3), (5, 6), 1.0)
    assert (fit_pca(flat).picture(flat) == 0.5).all()
    near = similarity(flat, [(1, 1)])
    assert (near > 0.999).all() and torch.isfinite(feature_mask(near, (5, 6))).all()
    nothing = DenseFeatures(torch.zeros(8, 5, 6), (5, 6), 1.0)
    assert torch.isfinite(similarity(nothing, [(1, 1)], [(2, 2)])).all()
    assert segments(flat, 3).max() == 0


def test_bands_do_not_change_the_results(monkeypatch):
    found, _ = planted()
    points = [(11, 13), (92, 95)]
    whole = fit_pca(found).picture(found), similarity(found, [(92, 48)]), segments(found, 3)
    there = correspondences(found, found, points).points
    bands = DenseFeatures.bands
    monkeypatch.setattr(DenseFeatures, "bands", lambda self: bands(self, 4 * 24 * 64 * 5))
    assert len(list(found.bands())) == 10
    again = fit_pca(found).picture(found), similarity(found, [(92, 48)]), segments(found, 3)
    assert correspondences(found, found, points).points == there == [(11, 13), (93, 95)]
    for a, b in zip(whole, again):
        assert torch.allclose(a.float(), b.float(), atol=1e-4)


@pytest.mark.parametrize("n", [9, 17, 25])
def test_a_window_reads_as_far_as_its_attender_looks(n):
    """One step, nothing but the attender: the last row a window sees lies ``reach`` beyond it, and it counts."""
    from uplift_core.cascade import UpliftWindows
    from uplift_core.config import DownConfig, GroupConfig, ModelConfig, UpConfig
    from uplift_core.model import UPLiFT
    from uplift_core.resample import Span

    one = GroupConfig("SingleConv", (32,), residual=False)
    config = ModelConfig(channels=20, patch=2, encoder=(one, one), downs=(DownConfig(),), decoder=(
        GroupConfig("IdentityBlock", (), width=52), GroupConfig("IdentityBlock", (), width=84)), ups=(UpConfig(),),
        attender=n)
    model = UPLiFT(config).eval().requires_grad_(False)
    torch.manual_seed(n)
    image, low = torch.rand(1, 3, 48, 40), torch.randn(1, 20, 24, 20)
    whole = model(image, low, 2)[0]
    for side in (2, 6):
        window = UpliftWindows(model, image, low, 4).window(Span(40, 40 + side, 96), Span(32, 32 + side, 80))
        assert difference(window, whole[:, 40:40 + side, 32:32 + side]) < TOLERANCE
