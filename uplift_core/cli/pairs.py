"""Which VAE goes with a model, said before anything is looked for or downloaded where names alone tell."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..errors import InputError
from ..registry import FULL, default_model, lookup
from ..vae import check_pair, named_space
from ..vae.spaces import BACKBONE_SPACES, LATENT_SPACES


def choose_model(model: str, vae: str, console: Console) -> tuple[str, str]:
    """The model to load and why, if nobody named it (which is said); InputError if ``vae`` does not fit by name."""
    named, reason = default_model() if model in ("", "auto") else (model, "")
    if reason:
        console.print(f"[yellow]note:[/] {reason}", highlight=False)
    check_names(named, vae, reason)
    return named, reason


def check_names(model: str, vae: str, reason: str = "") -> None:
    """InputError if a known model and a known VAE do not fit. ``reason``: why the model was taken, if nobody named
    it."""
    known = None if Path(model).is_file() else lookup(model)
    if known is not None:
        vae_for(known.latent_space, vae, reason)


def vae_for(space: str, vae: str, reason: str = "") -> str:
    """The VAE to load for a model of that latent space: the one that was named, else the space's own. InputError where
    none fits."""
    if vae:
        check_spaces(space, named_space(vae), reason)
        return vae
    if space in BACKBONE_SPACES:
        raise InputError(f"the model enlarges features of {space} and no pictures: use 'uplift features', or a model "
                         f"made for VAE latents, such as {FULL}")
    if not space:
        raise InputError("the model file does not say which latents it enlarges; name a VAE with --vae")
    if space not in LATENT_SPACES:
        raise InputError(f"the model enlarges latents of '{space}'; name the VAE that it was trained with, with --vae")
    return space


def check_spaces(space: str, vae_space: str, reason: str = "") -> None:
    """InputError if the latent spaces of a model and a VAE differ."""
    try:
        check_pair(space, vae_space)
    except InputError as error:
        raise InputError(f"{error}. The model was not named, and {reason}" if reason else str(error)) from None
