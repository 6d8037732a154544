"""How much memory there is, and how it says that there is no more."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import InputError

SHARE_OF_FREE = 0.75
"""What part of the free memory is used when no budget is given."""

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str | int | float | None) -> int | None:
    """``4GB``, ``800 MiB``, ``1.5g`` or a number of bytes, as bytes (1 K = 1024). None stays None."""
    if text is None:
        return None
    if isinstance(text, (int, float)):
        amount = float(text)
    else:
        m = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
        if not m or m[1].count(".") > 1 or m[1] == ".":
            raise InputError(f"memory is {text!r}; expected an amount like 800MB or 4GB")
        amount = float(m[1]) * _UNITS[m[2].upper()]
    if not 0 < amount < math.inf:
        raise InputError(f"memory is {text!r}; expected more than nothing, and a limit")
    return int(amount)


def free_memory(device: torch.device) -> int:
    """Bytes that may be used now on the device; for the CPU those of the machine or its container."""
    module: Any = getattr(torch, device.type, None)
    if device.type in ("cuda", "xpu") and module is not None:
        index = module.current_device() if device.index is None else device.index  # before torch 2.5 it must be named
        if hasattr(module, "mem_get_info"):
            try:
                unused = module.memory_reserved(index) - module.memory_allocated(index)
                return int(module.mem_get_info(index)[0] + unused)
            except RuntimeError:
                pass  # many Intel devices cannot tell
        held = module.memory_allocated(index) if hasattr(module, "memory_allocated") else 0
        return int(module.get_device_properties(index).total_memory - held)
    cached = 0
    if device.type == "mps":  # shares the machine's memory, and keeps what was freed
        cached = int(torch.mps.driver_allocated_memory() - torch.mps.current_allocated_memory())
    return min(_machine(), *_containers()) + max(0, cached)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch reports exhausted memory, which it does in several ways."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(s in text for s in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory",
                  "status_alloc_failed", "unable to find an engine", "unable to find a valid cudnn",  # cuBLAS and cuDNN
                  "invalid buffer size",  # MPS
                  "out of device memory", "can not allocate memory",  # XPU
                  "out_of_device_memory", "out_of_host_memory", "error_out_of_resources")  # Level Zero, for XPU
