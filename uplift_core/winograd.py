"""3x3 convolutions on the CPU with a quarter of the multiplications (Winograd, F(4x4, 3x3)), in fp32.

Lavin and Gray 2016 use the interpolation points 0, +-1, +-2, inf. The points here, 0, +-3/4, +-3/2, inf, keep the
transforms as short and lose about three times less precision: over 512 channels the error is that of a plain fp32
convolution. Inference only; other devices and dtypes have their own kernels for this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

TILE = 4
_A, _B = 3 / 4, 3 / 2
_AA, _BB = _A * _A, _B * _B
_CHUNK_BYTES = 8 << 20

_POINTS = (0.0, _A, -_A, _B, -_B)
_NORMS = (_AA * _BB, *[2 * _AA * (_AA - _BB)] * 2, *[2 * _BB * (_BB - _AA)] * 2)
_FILTER = torch.tensor([[1 / n, p / n, p * p / n] for p, n in zip(_POINTS, _NORMS)] + [[0.0, 0.0, 1.0]],
                       dtype=torch.float64)
"""Three taps to their values at the six points."""
_DATA = torch.tensor([[_AA * _BB, 0, -(_AA + _BB), 0, 1, 0],
                      [0, -_A * _BB, -_BB, _A, 1, 0], [0, _A * _BB, -_BB, -_A, 1, 0],
                      [0, -_B * _AA, -_AA, _B, 1, 0], [0, _B * _AA, -_AA, -_B, 1, 0],
                      [0, _AA * _BB, 0, -(_AA + _BB), 0, 1]])
"""Six neighbouring samples to the values of their polynomial at the six points."""
_BACK = torch.tensor([[1.0, 1, 1, 1, 1, 0], [0, _A, -_A, _B, -_B, 0], [0, _AA, _AA, _BB, _BB, 0],
                      [0, _A * _AA, -_A * _AA, _B * _BB, -_B * _BB, 1]])
"""Products at the six points to four neighbouring outputs."""

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
    """``o c 3 3 -> 36 c o``: the filters in the transformed domain."""
    o, c = weight.shape[:2]
    both = torch.kron(_FILTER, _FILTER).to(weight.dtype)
    return (both @ weight.permute(2, 3, 1, 0).reshape(9, c * o)).view(36, c, o)


def convolve(sources: Sequence[Tensor], transformed: Tensor, pads: tuple[int, int, int, int],
             bias: Tensor | None = None) -> Tensor:
    """Stride-1 3x3 convolution of ``b c h w`` (channels last) with zero pads (left, right, top, bottom).

    ``sources``: the input's channels in one or more tensors, which are never put together. Returns
    ``b o h+top+bottom-2 w+left+right-2``, channels last.
    """
    left, right, top, bottom = pads
    b, _, h, w = sources[0].shape
    x, (_, c, o) = sources[0], transformed.shape
    height, width = h + top + bottom - 2, w + left + right - 2
    down, across = -(-height // TILE), -(-width // TILE)
    rows = max(1, _CHUNK_BYTES // (36 * max(c, o) * 4 * across))
    maps = [source.permute(0, 2, 3, 1) for source in sources]
    out = x.new_empty(b, height, width, o)
    for i in range(b):
        for first in range(0, down, rows):
            k = min(rows, down - first)
            padded = [_padded(m[i], TILE * first - top, -left, TILE * k + 2, TILE * across + 2) for m in maps]
            target = out[i, TILE * first:TILE * (first + k)]
            if target.shape[:2] == (TILE * k, TILE * across):
                _strip(padded, transformed, bias, target.view(k, TILE, across, TILE, o))
            else:
                strip = x.new_empty(k, TILE, across, TILE, o)
                _strip(padded, transformed, bias, strip)
                target[:] = strip.view(TILE * k, TILE * across, o)[:target.shape[0], :width]
    return out.permute(0, 3, 1, 2)


def _padded(source: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """The window of ``h w c`` that begins at (top, left), zeros where it leaves the source."""
    h, w, c = source.shape
    if top >= 0 and left >= 0 and top + height <= h and left + width <= w:
        return source[top:top + height, left:left + width]
    padded = source.new_empty(height, width, c)
    y0, y1, x0, x1 = max(top, 0), min(top + height, h), max(left, 0), min(left + width, w)
    inside = padded[y0 - top:y1 - top]
    inside[:, x0 - left:x1 - left] = source[y0:y1, x0:x1]
    for border in (padded[:y0 - top], padded[y1 - top:], inside[:, :x0 - left], inside[:, x1 - left:]):
        border.zero_()
    return padded


def _strip(padded: list[Tensor], transformed: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """A row of tiles, or a few, into ``out`` (``rows 4 across 4 o``). All transforms are small matrix products."""
    k, _, across, _, o = out.shape
    tiles = k * across
    product = out.new_empty(36, tiles, o)
    begin = 0
    for source in padded:
        c = source.shape[2]
        data = _values(source, k, across)
        for i in range(6):
            some, values = product[6 * i:6 * i + 6], data[i].transpose(0, 1)
            weights = transformed[6 * i:6 * i + 6, begin:begin + c]
            if begin:
                some.baddbmm_(values, weights)
            else:
                torch.bmm(values, weights, out=some)
        begin += c
    columns = (_BACK @ product.view(6, 6 * tiles * o)).view(4, 6, tiles * o)
    pixels = torch.bmm(_BACK.expand(4, 4, 6), columns)
    if bias is not None:
        pixels.view(-1, o).add_(bias)
    out[:] = pixels.view(4, 4, k, across, o).permute(2, 0, 3, 1, 4)


def _values(padded: Tensor, k: int, across: int) -> Tensor:
    """``6 tiles 6 c``: the values at the six points, of both axes, for k rows of tiles."""
    width, c = padded.shape[1:]
    data = padded.new_empty(6, k * across, 6, c)
    each_tile = _DATA.expand(across, 6, 6)
    for r in range(k):
        rows = _DATA @ padded[TILE * r:TILE * r + 6].reshape(6, width * c)
        windows = rows.as_strided((6, across, 6, c), (width * c, TILE * c, c, 1))
        for i in range(6):
            torch.bmm(each_tile, windows[i], out=data[i, r * across:(r + 1) * across])
    return data
