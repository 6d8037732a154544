"""Between the host's pictures (-1 to 1) and the core's (0 to 1): the guide, the final picture, its colours."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uplift_core import match_color
from uplift_core.errors import InputError, OutOfMemory
from uplift_core.memory import SHARE_OF_FREE, free_memory, is_out_of_memory
from uplift_core.resample import antialias
from uplift_core.vae.codec import KLCodec
from uplift_core.vae.tiles import run_tiled

from .hosts import Host
from .job import Job

log = logging.getLogger(__name__)

PATCH = 8
DECODE_BYTES = 15.0 * 256
"""Peak of decoding a picture pixel with the VAE of SD 1.5, for 4-byte numbers (see uplift_core.vae.codec)."""
TILES = (128, 96, 64, 48, 32)
"""Sides of the tiles of the VAE in latent pixels."""


def to_unit(pictures: Tensor) -> Tensor:
    """-1 to 1 as fp32 0 to 1."""
    return (pictures.float() * 0.5 + 0.5).clamp(0, 1)


def from_image(image: Any) -> Tensor:
    """A PIL image or ``H W 3`` bytes as ``1 3 H W`` in [0, 1]."""
    values = torch.from_numpy(np.array(image.convert("RGB") if hasattr(image, "convert") else image))
    return values.movedim(-1, 0)[None, :3].float() / 255


def check_guide(guide: Tensor, samples: Tensor) -> Tensor:
    """The guide, if it covers the pixels of the latents. Raises InputError."""
    expected = (samples.shape[2] * PATCH, samples.shape[3] * PATCH)
    if tuple(guide.shape[2:]) != expected or guide.shape[0] not in (1, samples.shape[0]):
        raise InputError(f"the decoded picture is {tuple(guide.shape)} and the latents {tuple(samples.shape)}: they do "
                         "not show the same pixels")
    return guide


def decode(host: Host, p: Any, latents: Tensor) -> Any:
    """Scaled latents to the host's DecodedSamples; in tiles where the host has none and memory would end."""
    if host.tiles_decode:
        return host.decode(p, latents)
    for side in _sides(host, latents):
        try:
            if side is None:
                return host.decode(p, latents)
            return host.decoded_samples(_decode_tiled(host, p, latents, side))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("UPLiFT: the VAE ran out of memory %s; trying smaller parts",
                        "on the whole picture" if side is None else f"in tiles of {side * PATCH}")
        host.collect()
    raise OutOfMemory("the VAE does not fit in memory even in small tiles; close other programs or use a smaller scale")


def fits(host: Host, latents: Tensor) -> bool:
    """Whether the host's own decoding of these latents is expected to find the memory it needs."""
    return host.tiles_decode or _sides(host, latents)[0] is None


def _sides(host: Host, latents: Tensor) -> list[int | None]:
    dtype = getattr(host.devices, "dtype_vae", torch.float32)
    each = DECODE_BYTES * (0.5 if dtype in (torch.float16, torch.bfloat16) else 1) * PATCH**2
    free = host.free_bytes(host.device())
    free = int((free_memory(host.device()) if free is None else free) * SHARE_OF_FREE)
    margin = 2 * KLCodec.margin
    tiled = [side for side in TILES if side < max(latents.shape[2:])]
    fit = [side for side in tiled if each * (side + margin) ** 2 <= free] or tiled[-1:]
    if each * latents.shape[0] * latents.shape[2] * latents.shape[3] <= free or not fit:
        return [None, *fit]
    return list(fit)


def _decode_tiled(host: Host, p: Any, latents: Tensor, side: int) -> Tensor:
    """Near to the whole, not equal: the VAE normalises over all it sees. The tiles fade into each other."""
    return run_tiled(latents.cpu(), lambda part: torch.stack(list(host.decode(p, part.to(latents)))), tile=side,
                     margin=KLCodec.margin, blend=KLCodec.blend, src=1, dst=PATCH, channels=3,
                     should_stop=host.should_stop)


def resized(decoded: Any, height: int, width: int) -> Tensor:
    """DecodedSamples as ``b 3 height width`` in -1 to 1."""
    return antialias(torch.stack(list(decoded)).float(), (height, width))


def correct_colors(job: Job, images: Tensor) -> None:
    """Shift the decoded batch ``b 3 H W`` in [0, 1], in place, towards the pictures it was enlarged from."""
    reference, job.reference = job.reference, None
    if reference is None or job.color_fix == "none" or not isinstance(images, Tensor):
        return
    if reference.shape[0] not in (1, images.shape[0]):
        return  # another extension took pictures out of the batch or added some
    for i in range(images.shape[0]):
        own = reference[i:i + 1] if reference.shape[0] > 1 else reference
        images[i:i + 1] = match_color(images[i:i + 1], own, job.color_fix).clamp(0, 1)
