"""The core, imported after the page is open, and by one thread at a time."""

from __future__ import annotations

import threading

_lock = threading.Lock()


def ready() -> None:
    """Wait until uplift_core is imported. Two threads in the middle of it would see half of it."""
    with _lock:
        import uplift_core.backbones  # noqa: F401
        import uplift_core.features  # noqa: F401
        import uplift_core.pictures  # noqa: F401
