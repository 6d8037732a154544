"""3x3 convolutions on the CPU with a quarter of the multiplications or fewer (Winograd), in fp32.

Lavin and Gray 2016 use the interpolation points 0, +-1, +-2, inf for F(4x4, 3x3). The points here, 0, +-3/4, +-3/2,
inf, keep the transforms as short and lose about three times less precision: over 512 channels the error is that of a
plain fp32 convolution. Inference only; other devices and dtypes have their own kernels for this.
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
LARGE = Form.of((0, 0.55, -0.55, 1, -1, 1.75, -1.75))
"""F(6x6, 3x3), for whole maps: a fifth fewer products and values, five times less precise."""
AROUND = Form.of((0, 3 / 4, -3 / 4, 3 / 2))
"""F(3x3, 3x3), for a position and its eight neighbours."""


def form_for(height: int, width: int, exact: bool) -> Form:
    """TILES, or LARGE where that has fewer products for so many results, unless it shall be ``exact``."""
    def products(form: Form) -> int:
        return form.points**2 * -(-height // form.outputs) * -(-width // form.outputs)
    return LARGE if not exact and products(LARGE) < products(TILES) else TILES


def filters(weight: Tensor, form: Form = TILES) -> Tensor:
    """:func:`transform_weight`, once within :func:`~uplift_core.kept.keep_made`."""
    return once(weight, f"F{form.outputs}", lambda: transform_weight(weight, form))


def transform_weight(weight: Tensor, form: Form = TILES) -> Tensor:
    """``o c 3 3 -> points^2 c o``: the filters in the transformed domain."""
    o, c = weight.shape[:2]
    both = torch.kron(form.filter, form.filter).to(weight.dtype)
    return (both @ weight.permute(2, 3, 1, 0).reshape(9, c * o)).view(-1, c, o)


def convolve(sources: Sequence[Tensor], transformed: Tensor, pads: tuple[int, int, int, int],
             bias: Tensor | None = None, form: Form = TILES) -> Tensor:
    """Stride-1 3x3 convolution of ``b c h w`` (channels last) with zero pads (left, right, top, bottom).

    ``sources``: the input's channels in one or more tensors, which are never put together; ``transformed``:
    :func:`filters` for ``form``. Returns ``b o h+top+bottom-2 w+left+right-2``, channels last.
    """
    left, right, top, bottom = pads
    b, _, h, w = sources[0].shape
    out = sources[0].new_empty(b, h + top + bottom - 2, w + left + right - 2, transformed.shape[2])
    _run(form, form.outputs, sources, transformed, bias, (-top, -left), out)
    return out.permute(0, 3, 1, 2)


def convolve_around(x: Tensor, transformed: Tensor, first: tuple[int, int], count: tuple[int, int], step: int,
                    bias: Tensor | None = None) -> Tensor:
    """The 3x3 convolution of ``b c h w`` (channels last, zero outside) at every ``step``-th position and around it.

    first: row and column of the first such position in ``x``; count: how many rows and columns of them. transformed:
    :func:`filters` for AROUND. Returns ``b o 3*rows 3*columns``, channels last, three results of each axis together.
    """
    out = x.new_empty(x.shape[0], 3 * count[0], 3 * count[1], transformed.shape[2])
    _run(AROUND, step, [x], transformed, bias, (first[0] - 2, first[1] - 2), out)
    return out.permute(0, 3, 1, 2)


def _run(form: Form, step: int, sources: Sequence[Tensor], transformed: Tensor, bias: Tensor | None,
         begin: tuple[int, int], out: Tensor) -> None:
    """Tiles of results into ``out`` ``b h w o``: the first reads from ``begin`` on, the next ``step`` further."""
    side, points, o = form.outputs, form.points, transformed.shape[2]
    down, across = -(-out.shape[1] // side), -(-out.shape[2] // side)
    # One more tile than a row has: its windows reach into the next row's, and so all of a strip are one row of windows.
    wide = across + -(-(points - step) // step)
    most = max(o, *(source.shape[1] for source in sources))
    rows = max(1, _CHUNK_BYTES // (points**2 * most * 4 * wide))
    maps = [source.permute(0, 2, 3, 1) for source in sources]
    for i in range(out.shape[0]):
        for first in range(0, down, rows):
            k = min(rows, down - first)
            product = out.new_empty(points**2, k * wide, o)
            channel = 0
            for m in maps:
                values = _values(form, step, m[i], (begin[0] + step * first, begin[1]), k, wide)
                weights = transformed[:, channel:channel + m.shape[3]]
                for j in range(0, points**2, points):
                    some, value = product[j:j + points], values[j // points].transpose(0, 1)
                    if channel:
                        some.baddbmm_(value, weights[j:j + points])
                    else:
                        torch.bmm(value, weights[j:j + points], out=some)
                channel += m.shape[3]
            _results(form, product, bias, k, out[i, side * first:side * (first + k)])


def _values(form: Form, step: int, source: Tensor, begin: tuple[int, int], k: int, wide: int) -> Tensor:
    """``points tiles points c``: the values at the points, of both axes, for k rows of ``wide`` tiles of ``h w c``."""
    n, (h, w, c) = form.points, source.shape
    (y, x), width = begin, wide * step
    left, right = min(max(0, -x), width), min(width, w - x)  # where in the window the source is
    flat = source.new_empty(n * k * width * c + max(0, n - step) * c)
    rows = flat[:n * k * width * c].view(n, k, width, c)
    rows[:, :, :left] = 0
    rows[:, :, max(left, right):] = 0
    if right > left:
        columns = source[:, max(x, 0):x + right]
        for r in range(k):
            top = y + step * r
            lo, hi = min(max(0, -top), n), max(0, min(n, h - top))  # rows outside are zeros: nothing to add
            target = rows[:, r, left:right].flatten(1)
            if hi > lo:
                torch.mm(form.data[:, lo:hi], columns[top + lo:top + hi].flatten(1), out=target)
            else:
                target.zero_()
    data = source.new_empty(n * k * wide, n, c)
    windows = flat.as_strided(data.shape, (step * c, c, 1))
    torch.bmm(form.data.expand(data.shape[0], n, n), windows, out=data)
    return data.view(n, k * wide, n, c)


def _results(form: Form, product: Tensor, bias: Tensor | None, k: int, out: Tensor) -> None:
    """``points^2 tiles o``, for k rows of tiles, back to pixels: into ``h w o``, which may end within a tile."""
    (_, width, o), side, n = out.shape, form.outputs, form.points
    columns = (form.back @ product.view(n, -1)).view(side, n, -1)
    pixels = torch.bmm(form.back.expand(side, side, n), columns)
    if bias is not None:
        pixels.view(-1, o).add_(bias)
    pixels = pixels.view(side, side, k, -1, o)
    whole, rest = divmod(width, side)
    for r in range(k):
        target = out[side * r:side * r + side]
        some = pixels[:target.shape[0], :, r].transpose(1, 2)
        target[:, :side * whole].unflatten(1, (whole, side)).copy_(some[:, :whole])
        if rest:
            target[:, side * whole:] = some[:, whole, :rest]
