"""What arrives as LATENT, checked: many kinds of latents share one type in ComfyUI."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..uplift_core.errors import InputError
from ..uplift_core.vae.spaces import LATENT_SPACES, spaces_with
from .models import HostModel


def samples_for(model: HostModel, latent: Any) -> Tensor:
    """The samples ``b c h w`` of a LATENT that fits the model, or InputError saying what came and what to connect."""
    wanted = _wanted(model)
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if getattr(samples, "is_nested", False):
        raise InputError("the latent is nested: it bundles several latents, of video and sound say. Take it apart "
                         f"first; UPLiFT enlarges {wanted}")
    if not isinstance(samples, Tensor):
        raise InputError(f"the latent holds no samples; connect a LATENT output with {wanted}")
    shape = "x".join(map(str, samples.shape))
    if samples.ndim == 5:
        raise InputError(f"the latent is {shape}, that of a video model (batch x channels x frames x height x width); "
                         f"UPLiFT enlarges {wanted}")
    if samples.ndim != 4 or 0 in samples.shape:
        raise InputError(f"the latent is {shape}; expected batch x {model.channels} x height x width: {wanted}")
    if samples.shape[1] != model.channels:
        looks = spaces_with(samples.shape[1])
        raise InputError(f"the latent has {samples.shape[1]} channels" + (f" (like {looks})" if looks else "")
                         + f" and the UPLiFT model '{model.name}' takes {model.channels}: connect {wanted}, or load an "
                         "UPLiFT model that was trained for these")
    return samples


def _wanted(model: HostModel) -> str:
    space = LATENT_SPACES.get(model.model.config.latent_space)
    return f"latents of {space.title}, from {space.vae}" if space else f"latents with {model.channels} channels"


def item_seeds(latent: dict[str, Any], seed: int, count: int) -> list[int]:
    """The seed of every item: ``seed`` plus its place in the batch it was made in (``batch_index``, which Latent From
    Batch keeps), so that an item alone comes out as in its batch."""
    index = latent.get("batch_index")
    places = list(index) if isinstance(index, (list, tuple)) and len(index) == count else list(range(count))
    return [(seed + int(place)) % 2**64 for place in places]
