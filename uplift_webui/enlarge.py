"""UPLiFT on a batch of the host's latents: with progress, interruption and a way out when memory ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from uplift_core import estimate_memory, upscale_latents
from uplift_core.devices import no_autocast
from uplift_core.errors import InputError, OutOfMemory
from uplift_core.vae.spaces import scale_latent, unscale_latent

from . import models
from .job import Job

log = logging.getLogger(__name__)

STEPS_SHOWN = 100


def enlarge(job: Job, samples: Tensor, guide: Tensor, scale: int, seeds: Sequence[int], *, own_step: bool = False
            ) -> Tensor:
    """The host's latents ``b 4 h w`` (scaled) to ``b 4 scale*h scale*w``, as they came: dtype, device, scaled.

    guide: ``b 3 8h 8w`` in [0, 1], b as many or one. seeds: one for each item. own_step: the host's progress bar is
    at a step that belongs to this work, so that it may be moved. Raises UpliftError.
    """
    if not torch.isfinite(samples).all():
        raise InputError("the latents hold NaN or infinite numbers: the sampler or the checkpoint went wrong")
    loaded = models.load(job.host)
    tile = job.settings.tile
    side = tile if isinstance(tile, int) else None
    needed = estimate_memory(loaded.model, guide.shape[2], guide.shape[3], scale, side, loaded.dtype)
    latents = unscale_latent(samples.float(), models.SPACE)
    out = torch.empty(*latents.shape[:2], latents.shape[2] * scale, latents.shape[3] * scale, device=latents.device)
    with _textinfo(job), job.host.in_place(loaded.model, loaded.handle, needed), _plain_numbers(job):
        for i in range(len(latents)):
            own = guide[i:i + 1] if len(guide) > 1 else guide
            told = {"scale": scale, "seed": int(seeds[i]) % 2**64, "noise_strength": job.noise,
                    "memory_budget": job.host.free_bytes(job.host.device()), "should_stop": job.host.should_stop,
                    "progress": _progress(job, scale, i, len(latents), own_step)}
            out[i:i + 1] = _carry_out(loaded.model, latents[i:i + 1], own, tile, told)
    return scale_latent(out, models.SPACE).to(samples)


def _carry_out(model: Any, latent: Tensor, guide: Tensor, tile: str | int | None, told: dict[str, Any]) -> Tensor:
    """Without tiles and out of memory: tiles that fit."""
    try:
        return upscale_latents(model, latent, guide, tile=tile, **told)
    except OutOfMemory as error:
        if tile is not None:
            raise
        log.warning("UPLiFT: %s", str(error).split(";")[0])
    # Outside the except block, so that what the failed run held is gone.
    return upscale_latents(model, latent, guide, tile="auto", **told)


@contextlib.contextmanager
def _textinfo(job: Job) -> Any:
    """The line beside the progress bar, given back as it was."""
    before = job.host.state.textinfo
    try:
        yield
    finally:
        job.host.state.textinfo = before


def _plain_numbers(job: Job) -> Any:
    """The host may sample under autocast; the model keeps its own number formats."""
    return no_autocast(job.host.device().type)


def _progress(job: Job, scale: int, item: int, items: int, own_step: bool) -> Callable[[float, int], None]:
    shown = -1

    def show(done: float, total: int) -> None:
        nonlocal shown
        position = int((item + min(1.0, done / max(total, 1))) / items * STEPS_SHOWN)
        if position <= shown:
            return
        shown = position
        state = job.host.state
        state.textinfo = f"UPLiFT {scale}x: {position} %"
        if own_step:
            state.sampling_steps, state.sampling_step = STEPS_SHOWN, position

    return show
