"""3x3 convolutions on the CPU with a quarter of the multiplications or fewer (Winograd), in fp32.

Lavin and Gray 2016 use the interpolation points 0, +-1, +-2, inf for F(4x4, 3x3). The points here, 0, +-3/4, +-3/2,
inf, keep the transforms as short and lose about three times less precision: over 512 channels the error is that of a
plain fp32 convolution. Inference only; other devices and dtypes have their own kernels for this.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kept import once

_TILES = 96
"""Worked through at a time: what is made of them stays in the processor's cache, but the filters are read anew."""
_PART_BYTES = 1 << 20
"""Of their values, made at a time."""


@dataclass(frozen=True, eq=False)
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
             bias: Tensor | None = None, form: Form = TILES, relu: bool = False) -> Tensor:
    """Stride-1 3x3 convolution of ``b c h w`` (channels last) with zero pads (left, right, top, bottom).

    ``sources``: the input's channels in one or more tensors, which are never put together; ``transformed``:
    :func:`filters` for ``form``; relu: negative results become zero. Returns ``b o h+top+bottom-2 w+left+right-2``,
    channels last.
    """
    left, right, top, bottom = pads
    b, _, h, w = sources[0].shape
    out = sources[0].new_empty(b, h + top + bottom - 2, w + left + right - 2, transformed.shape[2])
    _run(form, form.outputs, sources, transformed, bias, relu, (-top, -left), out)
    return out.permute(0, 3, 1, 2)


def convolve_around(x: Tensor, transformed: Tensor, first: tuple[int, int], count: tuple[int, int], step: int,
                    bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """The 3x3 convolution of ``b c h w`` (channels last, zero outside) at every ``step``-th position and around it.

    first: row and column of the first such position in ``x``; count: how many rows and columns of them. transformed:
    :func:`filters` for AROUND. Returns ``b o 3*rows 3*columns``, channels last, three results of each axis together.
    """
    out = x.new_empty(x.shape[0], 3 * count[0], 3 * count[1], transformed.shape[2])
    _run(AROUND, step, [x], transformed, bias, relu, (first[0] - 2, first[1] - 2), out)
    return out.permute(0, 3, 1, 2)


def _run(form: Form, step: int, sources: Sequence[Tensor], transformed: Tensor, bias: Tensor | None, relu: bool,
         begin: tuple[int, int], out: Tensor) -> None:
    """Tiles of results into ``out`` ``b h w o``: the first reads from ``begin`` on, the next ``step`` further.

    Not all at a time, and of some only the values at a few points of the vertical axis."""
    side, points, o = form.outputs, form.points, transformed.shape[2]
    down, across = -(-out.shape[1] // side), -(-out.shape[2] // side)
    rows, columns = max(1, _TILES // across), -(-across // -(-across // _TILES))
    maps = [_whole_pixels(source.permute(0, 2, 3, 1)) for source in sources]
    for i in range(out.shape[0]):
        for y in range(0, down, rows):
            for x in range(0, across, columns):
                k, m = min(rows, down - y), min(columns, across - x)
                product = out.new_empty(points**2, k * m, o)
                channel = 0
                for data in maps:
                    weights = transformed[:, channel:channel + data.shape[3]]
                    at = 0
                    for values in _values(form, step, data[i], (begin[0] + step * y, begin[1] + step * x), k, m):
                        part = slice(at, at := at + len(values))
                        if channel:
                            product[part].baddbmm_(values, weights[part])
                        else:
                            torch.bmm(values, weights[part], out=product[part])
                    channel += data.shape[3]
                _results(form, product, bias, relu, (k, m), out[i, side * y:side * (y + k), side * x:side * (x + m)])


def _whole_pixels(x: Tensor) -> Tensor:
    """``b h w c`` whose pixels lie whole and whole pixels apart, as rows of a table."""
    c = x.shape[3]
    return x.contiguous() if x.stride(3) != 1 or x.stride(2) % c or x.stride(1) % c else x


def _values(form: Form, step: int, source: Tensor, begin: tuple[int, int], k: int, m: int) -> Iterator[Tensor]:
    """``points^2 tiles c``, part by part: the values at the points, of k rows of m tiles of ``h w c``."""
    c = source.shape[2]
    y, x = (_Axis.of(at, step, number, form.points, size)
            for at, number, size in zip(begin, (k, m), source.shape[:2], strict=True))
    down, across = source.stride(0) // c, source.stride(1) // c
    table = source[y.first, x.first].as_strided(((y.length - 1) * down + (x.length - 1) * across + 1, c), (c, 1))
    together = max(1, _PART_BYTES // (form.points * k * m * c * 4))
    for vertical, horizontal in _value_bags(form, y._replace(first=0), x._replace(first=0), (down, across), together):
        yield _sums(horizontal, _sums(vertical, table)).view(-1, k * m, c)


def _results(form: Form, product: Tensor, bias: Tensor | None, relu: bool, tiles: tuple[int, int],
             out: Tensor) -> None:
    """``points^2 tiles o`` back to pixels: into ``h w o``, which may end within a tile."""
    vertical, horizontal = _result_bags(form, tiles, (out.shape[0], out.shape[1]))
    pixels = _sums(horizontal, _sums(vertical, product.flatten(0, 1)))
    if bias is not None:
        pixels.add_(bias)
    if relu:
        torch.clamp_min(pixels.view(out.shape), 0, out=out)
    else:
        out.copy_(pixels.view(out.shape))


class _Axis(NamedTuple):
    """``number`` windows of an axis, each ``step`` after the one before. ``first`` and ``length``: what they read of
    the source; the first window begins at ``begin`` in it, before zero where it reaches over the border."""

    first: int
    begin: int
    step: int
    number: int
    length: int

    @classmethod
    def of(cls, begin: int, step: int, number: int, points: int, size: int) -> _Axis:
        first = max(0, begin)
        return cls(first, begin - first, step, number, min(size, begin + step * (number - 1) + points) - first)

    def windows(self, points: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions ``number points`` within what is read, and whether they are."""
        at = self.begin + self.step * np.arange(self.number)[:, None] + np.arange(points)
        inside = (at >= 0) & (at < self.length)
        return np.where(inside, at, 0), inside


class _Bags(NamedTuple):
    """Sums of a table's rows: ``shares[i] * table[entries[i]]``, each sum from its offset to the next."""

    entries: Tensor
    offsets: Tensor
    shares: Tensor

    @classmethod
    def of(cls, entries: np.ndarray, shares: np.ndarray) -> _Bags:
        """Of ``... terms``, broadcast; terms without a share are left out."""
        shape = np.broadcast_shapes(entries.shape, shares.shape)
        terms = np.broadcast_to(np.count_nonzero(shares, -1), shape[:-1]).ravel()
        shares = np.broadcast_to(shares.astype(np.float32), shape).ravel()
        some = np.flatnonzero(shares)
        return cls(torch.from_numpy(np.broadcast_to(entries.astype(np.int32), shape).ravel()[some]),
                   torch.from_numpy((terms.cumsum() - terms).astype(np.int32)), torch.from_numpy(shares[some]))


def _sums(bags: _Bags, table: Tensor) -> Tensor:
    # The transforms' matrices are a third zeros, and smaller than what a matrix product is good at.
    return torch.embedding_bag(table, bags.entries, bags.offsets, False, 0, False, bags.shares)[0]


@functools.lru_cache(maxsize=128)
def _value_bags(form: Form, y: _Axis, x: _Axis, pitch: tuple[int, int], together: int) -> list[tuple[_Bags, _Bags]]:
    """From pixels, ``pitch`` apart down and across, to ``points y.number columns``, and from there to ``points points
    y.number x.number``; so many of the first points ``together``."""
    n, matrix = form.points, form.data.numpy()
    (rows, in_rows), (columns, in_columns) = y.windows(n), x.windows(n)
    read = np.unique(columns[in_columns])
    columns = np.searchsorted(read, columns)
    pixels = rows[:, None] * pitch[0] + read[:, None] * pitch[1]
    horizontal: dict[int, _Bags] = {}
    parts = []
    for p in range(0, n, together):
        some = matrix[p:p + together]
        if len(some) not in horizontal:
            strips = np.arange(len(some) * y.number).reshape(-1, 1, y.number, 1, 1) * len(read)
            horizontal[len(some)] = _Bags.of(strips + columns, matrix[:, None, None] * in_columns)
        parts.append((_Bags.of(pixels, some[:, None, None] * in_rows[:, None]), horizontal[len(some)]))
    return parts


@functools.lru_cache(maxsize=128)
def _result_bags(form: Form, tiles: tuple[int, int], size: tuple[int, int]) -> tuple[_Bags, _Bags]:
    """From ``points points k m`` to ``rows points m`` and from there to ``rows columns``."""
    n, side, matrix, (k, m) = form.points, form.outputs, form.back.numpy(), tiles
    row, column, point = np.arange(size[0])[:, None, None, None], np.arange(size[1])[:, None], np.arange(n)
    products = (point * n + np.arange(n)[:, None, None]) * (k * m) + row // side * m + np.arange(m)[:, None]
    vertical = _Bags.of(products, matrix[row[:, 0, 0, 0] % side][:, None, None])
    strips = np.arange(size[0])[:, None, None] * n + point
    return vertical, _Bags.of(strips * m + column // side, matrix[column[:, 0] % side])
