"""What a run would take: ``uplift train --dry-run``. First what can be counted, then a little of it done for real."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, autocast

from ..devices import no_autocast
from ..errors import InputError
from ..measure import peak_memory
from ..memory import is_out_of_memory
from .trainer import Trainer

_TRIED_STEPS = 3
_LARGEST_AT_ONCE = 4  # while the largest map is worked on: its gradients, and copies in other layouts


@dataclass(frozen=True)
class Plan:
    """``memory_bytes``: estimated peak of the device (on a CPU: of the process); ``more_bytes``: the part of it that is
    not taken yet."""

    description: dict[str, str]
    parameters: int
    pictures: int
    steps: int
    memory_bytes: int
    more_bytes: int


@dataclass(frozen=True)
class Trial:
    """Measured: the quickest of a few steps, and the peak of the device (on a CPU: of the process)."""

    seconds_per_step: float
    memory_bytes: int


def make_plan(trainer: Trainer) -> Plan:
    """Computes nothing: shapes go through the objective on torch's meta device."""
    task = trainer.task
    parameters = sum(p.numel() for p in task.objective.parameters() if p.requires_grad)
    every = sum(p.numel() for p in task.objective.parameters())
    beside = 3 + bool(trainer.recipe.optimizer.ema)  # gradients, and two of Adam
    more = 4 * (beside * parameters + (0 if trainer.device.type == "cpu" else every)) + _kept_for_gradients(trainer)
    return Plan(task.describe(), parameters, len(trainer.photos), trainer.steps, peak_memory(trainer.device) + more,
                more)


def _kept_for_gradients(trainer: Trainer) -> int:
    """Bytes of what a forward pass keeps for the backward pass, in mixed precision about half of it."""
    objective = copy.deepcopy(trainer.task.objective).to("meta")
    weights = {p.untyped_storage()._cdata for p in objective.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage._cdata] = storage  # alive, so that no other gets its address
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        _loss = objective(*trainer.task.blank_inputs())  # noqa: F841 (what it keeps ends with it)
    sizes = [storage.nbytes() for address, storage in kept.items() if address not in weights]
    size = sum(sizes) + _LARGEST_AT_ONCE * max(sizes)
    return size if trainer.precision == "fp32" else size // 2


def try_steps(trainer: Trainer) -> Trial:
    """A few real training steps on random pictures, changing nothing on disk. Raises InputError out of memory."""
    try:
        times = list(_steps(trainer))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"a step does not fit into the memory of {trainer.device}: lower data.batch or data.size "
                         f"({str(error).splitlines()[0]})") from None
    return Trial(min(times), peak_memory(trainer.device))


def _steps(trainer: Trainer) -> Iterator[float]:
    recipe, task = trainer.recipe, trainer.task
    device = trainer.device
    objective = task.objective.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = trainer.make_optimizer()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.precision)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(recipe.data.batch, 3, recipe.data.size, recipe.data.size, generator=generator)
    for step in range(_TRIED_STEPS):
        begun = time.perf_counter()
        keys = [f"dry run {i}" for i in range(len(images))]
        inputs = task.inputs(images, keys, step, device, cached=False)
        with autocast(device.type, dtype) if dtype is not None else no_autocast(device.type):
            loss = objective(*inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - begun


@dataclass(frozen=True)
class Look:
    """How many pictures were read, and what is wrong with those that could not be."""

    read: int
    broken: list[str]


def look(trainer: Trainer, seconds: float = 5.0) -> Look:
    """Read pictures, in the order of the run, for so long."""
    until, read, broken = time.perf_counter() + seconds, 0, []
    for position in range(len(trainer.photos)):
        if time.perf_counter() > until:
            break
        if wrong := trainer.photos.unreadable(position):
            broken.append(wrong)
        read += 1
    return Look(read, broken)
