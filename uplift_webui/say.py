"""What goes to the user: one clear line, in the log, under the picture and in the picture's own text."""

from __future__ import annotations

import logging
from typing import Any

from uplift_core.errors import UpliftError

from . import infotext
from .job import Job

log = logging.getLogger("uplift_webui")


def left_alone(p: Any, job: Job, reason: str) -> None:
    """UPLiFT did not enlarge, and why."""
    line = f"UPLiFT left the picture as it is: {reason}"
    infotext.not_applied(p, reason)
    if line in job.told:
        return
    job.told.add(line)
    log.warning(line)
    comment = getattr(p, "comment", None)
    if comment is not None:
        comment(line)


def failed(p: Any, job: Job, error: BaseException) -> None:
    """Something went wrong; the picture is kept. A surprise goes to the log with its whole story."""
    if not isinstance(error, UpliftError):
        log.error("UPLiFT failed", exc_info=error)
    words = str(error).strip() or type(error).__name__
    left_alone(p, job, words if isinstance(error, UpliftError) else f"{type(error).__name__}: {words.splitlines()[0]}")
