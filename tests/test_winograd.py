"""The fast 3x3 convolution of wide layers gives a convolution's numbers, at all sizes, borders and batch sizes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_cases import TOLERANCE, difference
from rule_weights import rule_state
from uplift_core import ModelConfig, UPLiFT
from uplift_core import winograd as module
from uplift_core.config import DownConfig, GroupConfig, UpConfig
from uplift_core.forms import fast_forms
from uplift_core.kept import keep_made
from uplift_core.noise import SeededNoise
from uplift_core.tiling import Job, run


def exact(x, weight, pads, bias=None):
    return F.conv2d(F.pad(x.double(), pads), weight.double(), None if bias is None else bias.double())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 3), st.tuples(*[st.integers(0, 1)] * 4), st.booleans(),
       st.sampled_from([module.TILES, module.LARGE]))
def test_it_is_a_convolution(h, w, batch, pads, biased, form):
    if h + pads[2] + pads[3] < 3 or w + pads[0] + pads[1] < 3:
        return
    generator = torch.Generator().manual_seed(h * 100 + w)
    x = torch.randn(batch, 6, h, w, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(10, 6, 3, 3, generator=generator), torch.randn(10, generator=generator)
    found = module.convolve([x], module.filters(weight, form), pads, bias if biased else None, form)
    expected = exact(x, weight, pads, bias if biased else None)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * 54**0.5  # 54 products a value
    parts = module.convolve([x[:, :4], x[:, 4:5], x[:, 5:]], module.filters(weight, form), pads,
                            bias if biased else None, form)
    assert (parts - expected).abs().max() < 1e-4 * 54**0.5


def test_as_exact_as_a_plain_convolution_over_512_channels():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 512, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(512, 512, 3, 3, generator=generator) / 68
    expected = exact(x, weight, (1, 1, 1, 1))
    ours = difference(module.convolve([x], module.filters(weight), (1, 1, 1, 1)).double(), expected)
    plain = difference(F.conv2d(x, weight, padding=1).double(), expected)
    assert ours < max(3 * plain, 1e-5)


def test_large_tiles_are_five_times_less_precise_and_taken_only_where_that_is_allowed_and_saves():
    x = torch.randn(1, 128, 30, 30).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 128, 3, 3) / 34
    found = module.convolve([x], module.filters(weight, module.LARGE), (1, 1, 1, 1), form=module.LARGE)
    assert difference(found.double(), exact(x, weight, (1, 1, 1, 1))) < TOLERANCE
    assert module.form_for(448, 448, exact=True) is module.TILES
    assert module.form_for(448, 448, exact=False) is module.LARGE
    assert module.form_for(8, 8, exact=False) is module.TILES  # 4 tiles of 36 products instead of 4 of 64


def test_a_map_worked_through_in_strips():
    """Wide maps are cut into several strips of rows of tiles."""
    x = torch.randn(1, 128, 40, 200).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3) / 34
    assert 50 <= module._TILES < 50 * 10  # fewer than the ten rows of tiles at a time
    assert difference(module.convolve([x], module.filters(weight), (1, 1, 1, 1)).double(),
                      exact(x, weight, (1, 1, 1, 1))) < TOLERANCE / 4


@pytest.mark.parametrize("form", [module.TILES, module.LARGE])
def test_every_other_pixel_and_half_the_channels_of_a_map_are_read_where_they_are(form):
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(2, 16, 40, 46, generator=generator).contiguous(memory_format=torch.channels_last)
    x = whole[:, 8:, 1::2, ::2]
    weight = torch.randn(12, 8, 3, 3, generator=generator)
    assert module._whole_pixels(x.permute(0, 2, 3, 1)).data_ptr() == x.data_ptr()
    for source in (x, x.contiguous()):  # channels first too
        found = module.convolve([source], module.filters(weight, form), (1, 1, 1, 1), form=form, relu=True)
        assert (found - exact(x, weight, (1, 1, 1, 1)).relu()).abs().max() < 1e-4 * 72**0.5


def test_filters_are_kept_only_within_the_block():
    weight = torch.randn(4, 4, 3, 3)
    with keep_made():
        first = module.filters(weight)
        assert module.filters(weight) is first
    weight.mul_(2)
    assert torch.allclose(module.filters(weight), first * 2)


def counted(monkeypatch, name):
    """A list that grows by one with every call of this function of winograd.py."""
    calls, own = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: (calls.append(1), own(*given))[1])
    return calls


def by_the_plain_form(config, h, w):
    """A model, a batch of two guides and latents of ``h w``, and what the plain form makes of them."""
    model = UPLiFT(config).eval().requires_grad_(False)
    model.load_state_dict(rule_state({key: tuple(value.shape) for key, value in model.state_dict().items()}))
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, config.patch * h, config.patch * w, generator=generator)
    latent = torch.randn(2, config.channels, h, w, generator=generator)
    return model, image, latent, model(image, latent, form="plain")


def test_models_of_wide_layers_take_it_and_keep_their_numbers(monkeypatch):
    wide = GroupConfig("DoubleConv", (128,), norm="layer")
    config = ModelConfig(channels=4, patch=4, encoder=(GroupConfig("SingleConv", (128,)), wide), downs=(DownConfig(),),
                         decoder=(wide, wide), ups=(UpConfig(),), noise_channels=2)
    calls = counted(monkeypatch, "convolve")
    model, image, latent, plain = by_the_plain_form(config, 21, 23)
    assert not calls
    assert difference(model(image, latent), plain) < TOLERANCE
    assert calls  # it was taken
    calls.clear()
    with fast_forms(winograd=False):
        assert difference(model(image, latent), plain) < TOLERANCE
    assert not calls
    tiled = run(Job(model, image[:1], latent[:1], 1, SeededNoise(0)), 40)
    assert difference(tiled, plain[:1]) < TOLERANCE


@pytest.mark.parametrize(("step", "first"), [(4, (0, 0)), (4, (2, 1)), (5, (3, 0)), (8, (0, 5))])
def test_positions_and_their_neighbours_alone(step, first):
    """At the border the neighbours lie outside, and read what there is."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, 20, 40, 45, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(12, 20, 3, 3, generator=generator), torch.randn(12, generator=generator)
    count = tuple((n - 2 - begin) // step + 1 for n, begin in zip(x.shape[2:], first))
    found = module.convolve_around(x, module.filters(weight, module.AROUND), first, count, step, bias)
    dense = exact(x, weight, (2, 2, 2, 2), bias)  # position i stands at i + 1
    rows, columns = ([begin + step * i + d for i in range(n) for d in range(3)] for begin, n in zip(first, count))
    assert found.shape == (2, 12, len(rows), len(columns))
    assert (found - dense[:, :, rows][:, :, :, columns]).abs().max() < 1e-4 * 180**0.5


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("residual", [True, False])
def test_the_last_two_blocks_around_what_is_sampled(norm, residual, monkeypatch):
    wide = GroupConfig("SingleConv", (96, 112), norm=norm, residual=residual)
    config = ModelConfig(channels=4, patch=8, encoder=(GroupConfig("SingleConv", (96,)), wide), downs=(DownConfig(),),
                         decoder=(GroupConfig("SingleConv", (16,)),) * 2, ups=(UpConfig(),), noise_channels=0)
    calls = counted(monkeypatch, "convolve_around")
    model, image, latent, plain = by_the_plain_form(config, 11, 13)
    assert not calls
    assert difference(model(image, latent), plain) < TOLERANCE
    with fast_forms(band_pixels=4000):
        assert difference(model(image, latent), plain) < TOLERANCE
    assert len(calls) > 2  # it was taken, in bands too
    for tile in (40, 64):
        tiled = run(Job(model, image[:1], latent[:1], 1, SeededNoise(0)), tile)
        assert difference(tiled, plain[:1]) < TOLERANCE
    calls.clear()
    assert difference(model(image, latent, 3), model(image, latent, 3, form="plain")) < TOLERANCE
    assert not calls  # every second position is sampled
