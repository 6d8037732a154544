"""Forge and Forge Neo: the package ``backend``."""

from __future__ import annotations

from torch import Tensor

from .managed import ManagedHost


class Forge(ManagedHost):
    name = "Forge"

    def __init__(self) -> None:
        super().__init__()
        from backend import memory_management
        from backend.patcher.base import ModelPatcher

        self.memory, self.patcher = memory_management, ModelPatcher
        self.neo = _is_neo()
        if self.neo:
            self.name = "Forge Neo"

    def handed_picture(self, decoded: Tensor) -> Tensor:
        # Neo hands out 0 to 1. A value well below 0 says otherwise, whatever the version is called.
        return decoded * 2 - 1 if self.neo and decoded.min() > -0.01 else decoded


def _is_neo() -> bool:
    try:
        from modules_forge import forge_version
    except ImportError:
        return False
    return "neo" in str(getattr(forge_version, "version", "")).lower()
