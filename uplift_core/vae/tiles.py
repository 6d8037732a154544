"""A map computed in overlapping pieces: where they lie, how they are joined, and how many bytes there are for them.

All lengths here are in latent pixels; ``src`` and ``dst`` say how many pixels of the input and output one of them is.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import Cancelled


class Piece(NamedTuple):
    """One stretch of an axis: ``lo:hi`` is computed, of which ``use_lo:use_hi`` counts with ``weight``."""

    lo: int
    hi: int
    use_lo: int
    use_hi: int
    weight: Tensor


def pieces(size: int, tile: int, margin: int, blend: int, dst: int) -> list[Piece]:
    """Cut an axis into about equal stretches of at most ``tile``; neighbours fade over ``blend`` on each side.

    Every stretch is computed with ``margin`` more on both sides. The weights, one for each of the ``dst`` output
    pixels of a latent pixel, add up to 1 everywhere.
    """
    count = -(-size // tile)
    cuts = [i * size // count for i in range(count + 1)]
    blend = min(blend, margin, size // count // 2)
    out = []
    for first, last in pairwise(cuts):
        use_lo, use_hi = max(0, first - blend), min(size, last + blend)
        at = torch.arange(use_lo * dst, use_hi * dst, dtype=torch.float32) + 0.5
        weight = torch.ones_like(at)
        if blend and first > 0:
            weight *= ((at - (first - blend) * dst) / (2 * blend * dst)).clamp(0, 1)
        if blend and last < size:
            weight *= (((last + blend) * dst - at) / (2 * blend * dst)).clamp(0, 1)
        out.append(Piece(max(0, first - margin), min(size, last + margin), use_lo, use_hi, weight))
    return out


def run_tiled(x: Tensor, compute: Callable[[Tensor], Tensor], *, tile: int, margin: int, blend: int, src: int, dst: int,
              channels: int, progress: Callable[[int, int], None] | None = None,
              should_stop: Callable[[], bool] | None = None) -> Tensor:
    """``compute`` over pieces of ``x`` (``b c h*src w*src``), joined: ``b channels h*dst w*dst``, fp32 on x's device.

    One batch item and one piece at a time. ``progress(done, total)`` counts pieces. Raises Cancelled.
    """
    b, _, height, width = x.shape
    rows = pieces(height // src, tile, margin, blend, dst)
    columns = pieces(width // src, tile, margin, blend, dst)
    out = torch.zeros((b, channels, height // src * dst, width // src * dst), dtype=torch.float32, device=x.device)
    work = [(i, row, column) for i in range(b) for row in rows for column in columns]
    for done, (i, row, column) in enumerate(work):
        check_stop(should_stop)
        part = compute(x[i:i + 1, :, row.lo * src:row.hi * src, column.lo * src:column.hi * src])
        part = part[0, :, (row.use_lo - row.lo) * dst:(row.use_hi - row.lo) * dst,
                    (column.use_lo - column.lo) * dst:(column.use_hi - column.lo) * dst]
        weight = (row.weight[:, None] * column.weight[None, :]).to(x.device)
        out[i, :, row.use_lo * dst:row.use_hi * dst, column.use_lo * dst:column.use_hi * dst] += (
            part.to(x.device, torch.float32) * weight)
        if progress is not None:
            progress(done + 1, len(work))
    return out


def check_stop(should_stop: Callable[[], bool] | None) -> None:
    """Raises Cancelled when the caller wants to stop."""
    if should_stop is not None and should_stop():
        raise Cancelled("stopped on request")
