"""What is made of weights (folded norms, transformed filters), once while a run works through bands or windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

_T = TypeVar("_T")
_kept: ContextVar[dict[tuple[int, str], tuple[Any, Any]] | None] = ContextVar("kept", default=None)


@contextmanager
def keep_made() -> Iterator[None]:
    """Within this block, or the outermost of several, :func:`once` makes a thing once."""
    if _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def once(source: Any, purpose: str, make: Callable[[], _T]) -> _T:
    """``make()``, or what a surrounding :func:`keep_made` has of it for this source and purpose."""
    kept = _kept.get()
    if kept is None:
        return make()
    key = (id(source), purpose)
    if key not in kept:
        kept[key] = (source, make())  # holding the source keeps its id unique
    return kept[key][1]
