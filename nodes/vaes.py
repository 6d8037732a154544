"""ComfyUI's VAE objects: which latent space they make, and how the core uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management as management
from torch import Tensor

from ..uplift_core.errors import InputError
from ..uplift_core.vae.spaces import LATENT_SPACES, check_pair, spaces_with
from .models import HostModel

TAG = "uplift_latent_space"
"""The attribute of a VAE object that names its latent space."""


def space_of(vae: Any) -> str:
    """The latent space of a VAE as far as it tells: by tag, or a TAESD by its scale; else empty.

    The full VAEs of SD1.5 and SDXL are built alike: nothing in them says which is which.
    """
    if tag := getattr(vae, TAG, ""):
        return str(tag)
    scale = getattr(getattr(vae, "first_stage_model", None), "vae_scale", None)
    if scale is not None:
        for name, space in LATENT_SPACES.items():
            near = abs(float(scale) / space.scaling_factor - 1) < 0.02  # it may be held in half precision
            if near and space.channels == getattr(vae, "latent_channels", 4):
                return name
    return ""


def check_vae(model: HostModel, vae: Any) -> None:
    """Raises InputError unless the VAE makes latents the model enlarges, as far as the VAE tells."""
    if getattr(vae, "first_stage_model", None) is None:
        raise InputError("the VAE is empty: the checkpoint it comes from holds none. Connect a VAE Loader")
    if getattr(vae, "latent_dim", 2) != 2:
        raise InputError("the VAE is one for video or sound; connect the VAE the latents were made with")
    channels = getattr(vae, "latent_channels", model.channels)
    if channels != model.channels:
        looks = spaces_with(channels)
        wanted = LATENT_SPACES.get(model.model.config.latent_space)
        raise InputError(f"the VAE makes {channels} latent channels" + (f" (like {looks})" if looks else "")
                         + f" and the UPLiFT model '{model.name}' takes {model.channels}. Connect "
                         + (wanted.vae if wanted else "the VAE it was trained for"))
    check_pair(model.model.config.latent_space, space_of(vae))


class HostCodec:
    """A VAE of ComfyUI as the core's codec: ``b 3 H W`` pictures in [0, 1], unscaled latents.

    Memory, number format and the tiles after an out-of-memory are the host's own affair. ``encoded`` is called when
    the picture is in latents: the host may have moved UPLiFT away to make room for the VAE.
    """

    def __init__(self, vae: Any, encoded: Callable[[], Any] | None = None):
        self.vae, self.latent_space, self.encoded = vae, space_of(vae), encoded

    def encode(self, image: Tensor) -> Tensor:
        management.throw_exception_if_processing_interrupted()
        latent = self.vae.encode(image.movedim(1, -1))
        if self.encoded:
            self.encoded()
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        management.throw_exception_if_processing_interrupted()
        return self.vae.decode(latent).movedim(-1, 1)
