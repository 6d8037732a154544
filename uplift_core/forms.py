"""Which of the fast form's exact shortcuts are taken, and how much it holds at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class FastForms:
    """Which of the exact shortcuts are taken; all of them, except when their gain is being measured."""

    channels_last: bool = True
    winograd: bool = True
    winograd_gain: float = 30  # least in * out / (in + out) channels: what it saves over what its transforms cost
    fold_batch_norm: bool = True
    sampled_encoder: bool = True
    block_attender: bool = True
    compiled: bool = False  # layer norm and ReLU as one kernel by torch.compile: a GPU gains, the first run waits
    band_pixels: int = 24576  # guide pixels that the encoder holds at a time, on a CPU
    decode_pixels: int = 65536  # output pixels that a decoder without refiner holds at a time, on a CPU
    large_bands: int = 16  # times as many on graphics devices, whose kernels want more work at once


FAST = FastForms()


@contextmanager
def fast_forms(**changes: bool | int) -> Iterator[None]:
    """Switch shortcuts off (or the band size) for a measurement."""
    before = copy.copy(FAST.__dict__)
    FAST.__dict__.update(changes)
    try:
        yield
    finally:
        FAST.__dict__.update(before)


def at_a_time(pixels: int, device: torch.device) -> int:
    """``band_pixels`` or ``decode_pixels`` on this device."""
    return pixels if device.type == "cpu" else pixels * FAST.large_bands
