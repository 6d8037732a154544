"""How much memory this process has used at most."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import torch


def start_peak(device: torch.device) -> None:
    """Let :func:`peak_memory` count from now, on graphics devices and on Linux. Elsewhere it goes on counting from the
    start of the process."""
    reset = getattr(getattr(torch, device.type, None), "reset_peak_memory_stats", None)
    try:
        if device.type in ("cuda", "xpu") and reset is not None:
            reset(device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")
    except (OSError, RuntimeError):
        pass  # not allowed in some containers


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: torch's allocations on CUDA and XPU, else the resident set of the whole process (torch
    counts no peak for MPS)."""
    counter = getattr(getattr(torch, device.type, None), "max_memory_allocated", None)
    if device.type in ("cuda", "xpu") and counter is not None:
        return int(counter(device))
    try:  # getrusage keeps what threads that have ended had seen, whatever was reset since
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except ImportError:
        import psutil

        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))


class AnonymousPeak:
    """``with AnonymousPeak() as peak:`` by how many bytes (``peak.grown``) a process's own memory grew at most inside,
    without pages of mapped files, which the system takes back when it needs them. Looked at every few milliseconds; on
    Linux only."""

    grown = 0

    def __enter__(self) -> AnonymousPeak:
        self._before, self._ended = _anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(0.003)
            self.grown = max(self.grown, _anonymous() - self._before)


def _anonymous() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if not found:
        raise OSError("this system does not tell the anonymous memory of a process")
    return int(found[1]) * 1024
