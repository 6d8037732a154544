"""One small adapter for each family of hosts: memory, number formats, and what else differs between them."""

from __future__ import annotations

import importlib.util

from .base import Host


def pick() -> Host:
    """The adapter of the host that this process runs."""
    if _there("backend.memory_management") and _there("backend.patcher.base"):
        from .forge import Forge

        return Forge()
    if _there("ldm_patched.modules.model_management"):
        from .classic import Classic

        return Classic()
    from .a1111 import A1111

    return A1111()


def _there(name: str) -> bool:
    """Whether a module can be imported; its packages are, it is not."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


__all__ = ["Host", "pick"]
