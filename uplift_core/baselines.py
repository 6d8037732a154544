"""What UPLiFT is compared with, behind the same call: interpolation, the joint bilateral upsampler, other networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .model import imagenet_normalise
from .peers import PEERS, Features, load_peer
from .resample import Span, antialias, reads, sample


class Upsampler(Protocol):
    """Gives any window of an enlarged feature map. ``low``: ``1 c h w`` before; ``size``: rows and columns after."""

    low: Tensor
    size: tuple[int, int]

    def window(self, y: Span, x: Span) -> Tensor:
        """``c y x`` float32."""

    def bytes(self, side: int) -> int:
        """About what a window of ``side`` features a side takes."""


class Interpolated:
    """``nearest`` or ``bilinear`` (align_corners=False)."""

    def __init__(self, mode: str, low: Tensor, factor: int):
        self.mode = "nearest" if mode == "nearest" else "antialias"  # which is plain bilinear where it enlarges
        self.low = low
        self.size = (low.shape[2] * factor, low.shape[3] * factor)

    def window(self, y: Span, x: Span) -> Tensor:
        held = reads(self.mode, y, self.low.shape[2]), reads(self.mode, x, self.low.shape[3])
        part = self.low[:, :, held[0].lo:held[0].hi, held[1].lo:held[1].hi]
        return sample(part, self.mode, *held, y, x)[0].float().cpu()

    def bytes(self, side: int) -> int:
        return 3 * 4 * self.low.shape[1] * side * side


class JointBilateral:
    """Joint bilateral upsampling (Kopf et al. 2007, eq. 3): every output p is the mean of the low-resolution values
    q near it, weighted by f (Gaussian of their distance on the low-resolution grid, ``spatial``) times g (Gaussian of
    their difference in the guide, ``contrast``). Neighbours beyond the border do not count."""

    def __init__(self, image: Tensor, low: Tensor, factor: int, spatial: float = 1.0, contrast: float = 0.1,
                 radius: int = 2):
        self.low, self.factor, self.spatial, self.contrast, self.radius = low, factor, spatial, contrast, radius
        self.size = (low.shape[2] * factor, low.shape[3] * factor)
        self.fine = antialias(image, self.size).to(low)
        self.coarse = F.interpolate(self.fine, size=tuple(low.shape[2:]), mode="bilinear", align_corners=False)

    def window(self, y: Span, x: Span) -> Tensor:
        low, r = self.low, self.radius
        h, w = low.shape[2:]
        rows, columns = (torch.arange(s.lo, s.hi, device=low.device) for s in (y, x))
        at_y, at_x = (((p + 0.5) / self.factor - 0.5) for p in (rows, columns))  # p on the low-resolution grid
        own_y, own_x = rows // self.factor, columns // self.factor
        fine = self.fine[0, :, y.lo:y.hi, x.lo:x.hi]
        total = low.new_zeros(low.shape[1], y.length, x.length)
        weights = low.new_zeros(y.length, x.length)
        shift = low.new_full((y.length, x.length), math.inf)  # the least exponent: no weight underflows to 0 / 0
        exponents = []
        for dy in range(-r, r + 1):
            for dx in range(-r, r + 1):
                q_y, q_x = own_y + dy, own_x + dx
                inside = ((q_y >= 0) & (q_y < h))[:, None] & ((q_x >= 0) & (q_x < w))[None, :]
                i, j = q_y.clamp(0, h - 1), q_x.clamp(0, w - 1)
                distance = (at_y - q_y)[:, None] ** 2 + (at_x - q_x)[None, :] ** 2
                apart = (fine - self.coarse[0][:, i][:, :, j]).square().sum(0)
                e = distance / (2 * self.spatial**2) + apart / (2 * self.contrast**2)
                e = torch.where(inside, e, math.inf)
                shift = torch.minimum(shift, e)
                exponents.append((e, i, j))
        for e, i, j in exponents:
            k = torch.exp(shift - e)
            weights += k
            total += k * low[0][:, i][:, :, j]
        return (total / weights).float().cpu()

    def bytes(self, side: int) -> int:
        return 4 * side * side * (4 * self.low.shape[1] + 2 * (2 * self.radius + 1) ** 2)


class Whole:
    """A network of others: it gives the whole map at once, windows are cut from it."""

    def __init__(self, compute: Callable[[Tensor, Tensor, tuple[int, int]], Tensor], image: Tensor, low: Tensor,
                 factor: int):
        self.size = (low.shape[2] * factor, low.shape[3] * factor)
        self.low = low
        self.result = antialias(compute(imagenet_normalise(image).to(low), low, self.size), self.size).float().cpu()

    def window(self, y: Span, x: Span) -> Tensor:
        return self.result[0, :, y.lo:y.hi, x.lo:x.hi]

    def bytes(self, side: int) -> int:
        return 4 * self.low.shape[1] * side * side


BASELINES = ("nearest", "bilinear", "jbu", *PEERS)


def baseline(method: str, image: Tensor, low: Tensor, factor: int, *, patch: int, backbone: str = "",
             network: nn.Module | None = None, offline: bool = False) -> Upsampler:
    """The upsampler of that name for features ``1 c h w`` of ``image`` ``1 3 H W`` in [0, 1], which ``backbone`` made
    of patches of ``patch`` pixels. network: that of others where it is loaded already; its weights
    are not downloaded if ``offline``.

    Raises InputError for unknown names, UpliftError where a network of others is not on this machine."""
    if method in ("nearest", "bilinear", "backbone"):
        return Interpolated("nearest" if method == "backbone" else method, low, factor)
    if method == "jbu":
        return JointBilateral(image, low, factor)
    if method not in PEERS:
        raise InputError(f"method is {method!r}; choose uplift or one of {', '.join(BASELINES)}")
    if network is None:
        network = load_peer(method, Features(low.shape[1], patch, backbone), offline=offline).to(low.device)
    return Whole(partial(PEERS[method].call, network), image, low, factor)
