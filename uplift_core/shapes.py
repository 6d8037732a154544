"""A configuration read off the shapes of a state dict, as far as they tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from .config import (
    PRESETS,
    DownConfig,
    GroupConfig,
    ModelConfig,
    RefinerConfig,
    UpConfig,
)
from .errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]


def _read_group(shapes: Shapes, prefix: str, incoming: int) -> GroupConfig:
    """One group off its keys; ``incoming`` channels are what an absent (identity) group passes on."""
    found = {int(m[1]) for key in shapes if (m := re.match(re.escape(prefix) + r"blocks\.(\d+)\.", key))}
    if not found:
        return GroupConfig(block="IdentityBlock", width=incoming)
    first = f"{prefix}blocks.0."
    if f"{first}up.weight" in shapes:
        widths = tuple(shapes[f"{prefix}blocks.{i}.up.weight"][1] for i in sorted(found))
        return GroupConfig(block="TransposeConv", widths=widths)
    kernels = {j: shapes[f"{first}conv.{j}.weight"][-1] for j in (0, 3, 6)
               if len(shapes.get(f"{first}conv.{j}.weight", ())) == 4}
    double = kernels.get(3) == 3
    return GroupConfig(
        block="DoubleConv" if double else "SingleConv",
        widths=tuple(shapes[f"{prefix}blocks.{i}.conv.0.weight"][0] for i in sorted(found)),
        norm="batch" if f"{first}conv.1.running_mean" in shapes else "layer",
        one_by=(6 if double else 3) in kernels)


def _incoming(shapes: Shapes, prefix: str) -> int:
    for key in (f"{prefix}blocks.0.conv.0.weight", f"{prefix}blocks.0.up.weight"):
        if key in shapes:
            return shapes[key][0 if key.endswith("up.weight") else 1]
    raise ConfigError(f"the weights have no {prefix}blocks.0: these are not the weights of an UPLiFT, or only "
                      "part of them")


def _levels_in(shapes: Shapes, part: str) -> int:
    found = [int(m[1]) for key in shapes if (m := re.match(rf"{part}\.(?:block|down|up)_(\d+)\.", key))]
    if not found:
        raise ConfigError(f"the weights have no '{part}.block_...' entries: these are not the weights of an UPLiFT, or "
                          "only part of them")
    return max(found)


def read_shapes(shapes: Shapes) -> ModelConfig:
    for name, preset in PRESETS.items():
        if _same_layout(shapes, name):
            return preset
    try:
        return _guess(shapes)
    except (KeyError, IndexError) as odd:
        raise ConfigError(f"the weights look like an UPLiFT but {odd} is missing or has an unexpected shape") from None


def _guess(shapes: Shapes) -> ModelConfig:
    encoder: list[GroupConfig] = []
    downs: list[DownConfig] = []
    width = _incoming(shapes, "encoder.block_0.")
    for g in range(_levels_in(shapes, "encoder") + 1):
        if g:
            has_conv = f"encoder.down_{g}.down.0.weight" in shapes
            downs.append(DownConfig("conv", 0.5) if has_conv else DownConfig())
        encoder.append(_read_group(shapes, f"encoder.block_{g}.", width))
        width = encoder[-1].out_channels
    widths = [group.out_channels for group in encoder]

    decoder: list[GroupConfig] = []
    ups: list[UpConfig] = []
    inputs: list[int] = []
    for s in range(_levels_in(shapes, "decoder") + 1):
        if s:
            kernel = shapes.get(f"decoder.up_{s}.up.weight")
            ups.append(UpConfig(factor=kernel[-1]) if kernel else UpConfig("none", residual="none"))
        inputs.append(_incoming(shapes, f"decoder.block_{s}."))
        decoder.append(_read_group(shapes, f"decoder.block_{s}.", inputs[-1]))

    noise = inputs[1] - decoder[0].out_channels - widths[-2] if len(decoder) > 1 else None
    channels = None
    for key in ("ref_outc.weight", "decoder.outc.weight"):
        if key in shapes:
            channels = shapes[key][0]
    if channels is None:
        channels = inputs[0] - widths[-1] - (noise or 0)
    if noise is None:
        noise = inputs[0] - widths[-1] - channels
    if noise < 0 or channels < 1 or inputs[0] != channels + widths[-1] + noise:
        raise ConfigError(f"decoder.block_0 reads {inputs[0]} channels, which is not latent + encoder map + noise "
                          f"for an encoder map of {widths[-1]}")

    attender = shapes["attender.conv1.weight"][0] if "attender.conv1.weight" in shapes else None
    refiner = None
    if "ref_outc.weight" in shapes:
        group = _read_group(shapes, "refiner.", channels)
        source, ref_noise = _refiner_source(_incoming(shapes, "refiner.") - channels, widths, noise)
        refiner = RefinerConfig(group, source, noise_channels=ref_noise)
    return ModelConfig(channels=channels, patch=8 if channels <= 64 else 16, encoder=tuple(encoder),
                       downs=tuple(downs), decoder=tuple(decoder), ups=tuple(ups), attender=attender,
                       noise_channels=noise, refiner=refiner)


def _refiner_source(extra: int, widths: list[int], noise: int) -> tuple[int, int]:
    """Which encoder map (and how many noise channels) the refiner reads beside the latent: ``extra`` in all."""
    last_first = range(len(widths) - 1, -1, -1)
    for candidate in (noise, 0):
        for g in last_first:
            if widths[g] + candidate == extra:
                return g - len(widths), candidate
    fitting = [g for g in last_first if widths[g] <= extra]
    if not fitting:
        raise ConfigError(f"the refiner reads {extra} channels beside the latent; no encoder map of {widths} fits")
    g = max(fitting, key=lambda i: widths[i])
    return g - len(widths), extra - widths[g]


def _same_layout(shapes: Shapes, name: str) -> bool:
    """Whether the guessed structure is the preset's, up to what shapes cannot tell.

    The two DINO models have the same shapes: the later one (patch 16) stands for both unless metadata says more.
    """
    if name == "dinov2-s14":
        return False
    preset = PRESETS[name]
    try:
        guess = _guess(shapes)
    except (ConfigError, KeyError, IndexError):
        return False
    return replace(guess, patch=preset.patch, latent_space=preset.latent_space,
                   image_norm=preset.image_norm) == preset
