"""Forge Classic and reForge: the package ``ldm_patched``."""

from __future__ import annotations

from .managed import ManagedHost


class Classic(ManagedHost):
    name = "Forge Classic or reForge"

    def __init__(self) -> None:
        super().__init__()
        from ldm_patched.modules import model_management
        from ldm_patched.modules.model_patcher import ModelPatcher

        self.memory, self.patcher = model_management, ModelPatcher
