"""Result files: each in a folder of its own below the temporary folder, old ones removed."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from pathlib import Path

KEEP_SECONDS = 2 * 3600


class Storage:
    """Hands out paths for results. Nobody else's can be guessed, and nothing lies there for ever."""

    def __init__(self, temp: Path):
        self.folder = temp / "results"
        self.folder.mkdir(parents=True, exist_ok=True)

    def new(self, name: str) -> Path:
        """A path that is not there yet, with ``name`` made harmless as its last part."""
        self._clean()
        place = self.folder / secrets.token_urlsafe(16)
        place.mkdir()
        return place / safe_name(name)

    def _clean(self) -> None:
        limit = time.time() - KEEP_SECONDS
        for place in self.folder.iterdir():
            try:
                if place.stat().st_mtime < limit:
                    shutil.rmtree(place, ignore_errors=True)
            except OSError:
                continue


def safe_name(name: str) -> str:
    """A file name without folders, control characters and surprises."""
    cleaned = re.sub(r"[^\w.() +-]", "_", Path(name.replace("\\", "/")).name).strip(". ")
    stem, dot, suffix = cleaned.rpartition(".")
    return f"{(stem if dot else cleaned)[:80] or 'picture'}{dot}{suffix if dot else ''}"
