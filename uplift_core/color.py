"""Bringing the colours of an enlarged picture back to those of the picture it came from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .resample import antialias

COLOR_METHODS = ("none", "mean", "adain", "wavelet")
_LEVELS = 5


def match_color(image: Tensor, reference: Tensor, method: str = "mean") -> Tensor:
    """``image`` (``b 3 H W``) with the colours of ``reference`` (``b 3 h w``, any size; b or 1), both in [0, 1].

    mean: each channel's mean is shifted to the reference's (UPLiFT, section B.1). adain: mean and standard deviation
    (Huang and Belongie 2017). wavelet: everything coarser than 2^5 pixels is taken from the reference (undecimated
    B3-spline wavelets, Starck et al. 2007). Not clamped, so that the means are equal; the caller clamps.

    Raises InputError for an unknown method or shapes that do not fit.
    """
    if method not in COLOR_METHODS:
        raise InputError(f"colour method {method!r} is unknown; choose one of {', '.join(COLOR_METHODS)}")
    if image.ndim != 4 or reference.ndim != 4 or image.shape[1] != reference.shape[1]:
        raise InputError(f"image {tuple(image.shape)} and reference {tuple(reference.shape)}; expected b 3 H W each")
    if reference.shape[0] not in (1, image.shape[0]):
        raise InputError(f"a batch of {image.shape[0]} pictures and {reference.shape[0]} references; expected as many "
                         "references as pictures, or one")
    if method == "none":
        return image
    x, ref = image.float(), reference.to(image.device).float()
    if method == "wavelet":
        target = antialias(ref, (x.shape[2], x.shape[3]))
        difference = (target - x).contiguous()
        return (x + _coarse(difference)).to(image.dtype)
    shift = ref.mean((2, 3), keepdim=True)
    mean = x.mean((2, 3), keepdim=True)
    if method == "mean":
        return (x + (shift - mean)).to(image.dtype)
    gain = ref.std((2, 3), keepdim=True, unbiased=False) / x.std((2, 3), keepdim=True, unbiased=False).clamp_min(1e-5)
    return ((x - mean) * gain + shift).to(image.dtype)


def _coarse(x: Tensor) -> Tensor:
    """The coarsest band of the a-trous transform: repeated B3-spline smoothing with holes of 1, 2, 4, ... pixels.

    The transform is linear, so taking the reference's coarse band instead of the image's adds the coarse band of
    their difference.
    """
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device) / 16
    b, c, h, w = x.shape
    x = x.reshape(b * c, 1, h, w)
    for level in range(_LEVELS):
        hole = 2**level
        x = F.conv2d(F.pad(x, (0, 0, 2 * hole, 2 * hole), mode="replicate"), kernel.view(1, 1, 5, 1),
                     dilation=(hole, 1))
        x = F.conv2d(F.pad(x, (2 * hole, 2 * hole, 0, 0), mode="replicate"), kernel.view(1, 1, 1, 5),
                     dilation=(1, hole))
    return x.reshape(b, c, h, w)
