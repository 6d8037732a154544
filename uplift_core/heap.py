"""The C library's heap. glibc gives freed blocks back to the system at once, and the next piece of work pays for the
same pages again; only step by step it learns to keep larger ones. Its own upper limits from the start save half of the
page faults of a first run."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 64 << 20
"""Freed bytes at the end of the heap that stay the program's."""
_LARGE = 32 << 20  # what is larger comes from the system and returns to it


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep up to ``KEPT`` freed bytes, for the life of the process; whether it does.

    Nothing happens under another C library, or where MALLOC_* variables already say what is wanted.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE) and mallopt(_TRIM_THRESHOLD, KEPT))


def give_back() -> None:
    """Give the system what is free between two pieces of work: what bits of many sizes left of the heap can be twice
    what any of them needs. Only where :func:`keep_freed_memory` has a word in it."""
    if keep_freed_memory():
        ctypes.CDLL(None).malloc_trim(0)
