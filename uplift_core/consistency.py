"""Low-resolution consistency: an enlarged picture that, shrunk again, gives the pixels it came from."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .resample import antialias


def back_project(image: Tensor, low: Tensor, rounds: int = 4) -> Tensor:
    """Iterative back-projection (Irani and Peleg 1991): ``y <- y + up(low - down(y))``, a few rounds.

    image: ``b 3 H W``, low: ``b 3 h w``, both in [0, 1]; returns ``b 3 H W`` in [0, 1]. down is antialiased bilinear,
    up is bicubic; every round ends in [0, 1], so that the next makes up for what was cut off. A detail the
    low-resolution picture does not contradict is left alone.
    """
    if image.ndim != 4 or low.ndim != 4 or image.shape[:2] != low.shape[:2]:
        raise InputError(f"picture {tuple(image.shape)} and low-resolution picture {tuple(low.shape)}; expected the "
                         "same batch and channels")
    size, small = (image.shape[2], image.shape[3]), (low.shape[2], low.shape[3])
    if small[0] > size[0] or small[1] > size[1]:
        raise InputError(f"the low-resolution picture ({small[1]}x{small[0]}) is larger than the enlarged one "
                         f"({size[1]}x{size[0]})")
    y = image.float()
    target = low.to(image.device).float()
    for _ in range(rounds):
        missing = target - antialias(y, small)
        change = bicubic(missing, size)
        y = change.add_(y).clamp_(0, 1)
    return y.clamp(0, 1).to(image.dtype)


def bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resize of ``b c h w`` to ``size``."""
    try:
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False)
    except NotImplementedError:  # MPS in older versions of torch
        return F.interpolate(x.cpu(), size=size, mode="bicubic", align_corners=False).to(x.device)


FAINT = 1 / 255
"""A detail of this strength is halved by :func:`make_consistent`: one grey level of eight bits."""


def make_consistent(image: Tensor, low: Tensor) -> Tensor:
    """An enlarged picture ``b 3 H W`` that agrees with ``low`` ``b 3 h w``, both in [0, 1], without its faint errors.

    What the picture holds beyond the bicubic enlargement of ``low``, both back-projected, is its detail d. It is kept
    in proportion d^2 / (d^2 + FAINT^2), as a Wiener filter keeps a signal in noise: edges and texture stay, the unrest
    of a grey level or two that a network leaves in skies and walls goes. Two last rounds of back-projection make up for
    what was taken.
    """
    plain = bicubic(low.to(image.device).float(), (image.shape[2], image.shape[3])).clamp_(0, 1)
    plain = back_project(plain, low)
    detail = back_project(image, low).float().sub_(plain)
    power = detail.square()
    detail.mul_(power).div_(power.add_(FAINT**2))
    del power
    return back_project(plain.add_(detail), low, 2).to(image.dtype)
