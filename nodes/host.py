"""What the nodes ask of ComfyUI: memory, progress, interruption. What differs between its versions is settled here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from comfy_api.latest import io

from ..uplift_core.errors import InputError
from ..uplift_core.memory import free_memory

CATEGORY = "UPLiFT"
STEPS_SHOWN = 500
"""Positions of a progress bar."""


def schema(**options: Any) -> io.Schema:
    """A node's schema, without what this version of ComfyUI does not know yet (``search_aliases``)."""
    known = inspect.signature(io.Schema).parameters
    return io.Schema(**{name: value for name, value in options.items() if name in known})


def patcher_class() -> type:
    """The host's present class for a model that it moves between memories."""
    return getattr(comfy.model_patcher, "CoreModelPatcher", None) or comfy.model_patcher.ModelPatcher


def preferred_dtype(device: torch.device, parameters: int) -> torch.dtype:
    """The number format this ComfyUI would run a model of that many parameters in."""
    if management.should_use_fp16(device, model_params=parameters):
        return torch.float16
    if management.should_use_bf16(device, model_params=parameters):
        return torch.bfloat16
    return torch.float32


def free_bytes(device: torch.device) -> int | None:
    """What may be used on the device now; None for the CPU, where the core's own look is better."""
    return None if device.type == "cpu" else int(management.get_free_memory(device) * 0.9)


def should_stop() -> bool:
    """Whether the user has pressed Interrupt."""
    return bool(management.processing_interrupted())


def stop_if_asked() -> None:
    """Raises the host's own exception after an interrupt, so that it reports "interrupted" and not an error."""
    management.throw_exception_if_processing_interrupted()


class Bar:
    """A node's progress bar over ``items`` equal pieces of work; the host raises in it when interrupted."""

    def __init__(self, items: int = 1):
        self.bar = comfy.utils.ProgressBar(STEPS_SHOWN)
        self.items, self.shown = max(1, items), -1

    def item(self, index: int) -> Callable[[float, int], None]:
        """``progress(done, total)`` for one of the pieces."""
        def show(done: float, total: int) -> None:
            position = int((index + min(1.0, done / max(total, 1))) / self.items * STEPS_SHOWN)
            if position > self.shown:  # no message for what nobody would see
                self.shown = position
                self.bar.update_absolute(position, STEPS_SHOWN)
        return show


def room_for(size: int, what: str) -> None:
    """Raises InputError when ``size`` bytes are more than this machine has free. A CPU allocation would not fail by
    an exception: the system would kill the server."""
    free = free_memory(torch.device("cpu"))
    if size > free:
        raise InputError(f"{what} would take {size / 2**30:.1f} GB of main memory and {max(free, 0) / 2**30:.1f} GB "
                         "are free; choose a smaller scale, fewer pictures at a time or a smaller picture")


def choice(name: str, value: Any, options: list[str]) -> str:
    """A value of a combo box, checked: not every ComfyUI does."""
    if value not in options:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(options)}")
    return str(value)


def number(name: str, value: float, low: float, high: float) -> float:
    """A number within its limits, checked."""
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(f"{name} is {value!r}; expected {low} to {high}")
    return value
