"""What a run would take, found by doing a little of it: ``uplift train --dry-run``."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import autocast

from ..devices import no_autocast
from ..measure import peak_memory
from .trainer import Trainer

_TRIED_STEPS = 3


@dataclass(frozen=True)
class Plan:
    """``memory_bytes``: peak of the device while training (on a CPU: of the process)."""

    description: dict[str, str]
    parameters: int
    pictures: int
    steps: int
    seconds_per_step: float
    memory_bytes: int

    @property
    def seconds(self) -> float:
        return self.steps * self.seconds_per_step


def make_plan(trainer: Trainer) -> Plan:
    """Takes a few real training steps on random pictures, changing nothing on disk."""
    recipe, task = trainer.recipe, trainer.task
    device = trainer.device
    objective = task.objective.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = trainer.make_optimizer()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.run.precision)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(recipe.data.batch, 3, recipe.data.size, recipe.data.size, generator=generator)
    times = []
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
        times.append(time.perf_counter() - begun)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    return Plan(task.describe(), trained, len(trainer.photos), trainer.steps, min(times), peak_memory(device))
