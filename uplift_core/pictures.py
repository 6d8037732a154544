"""A picture file's contents enlarged: colours by the model, transparency beside it, the rest as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from .imageio import Picture
from .model import UPLiFT
from .upscaling import upscale_image


def upscale_picture(model: UPLiFT, vae: Any, picture: Picture, *, scale: float = 2, **options: Any) -> Picture:
    """``picture`` enlarged ``scale`` times, alpha (bicubic), colour profile, EXIF and bit depth kept.

    options: those of :func:`uplift_core.upscale_image`, which also says what is raised.
    """
    rgb = upscale_image(model, vae, picture.rgb, scale=scale, **options)
    alpha = picture.alpha
    if alpha is not None:
        size = (rgb.shape[1], rgb.shape[2])
        alpha = F.interpolate(alpha[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    return replace(picture, rgb=rgb, alpha=alpha)
