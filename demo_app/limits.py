"""What comes in from outside: pictures and paths are checked here, and refused in words, before anything is done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from .settings import Settings

if TYPE_CHECKING:
    from uplift_core.imageio import Picture

MAX_FILE_BYTES = 1 << 30
"""Of one upload: Gradio stops reading there."""
MAX_BATCH = 64


def picture_input(**options: Any) -> gr.Image:
    """Gradio's image, which hands over the uploaded file unread: the core's reader is the one that judges it."""
    component = gr.Image(**{"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"], **options})
    component.preprocess = _as_it_came  # type: ignore[method-assign]
    return component


def _as_it_came(payload: Any) -> str | None:
    return str(payload.path) if payload is not None and payload.path is not None else None


def open_picture(path: str | None, settings: Settings, scale: float = 1.0) -> Picture:
    """The uploaded picture. Raises InputError in words that name the file as its owner knows it."""
    from uplift_core.errors import InputError, UpliftError
    from uplift_core.imageio import read_picture

    if not path:
        raise InputError("there is no picture yet: drop one into the box, or take an example")
    name = os.path.basename(path)
    try:
        picture = read_picture(path, settings.max_pixels)
    except UpliftError as error:
        raise type(error)(str(error).replace(path, name)) from None
    height, width = (round(n * scale) for n in picture.rgb.shape[1:])
    if height * width > settings.max_result:
        raise InputError(f"{name}: the result would have {width}x{height} pixels, more than the limit of "
                         f"{settings.max_result:,}; choose a smaller scale or picture, or raise --max-pixels")
    return picture


def local_path(text: str, settings: Settings) -> Path:
    """A path that somebody typed. Raises InputError where others than the owner of the machine may be typing."""
    from uplift_core.errors import InputError

    if not settings.alone:
        raise InputError("paths can only be named on the machine itself: the page is open to others (--listen or "
                         "--share). Upload the file instead")
    path = Path(text.strip().strip('"')).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist")
    return path
