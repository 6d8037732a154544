"""What one run of the host is to do with UPLiFT. It hangs on the host's ``p``, where all hooks find it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .hosts import Host
from .options import Settings

NAME = "uplift_job"


@dataclass
class Direct:
    """The accordion: enlarge the result of the sampler ``scale`` times."""

    scale: int
    noise: float
    color_fix: bool


@dataclass
class Job:
    """``hires_scale``: 2 or 4 when Hires. fix has UPLiFT for its upscaler, else 0. ``reason``: why nothing will be
    enlarged. ``reference``: pictures ``b 3 H W`` in [0, 1] whose colours the decoded batch takes on."""

    host: Host
    settings: Settings
    hires_scale: int = 0
    direct: Direct | None = None
    reason: str = ""
    reference: Tensor | None = None
    told: set[str] = field(default_factory=set)

    @property
    def noise(self) -> float:
        return self.direct.noise if self.direct else self.settings.noise

    @property
    def color_fix(self) -> str:
        if not self.direct:
            return self.settings.color_fix
        if not self.direct.color_fix:
            return "none"
        return self.settings.color_fix if self.settings.color_fix != "none" else "mean"


def of(p: Any) -> Job | None:
    """The job of this ``p``, if there is one."""
    return getattr(p, NAME, None)


def attach(p: Any, job: Job | None) -> None:
    setattr(p, NAME, job)
