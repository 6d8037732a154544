"""Colour correction: what each method promises, by definition and on photos."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import skimage.data
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from uplift_core.color import COLOR_METHODS, match_color
from uplift_core.errors import InputError


@pytest.fixture(scope="module")
def photos():
    """``b 3 128 128``: two crops, and what a codec might make of them: shifted colours and added grain."""
    whole = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255
    true = torch.stack([whole[:, :128, 100:228], whole[:, 200:328, 200:328]])
    grain = 0.03 * torch.randn(true.shape, generator=torch.Generator().manual_seed(0))
    tint = torch.tensor([0.08, -0.05, 0.03]).view(1, 3, 1, 1)
    return true, true * 0.9 + tint + grain


def stats(x):
    return x.mean((2, 3)), x.std((2, 3), unbiased=False)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["mean", "adain"]), st.integers(1, 3), st.integers(1, 30), st.integers(2, 30),
       st.integers(1, 12), st.integers(2, 12), st.integers(0, 999))
def test_means_are_equal_and_with_adain_the_spread_too(method, b, h, w, low_h, low_w, seed):
    g = torch.Generator().manual_seed(seed)
    x, ref = torch.rand(b, 3, h, w, generator=g), torch.rand(b, 3, low_h, low_w, generator=g)
    mean, spread = stats(match_color(x, ref, method))
    assert (mean - ref.mean((2, 3))).abs().max() < 1e-5
    if method == "adain" and stats(x)[1].min() > 1e-3:
        assert (spread - stats(ref)[1]).abs().max() < 1e-4


def test_mean_only_shifts(photos):
    true, image = photos
    shift = match_color(image, true, "mean") - image
    assert (shift - shift[:, :, :1, :1]).abs().max() < 1e-6 and shift.abs().max() > 0.01
    assert torch.equal(match_color(image, true), match_color(image, true, "mean"))


def test_none_changes_nothing(photos):
    assert torch.equal(match_color(photos[1], photos[0], "none"), photos[1])


def blurred(x, sigma):
    at = torch.arange(-3 * sigma, 3 * sigma + 1, dtype=torch.float32)
    kernel = torch.exp(-at**2 / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    b, c, h, w = x.shape
    x = F.pad(x.reshape(b * c, 1, h, w), [3 * sigma] * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel[..., None]), kernel[:, :, None])
    return x.reshape(b, c, h, w)


def test_wavelet_takes_the_coarse_and_keeps_the_fine(photos):
    true, image = photos
    low = F.interpolate(true, scale_factor=0.5, mode="area")
    fixed = match_color(image, low, "wavelet")
    before, after = (blurred(x - true, 40).abs().max() for x in (image, fixed))
    assert after < 0.2 * before
    fine = [x - blurred(x, 2) for x in (image, fixed)]
    assert (fine[0] - fine[1]).abs().max() < 0.05 * fine[0].abs().max()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 70), (200, 131)])
def test_wavelet_is_the_a_trous_transform(size):
    g = torch.Generator().manual_seed(1)
    image, reference = torch.rand(2, 3, *size, generator=g), torch.rand(2, 3, *size, generator=g)
    taps = torch.tensor([1.0, 4, 6, 4, 1]) / 16

    def bands(x):
        details = []
        for level in range(5):
            hole = 2**level
            padded = F.pad(x, [2 * hole] * 4, mode="replicate")
            kernel = torch.outer(taps, taps).expand(3, 1, 5, 5)
            smooth = F.conv2d(padded, kernel, dilation=hole, groups=3)
            details.append(x - smooth)
            x = smooth
        return details, x
    expected = sum(bands(image)[0]) + bands(reference)[1]
    assert (match_color(image, reference, "wavelet") - expected).abs().max() < 1e-5


MEMORY = """
import sys, torch
from uplift_core.color import match_color

def high():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
torch.set_num_threads(1)
match_color(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4), sys.argv[1])
image, reference = torch.rand(1, 3, 2048, 2048), torch.rand(1, 3, 1024, 1024)
before = high()
match_color(image, reference, sys.argv[1])
print((high() - before) / (4 * image.numel()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("method", ["mean", "adain", "wavelet"])
def test_a_large_picture_is_copied_a_few_times_only(method):
    done = subprocess.run([sys.executable, "-c", MEMORY, method], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 5


@pytest.mark.parametrize("method", COLOR_METHODS)
def test_what_is_given_stays_untouched(photos, method):
    image, reference = photos[1].clone(), photos[0].clone()
    match_color(image, reference, method)
    assert torch.equal(image, photos[1]) and torch.equal(reference, photos[0])


def test_wavelet_follows_a_slow_change_that_the_mean_cannot():
    ramp = torch.linspace(0, 1, 256).expand(1, 3, 256, 256)
    fixed = match_color(torch.full_like(ramp, 0.5), ramp, "wavelet")
    inner = slice(64, -64)  # away from the edges, where the filter sees the ramp's continuation as flat
    assert (fixed - ramp)[..., inner].abs().max() < 0.01


@pytest.mark.parametrize("method", COLOR_METHODS)
def test_a_matching_picture_stays_as_it_is(photos, method):
    assert (match_color(photos[0], photos[0], method) - photos[0]).abs().max() < 1e-5


@pytest.mark.parametrize("method", COLOR_METHODS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (5, 3)])
def test_flat_pictures_and_any_size_stay_finite(method, size):
    for reference in (torch.rand(1, 3, 7, 2), torch.full((1, 3, 1, 1), 0.2)):
        fixed = match_color(torch.full((1, 3, *size), 0.7), reference, method)
        assert fixed.shape == (1, 3, *size) and torch.isfinite(fixed).all()
        if method in ("mean", "adain"):
            assert (fixed - reference.mean((2, 3), keepdim=True)).abs().max() < 0.02


@pytest.mark.parametrize("method", COLOR_METHODS)
def test_one_reference_serves_a_batch_and_items_are_independent(photos, method):
    true, image = photos
    low = F.interpolate(true, scale_factor=0.25, mode="area")
    together = match_color(image, low, method)
    for i in range(2):
        assert (match_color(image[i:i + 1], low[i:i + 1], method) - together[i]).abs().max() < 1e-6
    shared = match_color(image, low[:1], method)
    assert (shared - match_color(image, low[:1].expand(2, -1, -1, -1), method)).abs().max() < 1e-6


@pytest.mark.parametrize("method", COLOR_METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_number_format_is_kept(photos, method, dtype):
    fixed = match_color(photos[1].to(dtype), photos[0], method)
    assert fixed.dtype == dtype
    assert (fixed.float() - match_color(photos[1], photos[0], method)).abs().max() < 0.02


def test_what_does_not_fit_is_refused():
    x = torch.rand(2, 3, 4, 4)
    with pytest.raises(InputError, match="'warm' is unknown.*none, mean, adain, wavelet"):
        match_color(x, x, "warm")
    with pytest.raises(InputError, match="b 3 H W"):
        match_color(x[0], x)
    with pytest.raises(InputError, match="b 3 H W"):
        match_color(x, x[:, :1])
    with pytest.raises(InputError, match="3 references"):
        match_color(x, torch.rand(3, 3, 4, 4))
