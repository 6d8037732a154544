"""3x3 convolutions on the CPU with a quarter of the multiplications (Winograd, F(4x4, 3x3)), in fp32.

Lavin and Gray 2016 use the interpolation points 0, +-1, +-2, inf. The points here, 0, +-3/4, +-3/2, inf, keep the
transforms as short and lose about three times less precision: over 512 channels the error is that of a plain fp32
convolution. Inference only; other devices and dtypes have their own kernels for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .kept import once

_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Form:
    """The minimal algorithm for ``outputs`` neighbouring results of three taps: polynomials at outputs + 2 points.

    filter: three taps to their values at the points; data: as many neighbouring samples to the values of their
    polynomial; back: products at the points to the outputs.
    """

    outputs: int
    filter: Tensor
    data: Tensor
    back: Tensor

    @property
    def points(self) -> int:
        return self.outputs + 2

    @classmethod
    def of(cls, points: Sequence[float]) -> Form:
        """For finite ``points``, and infinity."""
        n = len(points)
        p = np.array(points)
        others = [np.delete(p, i) for i in range(n)]
        taps = np.array([[x**j / np.prod(x - rest) for j in range(3)] for x, rest in zip(p, others)] + [[0, 0, 1]])
        data = np.array([[*np.poly(rest)[::-1], 0] for rest in others] + [np.poly(p)[::-1]])
        back = np.array([[*p**j, float(j == n - 2)] for j in range(n - 1)])
        return cls(n - 1, torch.from_numpy(taps), torch.from_numpy(data).float(), torch.from_numpy(back).float())


TILES = Form.of((0, 3 / 4, -3 / 4, 3 / 2, -3 / 2))
"""F(4x4, 3x3), for whole maps."""
AROUND = Form.of((0, 3 / 4, -3 / 4, 3 / 2))
"""F(3x3, 3x3), for a position and its eight neighbours."""


def filters(weight: Tensor, form: Form = TILES) -> Tensor:
    """:func:`transform_weight`, once within :func:`~uplift_core.kept.keep_made`."""
    return once(weight, f"F{form.outputs}", lambda: transform_weight(weight, form))


def transform_weight(weight: Tensor, form: Form = TILES) -> Tensor:
    """``o c 3 3 -> points^2 c o``: the filters in the transformed domain."""
    o, c = weight.shape[:2]
    both = torch.kron(form.filter, form.filter).to(weight.dtype)
    return (both @ weight.permute(2, 3, 1, 0).reshape(9, c * o)).view(-1, c, o)


def convolve(sources: Sequence[Tensor], transformed: Tensor, pads: tuple[int, int, int, int],
             bias: Tensor | None = None) -> Tensor:
    """Stride-1 3x3 convolution of ``b c h w`` (channels last) with zero pads (left, right, top, bottom).

    ``sources``: the input's channels in one or more tensors, which are never put together. Returns
    ``b o h+top+bottom-2 w+left+right-2``, channels last.
    """
    left, right, top, bottom = pads
    b, _, h, w = sources[0].shape
    height, width = h + top + bottom - 2, w + left + right - 2
    out = sources[0].new_empty(b, height, width, transformed.shape[2])
    side = TILES.outputs
    _run(TILES, side, sources, transformed, bias, (-top, -left), (-(-height // side), -(-width // side)), out)
    return out.permute(0, 3, 1, 2)


def convolve_around(x: Tensor, transformed: Tensor, first: tuple[int, int], count: tuple[int, int], step: int,
                    bias: Tensor | None = None) -> Tensor:
    """The 3x3 convolution of ``b c h w`` (channels last, zero outside) at every ``step``-th position and around it.

    first: row and column of the first such position in ``x``; count: how many rows and columns of them. transformed:
    :func:`filters` for AROUND. Returns ``b o 3*rows 3*columns``, channels last, three results of each axis together.
    """
    out = x.new_empty(x.shape[0], 3 * count[0], 3 * count[1], transformed.shape[2])
    _run(AROUND, step, [x], transformed, bias, (first[0] - 2, first[1] - 2), count, out)
    return out.permute(0, 3, 1, 2)


def _run(form: Form, step: int, sources: Sequence[Tensor], transformed: Tensor, bias: Tensor | None,
         begin: tuple[int, int], tiles: tuple[int, int], out: Tensor) -> None:
    """Tiles of results into ``out`` ``b h w o``: the first reads from ``begin`` on, the next ``step`` further."""
    side, (down, across), o = form.outputs, tiles, transformed.shape[2]
    rows = max(1, _CHUNK_BYTES // (form.points**2 * max(transformed.shape[1], o) * 4 * across))
    maps = [source.permute(0, 2, 3, 1) for source in sources]
    reach = form.points - step
    for i in range(out.shape[0]):
        for first in range(0, down, rows):
            k = min(rows, down - first)
            padded = [_padded(m[i], begin[0] + step * first, begin[1], step * k + reach, step * across + reach)
                      for m in maps]
            target = out[i, side * first:side * (first + k)]
            if target.shape[:2] == (side * k, side * across):
                _strip(form, step, padded, transformed, bias, target.view(k, side, across, side, o))
            else:
                strip = out.new_empty(k, side, across, side, o)
                _strip(form, step, padded, transformed, bias, strip)
                target[:] = strip.view(side * k, side * across, o)[:target.shape[0], :target.shape[1]]


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


def _strip(form: Form, step: int, padded: list[Tensor], transformed: Tensor, bias: Tensor | None,
           out: Tensor) -> None:
    """A row of tiles, or a few, into ``out`` (``rows side across side o``); all transforms are small products."""
    k, side, across, _, o = out.shape
    tiles, n = k * across, form.points
    product = out.new_empty(n * n, tiles, o)
    begin = 0
    for source in padded:
        c = source.shape[2]
        data = _values(form, step, source, k, across)
        for i in range(n):
            some, values = product[n * i:n * i + n], data[i].transpose(0, 1)
            weights = transformed[n * i:n * i + n, begin:begin + c]
            if begin:
                some.baddbmm_(values, weights)
            else:
                torch.bmm(values, weights, out=some)
        begin += c
    columns = (form.back @ product.view(n, n * tiles * o)).view(side, n, tiles * o)
    pixels = torch.bmm(form.back.expand(side, side, n), columns)
    if bias is not None:
        pixels.view(-1, o).add_(bias)
    out[:] = pixels.view(side, side, k, across, o).permute(2, 0, 3, 1, 4)


def _values(form: Form, step: int, padded: Tensor, k: int, across: int) -> Tensor:
    """``n tiles n c``: the values at the n points, of both axes, for k rows of tiles."""
    n, (width, c) = form.points, padded.shape[1:]
    data = padded.new_empty(n, k * across, n, c)
    each_tile = form.data.expand(across, n, n)
    for r in range(k):
        rows = form.data @ padded[step * r:step * r + n].reshape(n, width * c)
        windows = rows.as_strided((n, across, n, c), (width * c, step * c, c, 1))
        for i in range(n):
            torch.bmm(each_tile, windows[i], out=data[i, r * across:(r + 1) * across])
    return data
