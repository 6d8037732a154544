"""The inputs that several nodes share, with their tooltips, defaults and checks."""

from __future__ import annotations

from comfy_api.latest import io

from . import host, models

TILES = ["auto", "off", "256", "512", "1024"]


def model() -> io.Input:
    return models.UpliftModel.Input("model", tooltip="From Load UPLiFT Model.")


def scale(options: list[str]) -> io.Input:
    return io.Combo.Input("scale", options=options, default="2x", tooltip="How many times larger, on each side.")


def seed() -> io.Input:
    return io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                        tooltip="Seed of the model's noise, which gives texture. The same seed gives the same picture "
                                "on every machine, with or without tiles; item i of a batch takes seed + i.")


def noise_strength() -> io.Input:
    return io.Float.Input("noise_strength", default=1.0, min=0.0, max=2.0, step=0.05,
                          tooltip="How much of that noise: 1 as trained, 0 none, above 1 more grain.")


def tile() -> io.Input:
    return io.Combo.Input("tile", options=TILES, default="auto",
                          tooltip="Side of a tile in pixels of the small picture. Tiles are exact: they only save "
                                  "memory and leave no seams. auto: as large as fits; off: none, unless memory runs "
                                  "out.")


def check_noise(seed: int, noise_strength: float) -> None:
    """Raises InputError: not every ComfyUI checks the limits of every input."""
    host.number("seed", seed, 0, 0xffffffffffffffff)
    host.number("noise_strength", noise_strength, 0, 2)


def chosen_scale(value: str, options: list[str]) -> float:
    """The factor of a "2x". Raises InputError."""
    factor = float(host.choice("scale", value, options).removesuffix("x"))
    return int(factor) if factor == int(factor) else factor


def chosen_tile(value: str) -> str | int | None:
    """"auto", None or a side in pixels. Raises InputError."""
    host.choice("tile", str(value), TILES)
    return {"auto": "auto", "off": None}.get(value) if value in ("auto", "off") else int(value)
