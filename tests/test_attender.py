"""The Local Attender: a convex mean of neighbours, in both its forms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from uplift_core.attender import OFFSETS, LocalAttender, pool, pool_reference, reach, replicate


@pytest.mark.parametrize("n", OFFSETS)
def test_offsets_are_n_neighbours_in_row_major_order(n):
    assert len(set(OFFSETS[n])) == n
    assert list(OFFSETS[n]) == sorted(OFFSETS[n])
    assert (0, 0) in OFFSETS[n]
    assert {(-dy, -dx) for dy, dx in OFFSETS[n]} == set(OFFSETS[n])


def test_the_seventeen():
    far = [(dy, dx) for dy, dx in OFFSETS[17] if max(abs(dy), abs(dx)) == 2]
    assert far == [(-2, -2), (-2, 0), (-2, 2), (0, -2), (0, 2), (2, -2), (2, 0), (2, 2)]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(list(OFFSETS)), st.integers(1, 11), st.integers(1, 11), st.sampled_from([1, 4, 16, 17, 40]),
       st.integers(1, 3), st.integers(1, 2))
def test_fast_form_is_the_definition(n, h, w, c, scale, b):
    torch.manual_seed(n + h)
    value = torch.randn(b, c, h, w)
    weights = torch.randn(b, n, h * scale, w * scale).softmax(1)
    fast = pool(weights, value, scale)
    assert torch.allclose(fast, pool_reference(weights, value), atol=1e-5)
    learning = pool(weights.requires_grad_(), value, scale)
    assert learning.requires_grad and torch.allclose(learning, fast, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(OFFSETS)), st.sampled_from([4, 20]), st.data())
def test_a_window_has_its_real_neighbours(n, c, data):
    """Any part of the map, from no more of the value map than it reads (or more): the same as cut from the whole."""
    torch.manual_seed(n)
    value, weights = torch.randn(1, c, 11, 9), torch.randn(1, n, 22, 18).softmax(1)
    whole, r = pool_reference(weights, value), reach(n)
    (top, bottom), (left, right) = (sorted((data.draw(st.integers(0, k - 1)), data.draw(st.integers(1, k))))
                                    for k in (11, 9))
    bottom, right, spare = max(bottom, top + 1), max(right, left + 1), data.draw(st.integers(0, 2))
    y, x = max(0, top - r - spare), max(0, left - r - spare)
    near = value[:, :, y:bottom + r + spare, x:right + r]
    part = weights[:, :, 2 * top:2 * bottom, 2 * left:2 * right]
    for learns in (False, True):
        found = pool(part.clone().requires_grad_(learns), near, 2, (top - y, left - x))
        assert torch.allclose(found, whole[:, :, 2 * top:2 * bottom, 2 * left:2 * right], atol=1e-5)
    half = pool(part.half(), near.half(), 2, (top - y, left - x))
    assert torch.allclose(half.float(), whole[:, :, 2 * top:2 * bottom, 2 * left:2 * right], atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_fast_form_in_other_number_formats(dtype):
    weights, value = torch.randn(2, 17, 12, 20).softmax(1).to(dtype), torch.randn(2, 40, 6, 10).to(dtype)
    fast = pool(weights, value, 2)
    assert fast.dtype == dtype
    exact = pool_reference(weights.double(), value.double())
    assert (fast.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(OFFSETS)), st.integers(2, 8), st.integers(2, 8))
def test_never_leaves_the_neighbours_range(n, h, w):
    torch.manual_seed(h * w)
    value, guide = torch.randn(1, 20, h, w), torch.randn(1, 32, 2 * h, 2 * w) * 5
    out = LocalAttender(32, n)(guide, value)
    r = reach(n)
    low = -F.max_pool2d(-F.pad(value, (r,) * 4, mode="replicate"), 2 * r + 1, 1)
    high = F.max_pool2d(F.pad(value, (r,) * 4, mode="replicate"), 2 * r + 1, 1)
    assert (out <= F.interpolate(high, scale_factor=2) + 1e-5).all()
    assert (out >= F.interpolate(low, scale_factor=2) - 1e-5).all()


def test_map_sums_to_one_and_follows_the_guide():
    attender = LocalAttender(32, 17)
    maps = attender.weights(torch.randn(1, 32, 6, 6))
    assert torch.allclose(maps.sum(1), torch.ones(1, 6, 6), atol=1e-6)
    guide = torch.zeros(1, 32, 6, 6)
    guide[:, 3] = 50.0
    torch.nn.init.zeros_(attender.conv1.weight)
    assert attender.weights(guide)[:, 3].min() > 0.99  # the guide's own channel is added to the logits


def test_the_reference_by_hand():
    value = torch.arange(9.0).view(1, 1, 3, 3)
    weights = torch.zeros(1, 5, 6, 6)
    weights[:, 0] = 1  # the pixel above
    out = pool_reference(weights, value)
    assert out[0, 0].tolist() == [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2],
                                  [3, 3, 4, 4, 5, 5], [3, 3, 4, 4, 5, 5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pads", [(2, 2, 2, 2), (0, 3, 1, 0)])
def test_edges_of_halves_are_repeated(dtype, pads):
    x = torch.randn(2, 3, 4, 5).to(dtype)
    assert torch.equal(replicate(x, pads).float(), F.pad(x.float(), pads, mode="replicate"))
