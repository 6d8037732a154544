"""The host's hooks, in the order of a job. None of them may raise: the host would drop the picture or the hook."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import direct, guards, hires, infotext, options, pictures, say
from . import job as jobs
from .hosts import Host
from .job import Job


def _safe(hook: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(hook)
    def call(*args: Any, **named: Any) -> None:
        try:
            hook(*args, **named)
        except Exception as error:
            say.log.error("UPLiFT failed in %s", hook.__name__, exc_info=error)
    return call


@_safe
def process(host: Host, p: Any, args: tuple[Any, ...]) -> None:
    """Before anything is sampled: find out what to do, and whether it can be done."""
    hires.unhook(p)
    infotext.clear(p)
    jobs.attach(p, None)
    scale, asked = hires.asked_scale(p), direct.asked(args)
    if not scale and asked is None:
        return
    job = Job(host, options.read(host), hires_scale=scale, direct=None if scale else asked)
    jobs.attach(p, job)
    job.reason = guards.not_sd1(p.sd_model) if scale else guards.not_direct(p)
    if job.reason:
        say.left_alone(p, job, job.reason)
    else:
        infotext.write(p, job)
    if scale:
        hires.hook(p, job)


@_safe
def process_batch(p: Any) -> None:
    job = jobs.of(p)
    if job is None:
        return
    if not job.reason:  # what went wrong in one batch need not in the next
        infotext.clear(p)
        infotext.write(p, job)
    hires.before_sampling(p, job)


@_safe
def post_sample(p: Any, ps: Any) -> None:
    job = jobs.of(p)
    if job is not None:
        direct.run(p, job, ps)


@_safe
def postprocess_batch(p: Any, images: Any) -> None:
    job = jobs.of(p)
    if job is not None:
        pictures.correct_colors(job, images)


@_safe
def postprocess(p: Any) -> None:
    """The job is done; ``p`` may be used again, or be copied."""
    hires.unhook(p)
    jobs.attach(p, None)
