"""Windows of feature maps, and the layout they are kept in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .forms import FAST
from .resample import Span


class Map(NamedTuple):
    """A window of a feature map: its values ``b c y x`` and where they lie in the whole.

    ``more``: further channels of the same window, kept apart where the block that comes next can (:func:`joins`).
    """

    data: Tensor
    y: Span
    x: Span
    more: tuple[Tensor, ...] = ()

    def cut(self, y: Span, x: Span) -> Tensor:
        if (y.lo, y.hi, x.lo, x.hi) == (self.y.lo, self.y.hi, self.x.lo, self.x.hi):
            return self.data
        return self.data[:, :, y.within(self.y), x.within(self.x)]


def whole(data: Tensor) -> Map:
    """All of a map."""
    return Map(data, Span.all(data.shape[2]), Span.all(data.shape[3]))


def as_format(x: Tensor) -> Tensor:
    """Channels last where that is the faster layout (not on MPS)."""
    if FAST.channels_last and x.device.type in ("cpu", "cuda", "xpu"):
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Room for a map of ``like``'s batch, dtype and device, in the layout of :func:`as_format`."""
    last = FAST.channels_last and like.device.type in ("cpu", "cuda", "xpu")
    return torch.empty(like.shape[0], channels, height, width, dtype=like.dtype, device=like.device,
                       memory_format=torch.channels_last if last else torch.contiguous_format)


def accumulate(y: Tensor, x: Tensor) -> Tensor:
    """``y`` with the channels that both have added to it, in place."""
    c = min(x.shape[1], y.shape[1])
    if c == y.shape[1]:
        return y.add_(x[:, :c])
    y[:, :c] += x
    return y
