"""What every tab is given."""

from __future__ import annotations

from dataclasses import dataclass, field

from .jobs import Jobs
from .settings import Settings
from .storage import Storage
from .weights import Shelf


@dataclass
class App:
    settings: Settings
    storage: Storage
    shelf: Shelf
    jobs: Jobs = field(default_factory=Jobs)

    @classmethod
    def of(cls, settings: Settings) -> App:
        return cls(settings, Storage(settings.temp), Shelf(settings))
