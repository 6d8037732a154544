"""Latent spaces and their scaling, as data: the one place that knows these numbers.

A VAE writes *unscaled* latents, which is what UPLiFT and ComfyUI work on. Diffusion models, and with them diffusers
pipelines and WebUI, work on *scaled* ones of about unit variance: ``scaled = (unscaled - shift) * scaling_factor``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class LatentSpace:
    """What the VAEs of one family agree on. ``vae`` tells a user which VAE to take."""

    title: str
    channels: int
    patch: int
    scaling_factor: float
    shift: float = 0.0
    vae: str = ""


BUNDLED_VAE = "tiny"
"""The codec that comes along."""

LATENT_SPACES = {
    "sd15": LatentSpace("Stable Diffusion 1.x and 2.x", 4, 8, 0.18215,
                        vae="the VAE of Stable Diffusion 1.x or 2.x, such as vae-ft-mse-840000-ema-pruned.safetensors, "
                            "or TAESD"),
    "sdxl": LatentSpace("SDXL", 4, 8, 0.13025, vae="the VAE of SDXL, such as sdxl_vae.safetensors, or TAESDXL"),
    "sd3": LatentSpace("Stable Diffusion 3", 16, 8, 1.5305, 0.0609, vae="the VAE of Stable Diffusion 3, or TAESD3"),
    "flux": LatentSpace("Flux", 16, 8, 0.3611, 0.1159, vae="the VAE of Flux, often named ae.safetensors, or TAEF1"),
    BUNDLED_VAE: LatentSpace("the bundled tiny codec", 32, 8, 1.0, vae="the bundled VAE 'tiny'"),
}


BACKBONE_SPACES = ("dinov2-s14", "dinov3-splus16")
"""What models of features name instead of a latent space."""


def latent_space(name: str) -> LatentSpace:
    """The space of that name. Raises InputError for a name that is not known."""
    if name not in LATENT_SPACES:
        raise InputError(f"latent space is {name!r}; expected one of {', '.join(LATENT_SPACES)}")
    return LATENT_SPACES[name]


def spaces_with(channels: int) -> str:
    """The known spaces with so many channels as words for a message, such as ``a latent of SDXL``, or empty."""
    titles = [space.title for space in LATENT_SPACES.values() if space.channels == channels]
    return f"a latent of {' or '.join(titles)}" if titles else ""


def check_channels(latent: Tensor, channels: int, owner: str) -> None:
    """Raises InputError unless ``latent`` is ``b channels h w``; ``owner`` names who expects that."""
    if latent.ndim != 4 or 0 in latent.shape:
        raise InputError(f"the latent has the shape {tuple(latent.shape)}; expected batch x {channels} x height x "
                         "width, none of them 0")
    if latent.shape[1] != channels:
        looks = spaces_with(latent.shape[1])
        raise InputError(f"the latent has {latent.shape[1]} channels and {owner} has {channels}"
                         + (f": this looks like {looks}" if looks else "") + ". Use the VAE and model it was made for")


def scale_latent(latent: Tensor, name: str) -> Tensor:
    """Unscaled (VAE, ComfyUI) to scaled (diffusion model, diffusers, WebUI); ``b c h w`` of the space of that name."""
    space = latent_space(name)
    check_channels(latent, space.channels, space.title)
    return (latent - space.shift) * space.scaling_factor


def unscale_latent(latent: Tensor, name: str) -> Tensor:
    """Scaled (diffusion model, diffusers, WebUI) to unscaled (VAE, ComfyUI); ``b c h w`` of the space of that name."""
    space = latent_space(name)
    check_channels(latent, space.channels, space.title)
    return latent / space.scaling_factor + space.shift


def check_pair(model_space: str, vae_space: str) -> None:
    """Raises InputError when an UPLiFT and a VAE differ in the latent space; an empty name is unknown and passes."""
    if not model_space or not vae_space or model_space == vae_space:
        return
    theirs = LATENT_SPACES.get(vae_space)
    vae = f"'{vae_space}'" + (f" ({theirs.title})" if theirs else "")
    ours = LATENT_SPACES.get(model_space)
    if ours is None and model_space not in BACKBONE_SPACES:
        raise InputError(f"the model upscales latents of '{model_space}' and the VAE makes {vae} latents: the result "
                         f"would be noise. Load the VAE that the model was trained with (its file's metadata says "
                         f"latent_space: {model_space})")
    if ours is None:
        raise InputError(f"the model was trained on '{model_space}', which is no latent space of a VAE, and the VAE "
                         f"makes {vae} latents. Choose a model made for VAE latents, such as sd15-vae")
    raise InputError(f"the model upscales '{model_space}' ({ours.title}) latents and the VAE makes {vae} latents: the "
                     f"result would be noise or wrong colours. Load {ours.vae}")
