"""The keys in a picture's generation text. What the host writes itself (Hires upscaler, Hires upscale) is left to it:
"Hires upscale" from the direct route would turn Hires. fix on when the text is pasted."""

from __future__ import annotations

from typing import Any

from uplift_core import __version__

from .job import Job
from .models import PUBLISHED

SCALE, NOISE, COLOR_FIX = "UPLiFT scale", "UPLiFT noise", "UPLiFT color fix"
HIRES_NOISE, MODEL, VERSION, NOTE = "UPLiFT hires noise", "UPLiFT model", "UPLiFT version", "UPLiFT not applied"


def write(p: Any, job: Job) -> None:
    """The keys of a job that will enlarge."""
    params = p.extra_generation_params
    if job.direct:
        params[SCALE], params[NOISE] = f"{job.direct.scale}x", job.noise
        params[COLOR_FIX] = job.color_fix
    else:
        if job.noise != 1:
            params[HIRES_NOISE] = job.noise
        if not p.denoising_strength:
            params[COLOR_FIX] = job.color_fix
    if job.settings.model != PUBLISHED.name:
        params[MODEL] = job.settings.model
    params[VERSION] = __version__


def not_applied(p: Any, reason: str) -> None:
    """Only the reason: a text that says 2x of a picture that is not would lie."""
    clear(p)
    p.extra_generation_params[NOTE] = reason


def clear(p: Any) -> None:
    """Take our keys off a ``p`` that is used again."""
    for key in (SCALE, NOISE, COLOR_FIX, HIRES_NOISE, MODEL, VERSION, NOTE):
        p.extra_generation_params.pop(key, None)
