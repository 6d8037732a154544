"""AUTOMATIC1111: no manager of models; weights are moved by hand, and autocast is on while pictures are sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from uplift_core.devices import choose_dtype
from uplift_core.model import UPLiFT

from .base import Host


class A1111(Host):
    name = "AUTOMATIC1111"
    tiles_decode = False

    def device(self) -> torch.device:
        return torch.device(self.devices.device)

    def preferred_dtype(self, device: torch.device, parameters: int) -> torch.dtype:
        if device.type == "cpu" or self.devices.dtype == torch.float32:  # --no-half
            return torch.float32
        return choose_dtype("auto", device)

    @contextlib.contextmanager
    def in_place(self, model: UPLiFT, handle: Any, needed: int) -> Iterator[None]:
        self._make_room()
        try:
            model.to(self.device())
            yield
        finally:
            model.to(self.home())
            self.collect()

    def _make_room(self) -> None:
        """With --medvram and --lowvram a part of the diffusion model may be on the device: send it away."""
        try:
            from modules import lowvram

            if lowvram.is_enabled(self.shared.sd_model):
                lowvram.send_everything_to_cpu()
        except (ImportError, AttributeError):
            pass
        self.collect()
