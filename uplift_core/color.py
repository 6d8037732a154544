"""Bringing the colours of an enlarged picture back to those of the picture it came from."""

from __future__ import annotations

import itertools

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
        fixed = antialias(ref, (x.shape[2], x.shape[3])) - x
        for i, j in itertools.product(range(x.shape[0]), range(x.shape[1])):  # one channel at a time, in place
            fixed[i, j] = x[i, j] + _coarse(fixed[i, j])
        return fixed.to(image.dtype)
    shift = ref.mean((2, 3), keepdim=True)
    mean = x.mean((2, 3), keepdim=True)
    if method == "mean":
        return (x + (shift - mean)).to(image.dtype)
    gain = ref.std((2, 3), keepdim=True, unbiased=False) / x.std((2, 3), keepdim=True, unbiased=False).clamp_min(1e-5)
    return ((x - mean) * gain + shift).to(image.dtype)


def _coarse(x: Tensor) -> Tensor:
    """The coarsest band of ``H W`` in the a-trous transform: B3-spline smoothing with holes of 1, 2, 4, ... pixels.

    The transform is linear, so taking the reference's coarse band instead of the image's adds the coarse band of
    their difference.
    """
    for level in range(_LEVELS):
        x = _smooth(_smooth(x, 0, 2**level), 1, 2**level)
    return x


def _smooth(x: Tensor, axis: int, hole: int) -> Tensor:
    """``H W`` by (1, 4, 6, 4, 1) / 16 along an axis, edges repeated. A sum of shifted views: torch's convolution
    with holes would copy the picture five times over."""
    margin = (2 * hole, 2 * hole)
    padded = F.pad(x[None, None], (0, 0, *margin) if axis == 0 else (*margin, 0, 0), mode="replicate")[0, 0]
    left2, left, middle, right, right2 = (padded.narrow(axis, i * hole, x.shape[axis]) for i in range(5))
    smooth = middle * (6 / 16)
    for near, far in ((left, left2), (right, right2)):
        smooth.add_(near, alpha=4 / 16).add_(far, alpha=1 / 16)
    return smooth
