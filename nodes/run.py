"""UPLiFT the way a node runs it: with progress, interruption and a way out when memory ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..uplift_core import upscale_latents
from ..uplift_core.errors import Cancelled, OutOfMemory
from . import host
from .models import HostModel

log = logging.getLogger(__name__)
Tile = str | int | None
Result = TypeVar("Result")


def carry_out(work: Callable[[Tile], Result], tile: Tile) -> Result:
    """``work(tile)``; without tiles and out of memory, ``work("auto")``. An interrupt ends as the host's own."""
    host.stop_if_asked()
    try:
        return work(tile)
    except Cancelled:
        host.stop_if_asked()
        raise
    except OutOfMemory as error:
        if tile is not None:
            raise
        log.warning("UPLiFT: %s", str(error).split(";")[0])
    # Outside the except block, so that what the failed run held is gone.
    return work("auto")


def run_options(model: HostModel, seed: int, noise_strength: float, progress: Any) -> dict[str, Any]:
    """What the core's functions are told by every node."""
    return {"seed": seed, "noise_strength": noise_strength, "progress": progress, "should_stop": host.should_stop,
            "memory_budget": host.free_bytes(model.patcher.load_device)}


def larger_latents(model: HostModel, samples: Tensor, guide: Tensor, scale: int, seeds: list[int],
                   noise_strength: float, tile: Tile) -> Tensor:
    """Unscaled latents ``b c h w`` to ``b c scale*h scale*w``, fp32, where the samples are.

    guide: ``b 3 H W`` in [0, 1], b as many or one.
    """
    count, channels, height, width = samples.shape
    network = model.ready(guide.shape[2], guide.shape[3], scale, tile)
    bar = host.Bar(count)
    out = torch.empty(count, channels, height * scale, width * scale, device=samples.device)
    for i, seed in enumerate(seeds):
        latent, picture = samples[i:i + 1].float(), guide[i:i + 1] if len(guide) > 1 else guide
        told = run_options(model, seed, noise_strength, bar.item(i))

        def work(tile: Tile, latent: Tensor = latent, picture: Tensor = picture, told: dict[str, Any] = told) -> Tensor:
            return upscale_latents(network, latent, picture, scale=scale, tile=tile, **told)

        out[i:i + 1] = carry_out(work, tile)
    return out
