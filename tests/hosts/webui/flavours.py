"""In what the five hosts differ, as far as an extension can tell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flavour:
    """``memory``: the package with the manager of memory. ``inference``: pictures are made in inference mode.
    ``autocast``: the sampler runs under it. ``unit_pictures``: the picture that is handed to ``sample_hr_pass`` is
    in 0 to 1. ``keeps_path``: the folder of the extension stays on sys.path. ``gradio``: which signatures."""

    name: str
    memory: str
    inference: bool
    autocast: bool
    unit_pictures: bool
    keeps_path: bool
    gradio: str
    version: str = ""


FLAVOURS = [
    Flavour("a1111", "devices", False, True, False, False, "3.41.2"),
    Flavour("reforge", "ldm_patched", True, False, False, True, "3.41.2", "1.0.0v2-v1.10.1RC"),
    Flavour("classic", "ldm_patched", True, False, False, True, "3.41.2", "classic"),
    Flavour("forge", "backend", True, False, False, True, "4.40.0", "2.0.1v1.10.1"),
    Flavour("neo", "backend", True, False, True, True, "4.40.0", "neo"),
]
