"""What the hosts with ComfyUI's way of memory share: a manager that loads and unloads models, and a patcher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from uplift_core.model import UPLiFT

from .base import Host


class ManagedHost(Host):
    """``memory`` is the host's memory manager, ``patcher`` its class for a model that is moved between memories."""

    memory: Any
    patcher: Any

    def device(self) -> torch.device:
        return self.memory.get_torch_device()

    def home(self) -> torch.device:
        return self.memory.unet_offload_device()

    def preferred_dtype(self, device: torch.device, parameters: int) -> torch.dtype:
        if device.type != "cpu":
            if self.memory.should_use_fp16(device, model_params=parameters):
                return torch.float16
            use_bf16 = getattr(self.memory, "should_use_bf16", None)
            if use_bf16 is not None and use_bf16(device, model_params=parameters):
                return torch.bfloat16
        return torch.float32

    def wrap(self, model: UPLiFT) -> Any:
        return self.patcher(model, load_device=self.device(), offload_device=self.home())

    def free_bytes(self, device: torch.device) -> int | None:
        return None if device.type == "cpu" else int(self.memory.get_free_memory(device) * 0.9)

    @contextlib.contextmanager
    def in_place(self, model: UPLiFT, handle: Any, needed: int) -> Iterator[None]:
        device = handle.load_device
        if device.type != "cpu":
            # What is more than the device has will be done in tiles.
            needed = min(needed, int(self.memory.get_total_memory(device) * 0.6))
        self.memory.load_models_gpu([handle], memory_required=needed)
        model.run_device = device
        yield
