"""From a name or a path to a model that is ready to run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoints import build, read_weights
from .devices import choose_device, choose_dtype
from .registry import Progress, default_model, get
from .vae.spaces import BUNDLED_VAE

if TYPE_CHECKING:
    from .model import UPLiFT

log = logging.getLogger(__name__)


def load(name_or_path: str | os.PathLike[str] = "auto", *, device: str | torch.device = "auto",
         dtype: str | torch.dtype = "auto", offline: bool | None = None,
         folders: Iterable[str | os.PathLike[str]] = (), operations: Any = nn,
         progress: Progress | None = None) -> UPLiFT:
    """A model in eval mode, its parameters without gradients, by known name (``sd15-vae``, ``dinov2-s14``,
    ``dinov3-splus16``, ``uplift-mini``) or by file. ``auto``: ``sd15-vae`` if its weights are on this machine, else the
    bundled ``uplift-mini``.

    ``device`` and ``dtype``: ``auto``, names or torch's own objects (see choose_dtype; the bundled model, whose latents
    are pixels nearly, keeps fp32: eight bits of bf16 are two grey levels). ``folders``: searched first for names.
    ``operations``: where module classes come from. ``progress(done, total)``: bytes of a download, should one be
    needed. Raises InputError, CheckpointError or DownloadError; never returns a half-loaded model.
    """
    where = choose_device(device)
    number = choose_dtype(dtype, where)
    if name_or_path == "auto":
        name_or_path, reason = default_model(folders)
        if reason:
            log.warning(reason)
    path = get(name_or_path, folders=folders, offline=offline, progress=progress)
    model = build(read_weights(path), operations=operations).requires_grad_(False)
    if dtype == "auto" and model.config.latent_space == BUNDLED_VAE:
        number = torch.float32
    return model.to(device=where, dtype=number)
