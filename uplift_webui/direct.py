"""The second route: the accordion. What the sampler made is enlarged before the host decodes it."""

from __future__ import annotations

from typing import Any

import torch

from uplift_core.errors import Cancelled

from . import guards, infotext, pictures, say
from .enlarge import enlarge
from .job import Direct, Job
from .options import noise_or

SCALES = {"2x": 2, "4x": 4}


def asked(args: tuple[Any, ...]) -> Direct | None:
    """What the controls, or the arguments sent through the API, ask for; None for nothing."""
    enabled, scale, noise, color_fix = [*args, *(False, "2x", 1.0, True)[len(args):]][:4]
    if not enabled:
        return None
    # The API is used by people and programs: 2, 2.0 and "2x" all mean the same.
    text = str(scale).lower().strip().removesuffix("x").removesuffix(".0")
    return Direct(SCALES.get(f"{text}x", 2), noise_or(noise, 1.0), bool(color_fix))


def run(p: Any, job: Job, ps: Any) -> None:
    """The ``post_sample`` hook: replace ``ps.samples`` by larger ones, or leave them exactly as they are."""
    if job.direct is None or job.reason:
        return
    if job.host.should_stop():
        infotext.clear(p)
        return
    samples = ps.samples
    try:
        reason = guards.not_direct(p) or guards.not_latents(samples)
        if reason:
            say.left_alone(p, job, reason)
            return
        host = job.host
        guide = pictures.to_unit(torch.stack(list(pictures.decode(host, p, samples))))
        seeds = list(p.seeds)
        if len(seeds) != len(samples):
            seeds = [seeds[0] + i for i in range(len(samples))]
        larger = enlarge(job, samples, pictures.check_guide(guide, samples), job.direct.scale, seeds)
        ps.samples = larger if pictures.fits(host, larger) else pictures.decode(host, p, larger)
        job.reference = guide
    except Cancelled:
        ps.samples = samples
        infotext.clear(p)
    except Exception as error:  # whatever it is, the user keeps the picture
        ps.samples, job.reference = samples, None
        say.failed(p, job, error)
