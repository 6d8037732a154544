"""How much memory this process has used at most."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: torch's allocations on a GPU, the resident set of the whole process on the CPU."""
    counter = getattr(getattr(torch, device.type, None), "max_memory_allocated", None)
    if device.type in ("cuda", "xpu") and counter is not None:
        return int(counter(device))
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except ImportError:
        import psutil

        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
