"""A map computed in overlapping pieces: where they lie, how they are joined, and how many bytes there are for them.

All lengths here are in latent pixels; ``src`` and ``dst`` say how many pixels of the input and output one of them is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch reports exhausted memory, which it does in several ways."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        s in text for s in ("out of memory", "not enough memory", "can't allocate memory"))


def free_memory(device: torch.device) -> int:
    """Bytes that may be used now on the device; for the CPU those of the machine or its container."""
    module: Any = getattr(torch, device.type, None)
    if device.type in ("cuda", "xpu") and hasattr(module, "mem_get_info"):
        unused = module.memory_reserved(device) - module.memory_allocated(device)
        return int(module.mem_get_info(device)[0] + unused)
    return min(_machine(), *_containers())


def _machine() -> int:
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except ImportError:
        pass
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 << 30  # nothing on this system tells; assume little


def _containers() -> Iterator[int]:
    """What control groups leave to this process (Linux, version 2 and 1), as far as they limit it."""
    yield 1 << 62
    root = Path("/sys/fs/cgroup")
    for limit, used, stat, cache in ((root / "memory.max", root / "memory.current", root / "memory.stat",
                                      "inactive_file"),
                                     (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes",
                                      root / "memory/memory.stat", "total_inactive_file")):
        try:
            spare = dict(line.split() for line in stat.read_text().splitlines())
            yield max(0, int(limit.read_text()) - int(used.read_text()) + int(spare.get(cache, 0)))
        except (OSError, ValueError):
            continue
