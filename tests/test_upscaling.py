"""The pipeline for pictures and latents, with a small model and a codec of plain arithmetic."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rule_weights import golden_config, model_shapes, rule_state
from uplift_core import UPLiFT, upscale_image, upscale_latents
from uplift_core.errors import Cancelled, InputError
from uplift_core.upscaling import pad_to, parse_tile


class PlainCodec:
    """Latents are averages of 8x8 pixels (red, green, blue, gray); pictures are their colours, squeezed into [0, 1]."""

    latent_space, channels, patch = "sd15", 4, 8

    def encode(self, image, **options):
        assert image.shape[2] % 8 == 0 and image.shape[3] % 8 == 0
        small = F.avg_pool2d(image, 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1) * 2 - 1

    def decode(self, latent, **options):
        colours = torch.sigmoid(latent[:, :3] + 0.1 * latent[:, 3:])
        return F.interpolate(colours, scale_factor=8, mode="nearest")


def build(space="sd15", **changes):
    config = dataclasses.replace(golden_config("small-vae_8x_batch2"), latent_space=space, **changes)
    model = UPLiFT(config).eval()
    model.load_state_dict(rule_state(model_shapes(config)))
    return model


@pytest.fixture(scope="module")
def model():
    return build()


CODEC = PlainCodec()


def photo(h, w, b=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(b, 3, 6, 6, generator=g), size=(h, w), mode="bilinear").clamp(0, 1)


def latent_case(b=1, h=5, w=7):
    guide = photo(8 * h, 8 * w, b)
    return CODEC.encode(guide), guide


def same(a, b):
    """Whether two results agree to 1e-4 of their spread."""
    return a.shape == b.shape and float((a - b).abs().max()) < 1e-4 * float(b.std().clamp_min(1e-3))


# -- latents -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [2, 4, 8])
def test_latents_agree_with_the_model(model, scale):
    latents, guide = latent_case()
    with torch.no_grad():
        expected = model(guide, latents, {2: 1, 4: 2, 8: 3}[scale], noise=3)
    result = upscale_latents(model, latents, guide, scale=scale, seed=3)
    assert result.shape == (1, 4, 5 * scale, 7 * scale) and same(result, expected)


def test_seeds_reproduce_and_differ(model):
    latents, guide = latent_case()
    first, again, other = (upscale_latents(model, latents, guide, seed=s) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert float((first - other).abs().max()) > 0.01 * float(first.std())


def test_strength_scales_the_noise(model):
    latents, guide = latent_case()
    def at(seed, strength):
        return upscale_latents(model, latents, guide, seed=seed, noise_strength=strength)
    assert torch.equal(at(1, 0), at(2, 0))
    none, weak, full = at(1, 0), at(1, 0.1), at(1, 1)
    assert 0 < float((weak - none).norm()) < 0.5 * float((full - none).norm())


@pytest.mark.parametrize("tile", [None, 16])
def test_an_item_of_a_batch_equals_a_single_run(model, tile):
    latents, guide = latent_case(3, 3, 4)
    together = upscale_latents(model, latents, guide, seed=10, tile=tile)
    for i in range(3):
        alone = upscale_latents(model, latents[i:i + 1], guide[i:i + 1], seed=10 + i, tile=tile)
        assert torch.equal(alone[0], together[i])
    assert not same(together[:1], together[1:2])


def test_one_guide_serves_a_batch(model):
    latents, guide = latent_case(2)
    shared = upscale_latents(model, latents, guide[:1], tile=None)
    assert torch.equal(shared, upscale_latents(model, latents, guide[:1].expand(2, -1, -1, -1), tile=None))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(16, 60), st.sampled_from([2, 4]))
def test_tiles_change_nothing(model, h, w, tile, scale):
    latents, guide = latent_case(1, h, w)
    whole = upscale_latents(model, latents, guide, scale=scale, seed=1, tile=None)
    assert same(upscale_latents(model, latents, guide, scale=scale, seed=1, tile=tile), whole)


def test_auto_tiles_fit_a_small_budget(model, caplog):
    latents, guide = latent_case(1, 24, 20)
    whole = upscale_latents(model, latents, guide, tile=None)
    calls = []
    tight = upscale_latents(model, latents, guide, memory_budget="3MB", progress=lambda *at: calls.append(at))
    assert same(tight, whole) and calls[-1][1] > 1  # more than one tile


@pytest.mark.parametrize("changes, words", [
    ({"image": torch.rand(1, 3, 40, 48)}, "guide image is 48x40.*cover 56x40"),
    ({"image": torch.rand(1, 1, 40, 56)}, "b 3 H W"),
    ({"image": torch.rand(3, 40, 56)}, "b 3 H W"),
    ({"image": torch.rand(2, 3, 40, 56)}, "2 guide images"),
    ({"latents": torch.rand(1, 16, 5, 7)}, "enlarges b 4 h w"),
    ({"latents": torch.rand(4, 5, 7)}, "enlarges b 4 h w"),
    ({"scale": 3}, "use 2, 4, 8"), ({"scale": 1}, "use 2, 4, 8"), ({"scale": 0}, "use 2, 4, 8"),
    ({"tile": 7}, "at least 8"), ({"tile": "wide"}, "auto, off"), ({"tile": 0}, "at least 8"), ({"tile": -64}, "least"),
    ({"noise_strength": -0.1}, "at least 0"), ({"noise_strength": float("nan")}, "at least 0"),
    ({"memory_budget": "much"}, "expected an amount"), ({"memory_budget": 0}, "more than nothing"),
    ({"memory_budget": float("nan")}, "a limit"), ({"memory_budget": float("inf")}, "a limit"),
    ({"noise_strength": None}, "at least 0"), ({"noise_strength": "1"}, "at least 0"), ({"seed": None}, "whole number"),
    ({"tile": 32.5}, "auto, off"), ({"tile": float("inf")}, "auto, off"),
    ({"latents": torch.zeros(1, 4, 5, 7, dtype=torch.int64)}, "floating-point numbers"),
    ({"image": torch.zeros(1, 3, 40, 56, dtype=torch.uint8)}, "floating-point numbers in .0, 1."),
])
def test_latents_that_do_not_fit_are_refused(model, changes, words):
    latents, image = latent_case()
    with pytest.raises(InputError, match=words):
        upscale_latents(model, **{"latents": latents, "image": image, **changes})


def test_words_for_tiles():
    assert [parse_tile(t, 8) for t in ("auto", " Off ", "none", "64", 64, None)] == ["auto", None, None, 64, 64, None]


@pytest.mark.parametrize("tile", [None, 16, "auto"])
@pytest.mark.parametrize("batch", [1, 2])
def test_progress_rises_to_its_end(model, tile, batch):
    latents, guide = latent_case(batch)
    calls = []
    upscale_latents(model, latents, guide, scale=4, tile=tile, progress=lambda *at: calls.append(at))
    done = [at[0] for at in calls]
    assert done == sorted(done) and len(set(done)) > 2
    assert len({total for _, total in calls}) == 1 and done[-1] == pytest.approx(calls[0][1])


@pytest.mark.parametrize("tile", [None, 16])
def test_a_wish_to_stop_is_heard(model, tile):
    latents, guide = latent_case()
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 3
    with pytest.raises(Cancelled):
        upscale_latents(model, latents, guide, tile=tile, should_stop=stop)
    assert len(asked) == 4


# -- pictures ------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70),
       st.one_of(st.sampled_from([1.01, 1.5, 2, 3, 4, 8]), st.floats(1.01, 8)), st.booleans())
def test_any_size_by_any_factor(model, h, w, scale, consistency):
    out = upscale_image(model, CODEC, photo(h, w)[0], scale=scale, consistency=consistency)
    assert out.shape == (3, max(1, round(scale * h)), max(1, round(scale * w)))
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("shape", [(16, 24), (13, 9), (1, 1), (3, 60)])
def test_padding_is_cropped_from_the_right_side(shape):
    x = photo(*shape)
    padded = pad_to(x, 8)
    assert padded.shape[2] % 8 == 0 and padded.shape[3] % 8 == 0
    assert torch.equal(padded[:, :, :shape[0], :shape[1]], x)
    assert padded.shape[2] - shape[0] < 8 and padded.shape[3] - shape[1] < 8


def test_the_result_lies_where_the_picture_does(model):
    """A picture black above and white below stays so, whatever was padded."""
    x = torch.zeros(1, 3, 44, 45)
    x[:, :, 22:] = 1
    out = upscale_image(model, CODEC, x, scale=2, noise_strength=0, consistency=True, color_fix="wavelet")
    assert out[:, :, :40].mean() < 0.2 and out[:, :, 48:].mean() > 0.8


@pytest.mark.parametrize("mode, expected", [("L", "L"), ("LA", "LA"), ("RGB", "RGB"), ("RGBA", "RGBA"), ("P", "RGB"),
                                            ("1", "L"), ("CMYK", "RGB")])
def test_pil_pictures(model, mode, expected):
    image = Image.fromarray(np.rint(photo(11, 14)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).convert(mode)
    out = upscale_image(model, CODEC, image, scale=1.5, seed=1)
    assert isinstance(out, Image.Image) and out.mode == expected
    assert out.size == (round(14 * 1.5), round(11 * 1.5))


def test_deep_gray_and_turned_pil_pictures(model):
    values = np.linspace(0, 65535, 20 * 28).reshape(20, 28).astype(np.uint16)
    result = upscale_image(model, PlainCodec(), Image.fromarray(values), scale=2, consistency=True)
    assert (result.mode, result.size) == ("I;16", (56, 40))
    assert int(np.asarray(result)[-1, -1]) - int(np.asarray(result)[0, 0]) > 30000
    turned = Image.new("RGB", (28, 20))
    turned.getexif()[0x0112] = 6
    assert upscale_image(model, PlainCodec(), turned, scale=2).size == (40, 56)
    with pytest.raises(InputError, match="mode 'F'"):
        upscale_image(model, PlainCodec(), Image.new("F", (16, 16)), scale=2)


def test_invisible_colours_do_not_bleed_into_edges(model):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[4:12, 4:12] = 255, 0, 0, 255
    for mode in ("RGBA", "RGBa"):
        made = upscale_image(model, CODEC, Image.fromarray(pixels).convert(mode), scale=2, consistency=True)
        expected = upscale_image(model, CODEC, Image.new("RGB", (16, 16), (255, 0, 0)), scale=2, consistency=True)
        assert made.mode == "RGBA" and np.array_equal(np.asarray(made)[..., :3], np.asarray(expected))


def test_alpha_is_enlarged_separately(model):
    image = Image.new("RGBA", (16, 16), (200, 30, 30, 255))
    image.paste((200, 30, 30, 0), (0, 0, 8, 16))
    alpha = np.asarray(upscale_image(model, CODEC, image, scale=2).getchannel("A"))
    assert alpha.shape == (32, 32) and (alpha[:, :13] < 10).all() and (alpha[:, 19:] > 245).all()
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.info["transparency"] = 1
    assert upscale_image(model, CODEC, palette, scale=2).getextrema()[3] == (0, 0)


@pytest.mark.parametrize("shape", [(9, 12, 3), (2, 9, 12, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, np.float16])
def test_arrays(model, shape, dtype):
    whole = np.issubdtype(dtype, np.integer)
    unit = photo(9, 12, shape[0] if len(shape) == 4 else 1).permute(0, 2, 3, 1).numpy().reshape(shape)
    array = (unit * np.iinfo(dtype).max if whole else unit).astype(dtype)
    kept = array.copy()
    out = upscale_image(model, CODEC, array, scale=2, seed=1)
    assert out.dtype == dtype and out.shape == (*shape[:-3], 18, 24, 3) and (array == kept).all()
    reference = upscale_image(model, CODEC, unit, scale=2, seed=1)
    top = np.iinfo(dtype).max if whole else 1
    # The rule's weights are no trained ones: rounding of the input by 1/255 may grow a few times.
    assert np.abs(out.astype(np.float64) / top - reference).max() < (0.1 if dtype == np.uint8 else 0.02)


@pytest.mark.parametrize("shape", [(3, 9, 12), (2, 3, 9, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors(model, shape, dtype):
    x = photo(9, 12, 2)[:shape[0] if len(shape) == 4 else 1].reshape(shape).to(dtype)
    out = upscale_image(model, CODEC, x, scale=2)
    assert out.dtype == dtype and out.shape == (*shape[:-2], 18, 24) and not out.requires_grad


def test_the_kinds_give_one_picture(model):
    values = np.rint(photo(16, 24)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    array = upscale_image(model, CODEC, values, scale=3, seed=2)
    image = upscale_image(model, CODEC, Image.fromarray(values), scale=3, seed=2)
    tensor = upscale_image(model, CODEC, torch.from_numpy(values).permute(2, 0, 1) / 255, scale=3, seed=2)
    assert (np.asarray(image) == array).all()
    assert (np.rint(tensor.permute(1, 2, 0).numpy() * 255) == array).all()


def test_seeds_and_batches_of_pictures(model):
    x = photo(20, 13, 2)
    both = upscale_image(model, CODEC, x, scale=2, seed=4)
    for i in range(2):
        assert same(upscale_image(model, CODEC, x[i], scale=2, seed=4 + i), both[i])
    assert torch.equal(both, upscale_image(model, CODEC, x, scale=2, seed=4))
    assert not same(upscale_image(model, CODEC, x[0], scale=2, seed=5), both[0])
    silent = [upscale_image(model, CODEC, x, scale=2, seed=s, noise_strength=0) for s in (1, 2)]
    assert torch.equal(*silent)


def test_tiles_of_pictures(model):
    x = photo(50, 37)
    whole = upscale_image(model, CODEC, x, scale=4, seed=1, tile=None)
    assert same(upscale_image(model, CODEC, x, scale=4, seed=1, tile=24), whole)


def test_colours_and_pixels_are_pinned(model):
    x = 0.4 + 0.2 * photo(24, 24)  # far from the ends, so that nothing is clamped
    none, mean, pinned = (upscale_image(model, CODEC, x, scale=2, color_fix=fix, consistency=pin, noise_strength=0)
                          for fix, pin in (("none", False), ("mean", False), ("none", True)))
    def off(y):
        return float((y.mean((2, 3)) - x.mean((2, 3))).abs().max())
    assert off(mean) < 0.3 * off(none) and off(none) > 0.01

    def residual(y):
        return float((F.interpolate(y, size=(24, 24), mode="bilinear", antialias=True) - x).abs().mean())
    assert residual(pinned) < 0.3 * residual(none)


def test_progress_and_stop_of_pictures(model):
    calls = []
    upscale_image(model, CODEC, photo(20, 20), scale=3, tile=16, progress=lambda *at: calls.append(at))
    done = [at[0] for at in calls]
    assert done == sorted(done) and done[-1] == pytest.approx(calls[-1][1])
    with pytest.raises(Cancelled):
        upscale_image(model, CODEC, photo(20, 20), scale=2, should_stop=lambda: True)


@pytest.mark.parametrize("options, words", [
    ({"scale": 9}, "up to 8"), ({"scale": 1}, "above 1"), ({"scale": -2}, "above 1"),
    ({"scale": float("nan")}, "scale"), ({"scale": "2"}, "scale"), ({"scale": 8.01}, "up to 8"),
    ({"color_fix": "warm"}, "none, mean, adain, wavelet"), ({"tile": 3}, "at least 8"), ({"tile": "x"}, "auto, off"),
    ({"noise_strength": -1}, "at least 0"), ({"memory_budget": "x"}, "expected an amount"),
])
def test_options_that_do_not_fit_are_refused(model, options, words):
    with pytest.raises(InputError, match=words):
        upscale_image(model, CODEC, photo(8, 8), **options)


@pytest.mark.parametrize("image, words", [
    ("photo.png", "cannot enlarge a str"), (torch.rand(1, 8, 8), "3 H W"), (torch.rand(8, 8), "3 H W"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), "expected floats"), (torch.rand(3, 0, 8), "3 H W"),
    (np.zeros((8, 8)), "H W 3"), (np.zeros((3, 8, 8)), "H W 3"), (np.zeros((8, 8, 4), np.uint8), "H W 3"),
    (np.zeros((8, 8, 3), bool), "expected uint8"),
])
def test_things_that_are_no_pictures_are_refused(model, image, words):
    with pytest.raises(InputError, match=words):
        upscale_image(model, CODEC, image)


def test_a_model_and_a_codec_of_different_latents_are_refused():
    class Other(PlainCodec):
        latent_space = "sdxl"
    with pytest.raises(InputError, match="sd15.*sdxl"):
        upscale_image(build(), Other(), photo(8, 8))
    assert upscale_image(build(""), Other(), photo(8, 8)).shape == (1, 3, 16, 16)  # not known: passes


@pytest.mark.parametrize("kind", ["int32", "int64", "uint32", "int8"])
def test_arrays_of_an_unknown_white_are_refused(model, kind):
    with pytest.raises(InputError, match=f"the array is {kind}; expected uint8, uint16 or floats"):
        upscale_image(model, CODEC, np.full((16, 16, 3), 100, kind))


@pytest.mark.parametrize("wrong, says", [({"seed": "x"}, "seed is 'x'"), ({"seed": 1.5}, "seed is 1.5")])
def test_a_seed_is_a_whole_number(model, wrong, says):
    with pytest.raises(InputError, match=says):
        upscale_image(model, CODEC, np.zeros((16, 16, 3), np.uint8), **wrong)


@pytest.mark.parametrize("scale", ["2", None])
def test_a_scale_is_a_number(model, scale):
    with pytest.raises(InputError, match="scale is"):
        upscale_latents(model, torch.zeros(1, model.config.channels, 4, 4), torch.zeros(1, 3, 32, 32), scale=scale)
