"""What the user can set on the settings page: names, defaults, and reading them."""

from __future__ import annotations

from dataclasses import dataclass

from uplift_core.color import COLOR_METHODS
from uplift_core.upscaling import parse_tile

from .hosts import Host

MODEL, MODELS_PATH, PRECISION, TILE = "uplift_model", "uplift_models_path", "uplift_precision", "uplift_tile"
NOISE, COLOR_FIX = "uplift_hires_noise", "uplift_color_fix"

DEFAULTS = {MODEL: "sd15-vae", MODELS_PATH: "", PRECISION: "auto", TILE: "auto", NOISE: 1.0, COLOR_FIX: "mean"}
PRECISIONS = ["auto", "fp32", "fp16", "bf16"]
TILES = ["auto", "off", "256", "512", "1024"]
MAX_NOISE = 2.0


@dataclass(frozen=True)
class Settings:
    """The settings page as it is now, checked. ``tile``: "auto", None or a side in pixels."""

    model: str
    models_path: str
    precision: str
    tile: str | int | None
    noise: float
    color_fix: str


def read(host: Host) -> Settings:
    """The settings now; a value nobody can use (edited by hand, or sent through the API) counts as the default."""
    values = {name: host.option(name, default) for name, default in DEFAULTS.items()}
    tile = str(values[TILE])
    return Settings(
        model=str(values[MODEL] or DEFAULTS[MODEL]), models_path=str(values[MODELS_PATH]).strip(),
        precision=values[PRECISION] if values[PRECISION] in PRECISIONS else "auto",
        tile=parse_tile(tile if tile in TILES else "auto", 8), noise=noise_or(values[NOISE], 1.0),
        color_fix=values[COLOR_FIX] if values[COLOR_FIX] in COLOR_METHODS else "mean")


def noise_or(value: object, default: float) -> float:
    """A noise strength from 0 to 2, else the default."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return default
    return number if 0 <= number <= MAX_NOISE else default
