"""Any window of a resized map is that window of torch's own resize of the whole."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from golden_cases import difference
from uplift_core.resample import Span, antialias, reads, sample


def torchs(x, mode, size):
    if size[1] == 1 < size[0]:  # here torch's antialiased resize repeats the first row
        return torchs(x.transpose(2, 3), mode, (1, size[0])).transpose(2, 3)
    if mode == "nearest":
        return F.interpolate(x, size=size, mode="nearest")
    if mode == "corners":
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    return F.interpolate(x, size=size, mode="bilinear", antialias=True)


@st.composite
def windows(draw):
    sizes = [draw(st.integers(1, 40)) for _ in range(4)]
    spans = []
    for n in sizes[2:]:
        lo = draw(st.integers(0, n - 1))
        spans.append(Span(lo, draw(st.integers(lo + 1, n)), n))
    return sizes[:2], spans


@settings(max_examples=150, deadline=None)
@given(windows(), st.sampled_from(["nearest", "corners", "antialias"]))
def test_a_window_is_cut_from_the_whole(case, mode):
    (h, w), (y, x) = case
    whole = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(h * w))
    y_in, x_in = reads(mode, y, h), reads(mode, x, w)
    held = whole[:, :, y_in.lo:y_in.hi, x_in.lo:x_in.hi]  # no more than it says it reads
    expected = torchs(whole, mode, (y.size, x.size))[:, :, y.lo:y.hi, x.lo:x.hi]
    assert (sample(held, mode, y_in, x_in, y, x) - expected).abs().max() < 1e-5


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_nearest_rounds_as_torch(n, out):
    row = torch.arange(n, dtype=torch.float32).view(1, 1, 1, n)
    one, span = Span.all(1), Span.all(out)
    assert torch.equal(sample(row, "nearest", one, Span.all(n), one, span), F.interpolate(row, size=(1, out)))


@settings(max_examples=60, deadline=None)
@given(windows(), st.sampled_from(["nearest", "corners", "antialias"]))
def test_what_is_said_to_be_read_is_needed(case, mode):
    """Changing what lies outside changes nothing; the ends of the part are really looked at."""
    (h, w), (y, _) = case
    assume(h > 1)
    column = torch.rand(1, 1, h, 1, generator=torch.Generator().manual_seed(h + w)).double()
    part = reads(mode, y, h)
    other = torch.full_like(column, 9.0)
    other[:, :, part.lo:part.hi] = column[:, :, part.lo:part.hi]
    same = [torchs(c, mode, (y.size, 1))[:, :, y.lo:y.hi] for c in (column, other)]
    assert torch.allclose(*same, atol=1e-6)


def test_a_picture_one_pixel_wide_keeps_its_rows():
    low = torch.linspace(0, 1, 9).view(1, 1, 9, 1)
    for rows, wide in ((27, 1), (4, 1), (27, 2), (4, 2)):
        out = antialias(low.repeat(1, 1, 1, wide), (rows, 1)).flatten()
        assert (out.diff() > 0).all() or rows > 9 and (out.diff() >= 0).all() and out.unique().numel() > 9
        assert torch.allclose(antialias(low.transpose(2, 3), (1, rows)).flatten(), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_resizes_on_a_cpu(dtype):
    x = torch.rand(1, 2, 9, 13)
    out = antialias(x.to(dtype), (5, 20))
    assert out.dtype == dtype and difference(out.float(), antialias(x, (5, 20))) < 0.05
