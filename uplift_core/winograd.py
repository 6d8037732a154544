"""3x3 convolutions on the CPU with a quarter of the multiplications (Winograd, F(4x4, 3x3)), in fp32.

Lavin and Gray 2016 use the interpolation points 0, +-1, +-2, inf. The points here, 0, +-3/4, +-3/2, inf, keep the
transforms as short and lose about three times less precision: over 512 channels the error is that of a plain fp32
convolution. Inference only; other devices and dtypes have their own kernels for this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

TILE = 4
_A, _B = 3 / 4, 3 / 2
_AA, _BB = _A * _A, _B * _B
_CHUNK_BYTES = 8 << 20

_POINTS = [0.0, _A, -_A, _B, -_B]
_NORMS = [_AA * _BB] + [2 * _AA * (_AA - _BB)] * 2 + [2 * _BB * (_BB - _AA)] * 2
_G = torch.tensor([[1 / n, p / n, p * p / n] for p, n in zip(_POINTS, _NORMS, strict=True)] + [[0.0, 0.0, 1.0]],
                  dtype=torch.float64)


_kept: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("kept", default=None)


@contextmanager
def keep_filters() -> Iterator[None]:
    """Within this block a convolution's filters are transformed once, however often it runs."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def filters(weight: Tensor) -> Tensor:
    """:func:`transform_weight`, or what a surrounding :func:`keep_filters` has of it."""
    kept = _kept.get()
    if kept is None:
        return transform_weight(weight)
    if id(weight) not in kept:
        kept[id(weight)] = (weight, transform_weight(weight))  # holding the weight keeps its id unique
    return kept[id(weight)][1]


def transform_weight(weight: Tensor) -> Tensor:
    """``o c 3 3 -> 36 o c``: the filters in the transformed domain."""
    o, c = weight.shape[:2]
    both = torch.kron(_G, _G).to(weight.dtype)
    return (both @ weight.reshape(o * c, 9).t()).view(36, o, c)


def convolve(x: Tensor, transformed: Tensor, pads: tuple[int, int, int, int], bias: Tensor | None = None) -> Tensor:
    """Stride-1 3x3 convolution of ``b c h w`` (channels last) with zero pads (left, right, top, bottom).

    Returns ``b o h+top+bottom-2 w+left+right-2``, channels last.
    """
    left, right, top, bottom = pads
    b, c, h, w = x.shape
    o = transformed.shape[1]
    height, width = h + top + bottom - 2, w + left + right - 2
    down, across = -(-height // TILE), -(-width // TILE)
    rows = max(1, _CHUNK_BYTES // (36 * max(c, o) * 4 * across))
    source = x.permute(0, 2, 3, 1)
    out = x.new_empty(b, height, width, o)
    for i in range(b):
        for first in range(0, down, rows):
            k = min(rows, down - first)
            padded = _padded(source[i], TILE * first - top, -left, TILE * k + 2, TILE * across + 2)
            target = out[i, TILE * first:TILE * (first + k)]
            if target.shape[:2] == (TILE * k, TILE * across):
                _strip(padded, transformed, target.view(k, TILE, across, TILE, o))
            else:
                strip = x.new_empty(k, TILE, across, TILE, o)
                _strip(padded, transformed, strip)
                target[:] = strip.view(TILE * k, TILE * across, o)[:target.shape[0], :width]
    if bias is not None:
        out += bias
    return out.permute(0, 3, 1, 2)


def _padded(source: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """The window of ``h w c`` that begins at (top, left), zeros where it leaves the source."""
    h, w, c = source.shape
    if top >= 0 and left >= 0 and top + height <= h and left + width <= w:
        return source[top:top + height, left:left + width]
    padded = source.new_zeros(height, width, c)
    y0, y1, x0, x1 = max(top, 0), min(top + height, h), max(left, 0), min(left + width, w)
    padded[y0 - top:y1 - top, x0 - left:x1 - left] = source[y0:y1, x0:x1]
    return padded


def _strip(padded: Tensor, transformed: Tensor, out: Tensor) -> None:
    """One row of tiles, or a few, into ``out`` (``rows 4 across 4 o``)."""
    o, c = transformed.shape[1:]
    k, across = out.shape[0], out.shape[2]
    rows = padded.new_empty(6, k, padded.shape[1], c)
    _into([padded[i:i + TILE * k - 3:TILE] for i in range(6)], list(rows))
    data = padded.new_empty(6, 6, k, across, c)
    _into([rows[:, :, i:i + TILE * across - 3:TILE] for i in range(6)], [data[:, i] for i in range(6)])
    flat = data.view(36, k * across, c)
    product = padded.new_empty(36, k * across, o)
    for i in range(36):
        torch.mm(flat[i], transformed[i].t(), out=product[i])
    product = product.view(6, 6, k, across, o)
    columns = padded.new_empty(TILE, 6, k, across, o)
    _back([product[:, i] for i in range(6)], list(columns))
    for j in range(TILE):
        _back(list(columns[j]), [out[:, i, :, j] for i in range(TILE)])


def _into(d: list[Tensor], out: list[Tensor]) -> None:
    """Six samples to the values of their polynomial filters at the six points, into ``out``."""
    torch.add(d[4], d[2], alpha=-(_AA + _BB), out=out[0]).add_(d[0], alpha=_AA * _BB)
    even, odd = torch.add(d[4], d[2], alpha=-_BB), torch.add(d[3], d[1], alpha=-_BB)
    torch.add(even, odd, alpha=_A, out=out[1])
    torch.add(even, odd, alpha=-_A, out=out[2])
    torch.add(d[4], d[2], alpha=-_AA, out=even)
    torch.add(d[3], d[1], alpha=-_AA, out=odd)
    torch.add(even, odd, alpha=_B, out=out[3])
    torch.add(even, odd, alpha=-_B, out=out[4])
    torch.add(d[5], d[3], alpha=-(_AA + _BB), out=out[5]).add_(d[1], alpha=_AA * _BB)


def _back(m: list[Tensor], out: list[Tensor]) -> None:
    """Products at the six points to four neighbouring outputs, into ``out``."""
    sum_a, dif_a, sum_b, dif_b = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    torch.add(m[0], sum_a, out=out[0]).add_(sum_b)
    torch.add(dif_a.mul_(_A), dif_b, alpha=_B, out=out[1])
    torch.add(sum_a.mul_(_AA), sum_b, alpha=_BB, out=out[2])
    torch.add(dif_a.mul_(_AA), dif_b, alpha=_B * _BB, out=out[3]).add_(m[5])
