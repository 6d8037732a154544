"""Resampling by global coordinates: any window of a resized map, computed from a window of the source.

Both axes are independent, so everything here is about one axis. ``Span`` says which part of an axis a tensor holds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Span(NamedTuple):
    """The part ``lo <= i < hi`` of an axis of ``size`` positions."""

    lo: int
    hi: int
    size: int

    @classmethod
    def all(cls, size: int) -> Span:
        return cls(0, size, size)

    @property
    def length(self) -> int:
        return self.hi - self.lo

    @property
    def whole(self) -> bool:
        return self.lo == 0 and self.hi == self.size

    def grow(self, n: int) -> Span:
        """n more positions on each side, as far as the axis goes."""
        return Span(max(0, self.lo - n), min(self.size, self.hi + n), self.size)

    def union(self, other: Span) -> Span:
        return Span(min(self.lo, other.lo), max(self.hi, other.hi), self.size)

    def within(self, outer: Span) -> slice:
        """Where this span lies in a tensor that holds ``outer``."""
        return slice(self.lo - outer.lo, self.hi - outer.lo)


def nearest_indices(out: Span, size: int) -> np.ndarray:
    """Source positions that plain nearest sampling from ``size`` to ``out.size`` picks: floor(i * in / out).

    Rounds like torch (one single-precision product), which matters where the ratio is not a whole number.
    """
    scale = np.float32(size) / np.float32(out.size)
    picked = np.floor(np.arange(out.lo, out.hi, dtype=np.float32) * scale).astype(np.int64)
    return np.minimum(picked, size - 1)


@lru_cache(maxsize=256)
def bilinear_taps(mode: str, out: Span, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The source positions that each of ``out`` reads, and their shares, which sum to 1: both ``out.length x taps``.

    mode ``antialias``: triangle filter widened by the shrink factor, as torch's antialiased bilinear resize;
    ``corners``: bilinear with align_corners=True, which depends on the whole length of both axes.
    """
    if mode == "corners":
        ends, shares = _neighbours(out, size)
        return ends, shares.astype(np.float32)
    i = np.arange(out.lo, out.hi, dtype=np.float64)
    scale = size / out.size
    support = max(scale, 1.0)
    centre = (i + 0.5) * scale
    lo = np.maximum(np.floor(centre - support + 0.5), 0).astype(np.int64)
    hi = np.minimum(np.floor(centre + support + 0.5), size).astype(np.int64)
    j = lo[:, None] + np.arange((hi - lo).max())
    distance = np.abs((j + 0.5 - centre[:, None]) / support)
    shares = np.where(j < hi[:, None], np.maximum(0.0, 1.0 - distance), 0.0)
    return np.minimum(j, hi[:, None] - 1), (shares / shares.sum(1, keepdims=True)).astype(np.float32)


def _neighbours(out: Span, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The two source positions between which each of ``out`` lies (corners on corners), and their shares: ``n 2``."""
    i = np.arange(out.lo, out.hi, dtype=np.float64)
    centre = i * ((size - 1) / (out.size - 1)) if out.size > 1 else i * 0.0
    first = np.clip(np.floor(centre).astype(np.int64), 0, size - 1)
    return np.stack([first, np.minimum(first + 1, size - 1)], 1), np.stack([1 - (centre - first), centre - first], 1)


def reads(mode: str, out: Span, size: int) -> Span:
    """Which part of a source axis of ``size`` is read to produce ``out``. Modes: nearest, antialias, corners."""
    if mode == "nearest":
        ends = nearest_indices(Span(out.lo, out.lo + 1, out.size), size), nearest_indices(
            Span(out.hi - 1, out.hi, out.size), size)
        return Span(int(ends[0][0]), int(ends[1][0]) + 1, size)
    taps = bilinear_taps(mode, out, size)[0]
    return Span(int(taps.min()), int(taps.max()) + 1, size)


def sample(x: Tensor, mode: str, y_in: Span, x_in: Span, y: Span, x_out: Span) -> Tensor:
    """Resize a window: ``x`` holds (y_in, x_in) of the source, the result (y, x_out) of the resized map."""
    if mode == "nearest":
        return _pick(_pick(x, 2, y_in, y), 3, x_in, x_out)
    if mode == "corners" and x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad:
        return _corners(x, y_in, x_in, y, x_out)
    if y_in.whole and x_in.whole and y.whole and x_out.whole:
        size = (y.size, x_out.size)
        if mode == "corners":
            return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        return antialias(x, size)
    return _blend(_blend(x, 2, mode, y_in, y), 3, mode, x_in, x_out)


def antialias(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize of ``b c h w`` to ``size``."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if size[1] == 1 < size[0]:  # torch repeats the first row where the result is one wide
        return antialias(x.transpose(2, 3), (1, size[0])).transpose(2, 3)
    if x.dtype == torch.bfloat16 or x.device.type == "cpu" and x.dtype == torch.float16:  # no such kernel everywhere
        return antialias(x.float(), size).to(x.dtype)
    if x.device.type in ("mps", "xpu"):  # some versions of torch have no such kernel there
        try:
            return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        except NotImplementedError:
            return antialias(x.cpu().float(), size).to(x)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def _pick(x: Tensor, dim: int, held: Span, out: Span) -> Tensor:
    index = nearest_indices(out, held.size) - held.lo
    steps = np.diff(index)
    if len(index) == 1 or (steps == steps[0]).all() and steps[0] > 0:
        step = int(steps[0]) if len(steps) else 1
        return x[(slice(None),) * dim + (slice(int(index[0]), int(index[-1]) + 1, step),)]
    return x.index_select(dim, torch.from_numpy(index).to(x.device))


def _corners(x: Tensor, y_in: Span, x_in: Span, y: Span, x_out: Span) -> Tensor:
    """Bilinear with corners on corners, on the CPU: every pixel a bag of four of the source's, in one pass."""
    (rows, down), (columns, across) = _neighbours(y, y_in.size), _neighbours(x_out, x_in.size)
    b, c, h, w = x.shape
    entries = ((rows - y_in.lo)[:, None, :, None] * w + (columns - x_in.lo)[None, :, None, :]).reshape(-1, 4)
    entries = (np.arange(b)[:, None, None] * (h * w) + entries).reshape(-1, 4)
    shares = (down[:, None, :, None] * across[None, :, None, :]).astype(np.float32).reshape(-1, 4)
    sums = F.embedding_bag(torch.from_numpy(entries), x.permute(0, 2, 3, 1).reshape(-1, c), mode="sum",
                           per_sample_weights=torch.from_numpy(shares).repeat(b, 1))
    return sums.view(b, y.length, x_out.length, c).permute(0, 3, 1, 2)


def _blend(x: Tensor, dim: int, mode: str, held: Span, out: Span) -> Tensor:
    """One axis of a window, tap by tap; sums in fp32 at least, laid out with channels last."""
    taps, shares = bilinear_taps(mode, out, held.size)
    flat = x.permute(0, 2, 3, 1)
    exact = torch.promote_types(x.dtype, torch.float32)
    total: Tensor | None = None
    for k in range(taps.shape[1]):
        rows = flat.index_select(dim - 1, torch.from_numpy(taps[:, k] - held.lo).to(x.device)).to(exact)
        share = torch.from_numpy(shares[:, k]).to(x.device, exact).view((-1, 1, 1) if dim == 2 else (-1, 1))
        total = rows.mul_(share) if total is None else total.addcmul_(rows, share)
    assert total is not None
    return total.to(x.dtype).permute(0, 3, 1, 2)
