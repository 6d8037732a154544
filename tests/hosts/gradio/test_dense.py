"""The Dense features tab through its API, with an untrained backbone and an untrained UPLiFT of the real shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from demo_host import photo
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import uplift_core as uplift
from uplift_core.backbones import load_backbone
from uplift_core.features import pca_pictures, similarity
from uplift_core.resample import antialias

pytest.importorskip("timm", reason="timm is not installed")
SIDE = 84


@pytest.fixture
def models(dense_models):
    return dense_models


@pytest.fixture
def host(dense_demo):
    return dense_demo


@pytest.fixture
def client(host):
    return host.client()


def core(path, models, scale="pixel"):
    """The features the page should have computed."""
    backbone = load_backbone(models / "vit_small_patch14_dinov2.lvd142m.safetensors")
    rgb = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
    height, width = (round(n * SIDE / max(rgb.shape[1:])) for n in rgb.shape[1:])
    small = antialias(rgb[None], (height, width))[0].clamp(0, 1)
    net = uplift.load(models / "uplift_dinov2-s14.safetensors", device="cpu")
    return uplift.dense_features(small, backbone=backbone, model=net, scale=scale)


def compute(client, path):
    return client.predict(handle_file(path), backbone="dinov2-s14", side=SIDE, api_name="/features")


def test_every_step_is_computed_and_the_numbers_are_the_cores(client, picture, models):
    shown, facts = compute(client, picture)
    assert facts["picture"] == [84, 69] and facts["channels"] == 384
    assert facts["sizes"] == [[6, 5], [12, 10], [24, 20], [48, 40], [84, 69]]
    expected = pca_pictures([core(picture, models, scale) for scale in (1, 2, 4, 8, "pixel")])[-1]
    found = np.asarray(Image.open(shown).convert("RGB")).astype(int)
    assert np.abs(found - np.rint(expected.permute(1, 2, 0).numpy() * 255)).mean() < 1


def test_a_pixel_finds_what_is_like_it(client, picture, models):
    compute(client, picture)
    tokens, pixels = client.predict(20, 30, api_name="/similarity")
    red = np.asarray(Image.open(pixels).convert("RGB")).astype(float)[4::8, 4::8]  # every pixel is a square of 8
    near = similarity(core(picture, models), [(20, 30)], centre=True).clamp(0, 1).numpy()
    warm = red[..., 0] - red[..., 2]  # red over blue grows with likeness
    assert np.corrcoef(warm.ravel(), near.ravel())[0, 1] > 0.7
    assert Image.open(tokens).size == Image.open(pixels).size == (84 * 8, 69 * 8)
    with pytest.raises(AppError, match="outside the picture"):
        client.predict(500, 30, api_name="/similarity")


def test_segments_cover_the_picture(client, picture):
    compute(client, picture)
    result = client.predict(3, api_name="/segments")
    value = result.get("value", result) if isinstance(result, dict) else result
    names = [a["label"] for a in value["annotations"]]
    assert [n.partition(":")[0] for n in names] == ["1", "2", "3"]
    assert 97 <= sum(int(n.split()[1]) for n in names) <= 103


def test_a_picture_matches_itself(client, picture):
    compute(client, picture)
    sheet, table = client.predict(handle_file(picture), 20, 30, api_name="/correspondences")
    assert Image.open(sheet).size == (84 * 16 + 16, 69 * 8)
    (_, here, there, likeness, mutual), = table["data"]
    assert here == "20, 30" and there in ("20, 30", "21, 31", "20, 31") and float(likeness) > 0.99 and mutual == "yes"
    _, table = client.predict(handle_file(picture), None, None, api_name="/correspondences")
    assert len(table["data"]) == 12


def test_people_have_features_of_their_own(host, tmp_path):
    one, two = host.client(), host.client()
    photo(44, 36).save(tmp_path / "wide.png")
    photo(36, 44).save(tmp_path / "high.png")
    compute(one, tmp_path / "wide.png")
    compute(two, tmp_path / "high.png")
    assert Image.open(one.predict(5, 5, api_name="/similarity")[1]).size == (84 * 8, 69 * 8)
    assert Image.open(two.predict(5, 5, api_name="/similarity")[1]).size == (69 * 8, 84 * 8)


def test_what_is_missing_or_wrong_is_said(client, host, picture, tmp_path):
    with pytest.raises(AppError, match="Compute the features"):
        host.client().predict(5, 5, api_name="/similarity")
    with pytest.raises(AppError, match="dinov3-splus16.*Models tab"):
        client.predict(handle_file(picture), backbone="dinov3-splus16", side=SIDE, api_name="/features")
    (tmp_path / "text.png").write_text("words")
    with pytest.raises(AppError, match="not a picture"):
        compute(client, tmp_path / "text.png")
    with pytest.raises(AppError, match="features|channels"):
        client.predict(handle_file(picture), backbone="dinov2-s14", model="uplift-mini", side=SIDE,
                       api_name="/features")
    compute(client, picture)
    with pytest.raises(AppError, match="not a picture"):
        client.predict(handle_file(tmp_path / "text.png"), None, None, api_name="/correspondences")
    assert "Traceback" not in host.log(), host.log()
