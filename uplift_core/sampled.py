"""What a decoder reads of the encoder's maps: windows of them, resampled to its own grid, and where these are kept."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .errors import InputError
from .maps import Map, empty
from .resample import Span, reads, sample

Window = tuple[Span, Span]


class Request(NamedTuple):
    """A window of an encoder map, resampled to a grid."""

    source: int
    sampling: str
    y: Span
    x: Span


class Samples:
    """Encoder maps where they were sampled; a coarser grid is read out of a finer one it is part of."""

    def __init__(self, maps: list[tuple[Request, Tensor]]):
        self.maps = maps

    def fill(self, whole: Request, part: Request, m: Map) -> None:
        """Put the rows ``part`` of the request ``whole`` in place, sampled from the encoder map ``m``."""
        data = next((data for request, data in self.maps if request == whole), None)
        if data is None:
            data = empty(m.data, m.data.shape[1], whole.y.length, whole.x.length)
            self.maps.append((whole, data))
        values = sample(m.data, _mode(part, m), m.y, m.x, part.y, part.x)
        data[:, :, part.y.within(whole.y), part.x.within(whole.x)] = values

    def get(self, wanted: Request) -> Tensor:
        for request, data in self.maps:
            if request.source == wanted.source and request.sampling == wanted.sampling and _holds(request, wanted):
                return sample(data, "nearest", request.y, request.x, wanted.y, wanted.x)
        raise KeyError(wanted)


def _mode(r: Request, m: Map) -> str:
    if r.sampling == "none" and (m.y.size, m.x.size) != (r.y.size, r.x.size):
        raise InputError(f"the encoder's map is {m.y.size} x {m.x.size}, the decoder's {r.y.size} x {r.x.size}, and "
                         "the configuration says enc_resample: none; use nearest or bilinear")
    return "antialias" if r.sampling == "bilinear" else "nearest"


def source_of(r: Request, height: int, width: int) -> Window:
    mode = "antialias" if r.sampling == "bilinear" else "nearest"
    return reads(mode, r.y, height), reads(mode, r.x, width)


def _holds(fine: Request, coarse: Request) -> bool:
    """Whether every position of the coarse request is a position that the fine one holds."""
    for f, c in ((fine.y, coarse.y), (fine.x, coarse.x)):
        if f.size % c.size or (fine.sampling == "bilinear" and f.size != c.size):
            return False
        k = f.size // c.size
        if c.lo * k < f.lo or (c.hi - 1) * k >= f.hi:
            return False
    return True


def finest(requests: list[Request], sizes: list[tuple[int, int]]) -> list[Request]:
    """The requests to store: of each map the finest grid, where the coarser ones are part of it."""
    stored: list[Request] = []
    for r in sorted(set(requests), key=lambda r: -r.y.size * r.x.size):
        height, width = sizes[r.source]
        for i, s in enumerate(stored):
            if s.source != r.source or s.sampling != r.sampling:
                continue
            same = (s.y.size, s.x.size) == (r.y.size, r.x.size)
            nested = r.sampling == "nearest" and not (s.y.size % r.y.size or s.x.size % r.x.size
                                                      or height % s.y.size or width % s.x.size)
            if same or nested:
                ky, kx = s.y.size // r.y.size, s.x.size // r.x.size
                stored[i] = s._replace(y=s.y.union(Span(r.y.lo * ky, (r.y.hi - 1) * ky + 1, s.y.size)),
                                       x=s.x.union(Span(r.x.lo * kx, (r.x.hi - 1) * kx + 1, s.x.size)))
                break
        else:
            stored.append(r)
    return stored


def band_of(requests: list[Request], k: int, n: int) -> list[Request | None]:
    """The k-th of n bands of rows of every request."""
    parts: list[Request | None] = []
    for r in requests:
        lo, hi = r.y.lo + r.y.length * k // n, r.y.lo + r.y.length * (k + 1) // n
        parts.append(r._replace(y=Span(lo, hi, r.y.size)) if hi > lo else None)
    return parts


def union(a: Window | None, b: Window) -> Window:
    return b if a is None else (a[0].union(b[0]), a[1].union(b[1]))
