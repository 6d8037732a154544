"""What comes with the package: the tiny codec, the small model for it, and sample photographs. See MODEL_CARD.md."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError


def asset(name: str) -> Path:
    """The path of a bundled file. Raises CheckpointError when the installation lacks it."""
    path = Path(__file__).parent / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the installation is not whole. Install uplift-upscale again")
    return path
