"""Back-projection: each round comes nearer to the given pixels, and towards the true picture."""

from __future__ import annotations

import pytest
import skimage.data
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from uplift_core.consistency import back_project, make_consistent
from uplift_core.errors import InputError
from uplift_core.resample import antialias


@pytest.fixture(scope="module", params=["astronaut", "chelsea", "coffee"])
def photo(request):
    """``1 3 240 240`` in [0, 1]."""
    whole = torch.from_numpy(getattr(skimage.data, request.param)()).permute(2, 0, 1).float() / 255
    return whole[None, :, 40:280, 100:340]


def residual(y, low):
    return float((antialias(y, tuple(low.shape[2:])) - low).square().mean().sqrt())


def psnr(y, true):
    return float(-10 * torch.log10((y - true).square().mean()))


@pytest.mark.parametrize("factor", [1.5, 2, 3, 4, 8])
def test_every_round_comes_nearer_to_the_given_pixels(photo, factor):
    low = antialias(photo, (round(240 / factor), round(240 / factor)))
    y = F.interpolate(low, size=(240, 240), mode="bicubic").clamp(0, 1)
    y = (0.9 * y + 0.04)  # faded, as a codec might
    left = [residual(back_project(y, low, rounds), low) for rounds in range(6)]
    assert all(after < before for before, after in zip(left, left[1:])), left
    assert left[4] < 0.25 * left[0]
    assert left[4] == residual(back_project(y, low), low)  # four rounds are the default


@pytest.mark.parametrize("factor", [2, 4])
def test_an_enlarged_photo_gets_better(photo, factor):
    low = antialias(photo, (240 // factor, 240 // factor))
    y = F.interpolate(low, size=(240, 240), mode="bicubic").clamp(0, 1)
    assert psnr(back_project(y, low), photo) > psnr(y, photo) + 0.3


def test_shrinking_looks_at_every_pixel(photo):
    """Fine stripes that a mean of pixels cannot see are left alone; picking single pixels would change them."""
    low = antialias(photo, (60, 60))
    stripes = 0.2 * (-1.0) ** torch.arange(240)
    flat = 0.25 + 0.5 * F.interpolate(low, size=(240, 240), mode="bicubic").clamp(0, 1)
    target = antialias(flat, (60, 60))
    change = back_project(flat + stripes, target, 1) - (flat + stripes)
    assert change[..., 8:-8, 8:-8].abs().max() < 0.01


def test_a_consistent_picture_is_a_fixed_point(photo):
    low = antialias(photo, (80, 80))
    assert (back_project(photo, low, 10) - photo).abs().max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(1, 8), st.integers(1, 2))
def test_any_size_gives_a_picture_in_range(h, w, factor, b):
    low = torch.rand(b, 3, h, w)
    y = torch.rand(b, 3, max(1, round(h * factor)), max(1, round(w * factor)))
    out = back_project(y, low)
    assert out.shape == y.shape and out.min() >= 0 and out.max() <= 1
    for i in range(b):
        assert (back_project(y[i:i + 1], low[i:i + 1]) - out[i]).abs().max() < 1e-5


def test_the_same_size_gives_the_given_pixels_back():
    low = torch.rand(1, 3, 9, 7)
    assert (back_project(torch.rand(1, 3, 9, 7), low) - low).abs().max() < 1e-6


def test_what_is_given_stays_untouched():
    y, low = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4)
    given_y, given_low = y.clone(), low.clone()
    back_project(y, low)
    assert torch.equal(y, given_y) and torch.equal(low, given_low)


def test_number_format_and_rounds():
    low, y = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8)
    assert back_project(y.half(), low).dtype == torch.float16
    assert torch.equal(back_project(y, low, 0), y)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="same batch"):
        back_project(torch.rand(2, 3, 8, 8), torch.rand(1, 3, 4, 4))
    with pytest.raises(InputError, match="expected"):
        back_project(torch.rand(3, 8, 8), torch.rand(3, 4, 4))
    with pytest.raises(InputError, match="4x9.*larger.*8x8"):
        back_project(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 9, 4))


def test_a_column_of_pixels_keeps_its_rows():
    low = torch.linspace(0, 1, 50).view(1, 1, 50, 1).expand(1, 3, -1, -1)
    y = F.interpolate(low, size=(100, 2), mode="bicubic").clamp(0, 1)
    assert (back_project(y, low) - y).abs().max() < 0.02
    assert (back_project(torch.full_like(y, 0.5), low) - y).abs().mean() < 0.02


def test_faint_unrest_goes_and_detail_stays(photo):
    """What make_consistent adds to plain back-projection: errors of a quarter of a grey level go, edges of ten stay."""
    low = antialias(photo, (120, 120))
    plain = back_project(F.interpolate(low, size=(240, 240), mode="bicubic").clamp(0, 1), low)
    unrest = plain + 0.25 / 255 * torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    left = [(step(unrest, low) - step(plain, low)).std() for step in (make_consistent, back_project)]
    assert left[0] < 0.6 * left[1]
    checks = (-1.0) ** (torch.arange(240)[:, None] + torch.arange(240))  # no mean of 2x2 pixels sees them
    sharp = (plain * 0.8 + 0.1)
    target = antialias(sharp, (120, 120))
    kept = make_consistent(sharp + 10 / 255 * checks, target) - make_consistent(sharp, target)
    assert float((kept * checks).mean()) > 0.9 * 10 / 255


@pytest.mark.parametrize("factor", [1.5, 2, 4])
def test_a_picture_made_consistent_gives_the_pixels_back(photo, factor):
    low = antialias(photo, (round(240 / factor), round(240 / factor)))
    faded = 0.9 * photo + 0.04
    made = make_consistent(faded, low)
    assert residual(made, low) < 0.1 * residual(faded, low)
    assert float(made.min()) >= 0 and float(made.max()) <= 1
    assert psnr(made, photo) > psnr(faded, photo)
    assert make_consistent(faded.half(), low).dtype == torch.float16
