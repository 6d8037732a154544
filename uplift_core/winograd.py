"""3x3 convolutions on the CPU with a quarter of the multiplications or fewer (Winograd), in fp32.

Lavin and Gray 2016 use the interpolation points 0, +-1, +-2, inf for F(4x4, 3x3). The points here, 0, +-3/4, +-3/2,
inf, keep the transforms as short and lose about three times less precision: over 512 channels the error is that of a
plain fp32 convolution. Inference only; other devices and dtypes have their own kernels for this.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .kept import once

_TILES = 96
"""Worked through at a time: what is made of them stays in the processor's cache, but the filters are read anew, and so
they are twice as many for _WIDE filters."""
_WIDE = 256 * 256
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


class Closing(NamedTuple):
    """What is done with a convolution's results while they are in the processor's cache: a 1x1 convolution (weight
    ``p o``, bias ``p`` or None), then ``residual`` (``b q h w``, channels last) added to the channels both have."""

    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None


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
             bias: Tensor | None = None, form: Form = TILES, relu: bool = False,
             closing: Closing | None = None) -> Tensor:
    """Stride-1 3x3 convolution of ``b c h w`` (channels last) with zero pads (left, right, top, bottom).

    ``sources``: the input's channels in one or more tensors, which are never put together; ``transformed``:
    :func:`filters` for ``form``; relu: negative results become zero; closing: what follows. Returns ``b o
    h+top+bottom-2 w+left+right-2``, channels last, with ``closing`` its channels.
    """
    left, right, top, bottom = pads
    b, _, h, w = sources[0].shape
    channels = transformed.shape[2] if closing is None else closing.weight.shape[0]
    out = sources[0].new_empty(b, h + top + bottom - 2, w + left + right - 2, channels)
    _run(form, form.outputs, sources, transformed, bias, relu, (-top, -left), out, closing)
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
         begin: tuple[int, int], out: Tensor, closing: Closing | None = None) -> None:
    """Tiles of results into ``out`` ``b h w o``: the first reads from ``begin`` on, the next ``step`` further.

    Not all at a time, and of some only the values at a few points of the vertical axis."""
    side, points, o = form.outputs, form.points, transformed.shape[2]
    down, across = -(-out.shape[1] // side), -(-out.shape[2] // side)
    tiles = _TILES * (2 if transformed[0].numel() >= _WIDE else 1)
    rows, columns = max(1, tiles // across), -(-across // -(-across // tiles))
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
                        some = slice(at, at := at + len(values))
                        if channel:
                            product[some].baddbmm_(values, weights[some])
                        else:
                            torch.bmm(values, weights[some], out=product[some])
                    channel += data.shape[3]
                area = slice(side * y, side * (y + k)), slice(side * x, side * (x + m))
                part = closing
                if closing is not None and closing.residual is not None:
                    part = closing._replace(residual=closing.residual[i].permute(1, 2, 0)[area])
                _results(form, product, bias, relu, (k, m), part, out[i][area])


def _whole_pixels(x: Tensor) -> Tensor:
    """``b h w c`` whose pixels lie whole and whole pixels apart, as rows of a table."""
    c = x.shape[3]
    return x.contiguous() if x.stride(3) != 1 or x.stride(2) % c or x.stride(1) % c else x


def _values(form: Form, step: int, source: Tensor, begin: tuple[int, int], k: int, m: int) -> Iterator[Tensor]:
    """``points^2 tiles c``, part by part: the values at the points, of k rows of m tiles of ``h w c``."""
    c = source.shape[2]
    (top, y), (left, x) = (_Axis.of(at, step, number, form.points, size)
                           for at, number, size in zip(begin, (k, m), source.shape[:2], strict=True))
    down, across = source.stride(0) // c, source.stride(1) // c
    table = source[top, left].as_strided(((y.length - 1) * down + (x.length - 1) * across + 1, c), (c, 1))
    vertical, horizontal = _to_rows(form, y, x, (down, across)), _to_values(form, k, x)
    together = max(1, _PART_BYTES // (form.points * k * m * c * 4))
    for p in range(0, form.points, together):
        last = min(p + together, form.points)
        yield horizontal.of(vertical.of(table, p, last), 0, last - p).view(-1, k * m, c)


def _results(form: Form, product: Tensor, bias: Tensor | None, relu: bool, tiles: tuple[int, int],
             closing: Closing | None, out: Tensor) -> None:
    """``points^2 tiles o`` back to pixels: into ``h w o``, which may end within a tile; ``closing``'s residual is
    ``h w q``."""
    vertical, horizontal = _to_pixels(form, tiles, (out.shape[0], out.shape[1]))
    pixels = horizontal.of(vertical.of(product.flatten(0, 1)))
    if bias is not None:
        pixels.add_(bias)
    if closing is not None:
        pixels = F.linear(pixels.relu_() if relu else pixels, closing.weight, closing.bias).view(out.shape)
        both = 0 if closing.residual is None else min(out.shape[2], closing.residual.shape[2])
        if both:
            torch.add(pixels[..., :both], closing.residual[..., :both], out=out[..., :both])  # type: ignore[index]
        if both < out.shape[2]:
            out[..., both:] = pixels[..., both:]
    elif relu:
        torch.clamp_min(pixels.view(out.shape), 0, out=out)
    else:
        out.copy_(pixels.view(out.shape))


class _Axis(NamedTuple):
    """``number`` windows of an axis, each ``step`` after the one before, the first at ``begin``, of a source that is
    ``length`` long; they may reach over its borders."""

    begin: int
    step: int
    number: int
    length: int

    @classmethod
    def of(cls, begin: int, step: int, number: int, points: int, size: int) -> tuple[int, _Axis]:
        """The first position that the windows read of a source of this size, and the windows in what they read."""
        first, end = max(0, begin), min(size, begin + step * (number - 1) + points)
        return first, cls(begin - first, step, number, end - first)

    def windows(self, points: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions ``number points``, and whether they are in the source."""
        at = self.begin + self.step * np.arange(self.number)[:, None] + np.arange(points)
        inside = (at >= 0) & (at < self.length)
        return np.where(inside, at, 0), inside

    def read(self, points: int) -> np.ndarray:
        """The positions that any window reads, in order."""
        return np.flatnonzero(np.bincount(self.windows(points)[0].ravel()))


_Terms = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Places ``p``, entries and shares ``s t``: p times s sums, ``shares[s] * table[place + entries[s]]``."""


@dataclass
class _Sums:
    """Sums of a table's rows, ``shares[j] * table[entries[j]]`` from each of ``starts`` to the next, in parts (the sums
    of one point each, say): where the terms and the sums of each part end.

    The transforms' matrices are a third zeros, which are left out, and so small that a product takes twice as long."""

    entries: Tensor
    shares: Tensor
    starts: Tensor
    ends: list[tuple[int, int]]
    cut: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of_terms(cls, parts: Sequence[Sequence[_Terms]]) -> _Sums:
        """Of each part the sums of all its terms, one after the other."""
        sizes = [len(places) * np.count_nonzero(shares) for part in parts for places, _, shares in part]
        entries, weights = np.empty(sum(sizes), np.int32), np.empty(sum(sizes), np.float32)
        starts: list[np.ndarray] = []
        ends, end, sums = [], 0, 0
        for part in parts:
            for places, own, shares in part:
                some = shares != 0
                counts = some.sum(1)
                begin, terms = end, int(counts.sum())
                end += len(places) * terms
                shape = len(places), terms
                np.add(places[:, None], own[some], out=entries[begin:end].reshape(shape), casting="unsafe")
                weights[begin:end].reshape(shape)[:] = shares[some]
                first = counts.cumsum() - counts + begin
                starts.append(np.add.outer(np.arange(len(places)) * terms, first).ravel().astype(np.int32))
                sums += len(starts[-1])
            ends.append((end, sums))
        return cls(torch.from_numpy(entries), torch.from_numpy(weights), torch.from_numpy(np.concatenate(starts)), ends)

    def repeated(self, times: int, rows: int) -> _Sums:
        """The same sums of so many tables that stand one after the other, ``rows`` apart: a part each."""
        (terms, sums), = self.ends
        each = torch.arange(times, dtype=torch.int32)[:, None]
        return _Sums((self.entries + each * rows).flatten(), self.shares.repeat(times),
                     (self.starts + each * terms).flatten(), [(terms * k, sums * k) for k in range(1, times + 1)])

    def of(self, table: Tensor, first: int = 0, last: int = 1) -> Tensor:
        """``rows c`` to ``sums c``: the sums of these parts."""
        if (first, last) not in self.cut:
            (begin, skipped), (end, sums) = self.ends[first - 1] if first else (0, 0), self.ends[last - 1]
            starts = self.starts[skipped:sums]
            self.cut[first, last] = (self.entries[begin:end], starts - begin if begin else starts,
                                     self.shares[begin:end])
        entries, starts, shares = self.cut[first, last]
        return torch.embedding_bag(table, entries, starts, False, 0, False, shares)[0]


@functools.lru_cache(maxsize=8)
def _to_rows(form: Form, y: _Axis, x: _Axis, pitch: tuple[int, int]) -> _Sums:
    """From pixels, ``pitch`` apart down and across, to the values of the vertical axis, ``points y.number columns``, of
    those columns that a window of ``x`` reads."""
    (rows, inside), columns = y.windows(form.points), x.read(form.points) * pitch[1]
    return _Sums.of_terms([[(columns, row[None] * pitch[0], (share * there)[None])
                            for row, there in zip(rows, inside, strict=True)] for share in form.data.numpy()])


@functools.lru_cache(maxsize=4)
def _to_values(form: Form, number: int, x: _Axis) -> _Sums:
    """From ``points number columns``, of :func:`_to_rows`, to ``points points number x.number``."""
    columns, inside = x.windows(form.points)
    read = x.read(form.points)
    columns, width = np.searchsorted(read, columns), len(read)
    places = np.arange(number) * width
    one = _Sums.of_terms([[(places, columns, share * inside) for share in form.data.numpy()]])
    return one.repeated(form.points, number * width)


@functools.lru_cache(maxsize=4)
def _to_pixels(form: Form, tiles: tuple[int, int], size: tuple[int, int]) -> tuple[_Sums, _Sums]:
    """From ``points points k m`` to ``rows points m`` and from there to ``rows columns``."""
    n, side, matrix, (k, m) = form.points, form.outputs, form.back.numpy(), tiles
    points, columns = np.arange(n), np.arange(size[1])
    places = np.add.outer(points * k * m, np.arange(m)).ravel()
    down = _Sums.of_terms([[(places, (points * n * k + y // side)[None] * m, matrix[y % side][None])
                            for y in range(size[0])]])
    across = _Sums.of_terms([[(np.arange(size[0]) * n * m, points * m + columns[:, None] // side,
                               matrix[columns % side])]])
    return down, across
