"""ComfyUI's pictures (``b H W c`` in [0, 1]) and the core's (``b c H W``), checked on the way."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ..uplift_core.errors import InputError


def to_core(image: Any, name: str = "image") -> Tensor:
    """``b 3 H W`` fp32 in [0, 1], a view where possible; an alpha channel is left out. Raises InputError."""
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"{name} is {shape}; expected an IMAGE: pictures x height x width x 3")
    return image[..., :3].movedim(-1, 1).float().clamp(0, 1)


def room(count: int, height: int, width: int) -> Tensor:
    """An IMAGE to be filled: ``b H W 3`` on the device that ComfyUI keeps pictures on."""
    return torch.empty(count, height, width, 3, device=management.intermediate_device())


def crop_like_vae(image: Tensor, height: int, width: int, patch: int) -> Tensor | None:
    """``b c H W`` cut to height x width around its middle, as VAE Encode cuts what is no multiple of ``patch``.

    None where the sizes differ by a patch or more: that is another picture.
    """
    spare = (image.shape[2] - height, image.shape[3] - width)
    if not all(0 <= n < patch for n in spare):
        return None
    return image[:, :, spare[0] // 2:spare[0] // 2 + height, spare[1] // 2:spare[1] // 2 + width]
