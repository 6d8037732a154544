"""The ways VAE weights are named in files, told apart by key names and brought to the one that diffusers has.

Hyper-parameters are read off the shapes. Nothing in here needs a tensor: keys and shapes are enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Shape = tuple[int, ...]

PREFIXES = ("first_stage_model.", "vae.", "")

# Of a full checkpoint: which keys beside those of the VAE tell the family.
FAMILIES = (("conditioner.", "sdxl"), ("model.diffusion_model.joint_blocks.", "sd3"),
            ("model.diffusion_model.double_blocks.", "flux"), ("cond_stage_model.", "sd15"))

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
              "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_TINY = re.compile(r"(?:taesd_)?(encoder|decoder)\.(layers\.)?(\d+)\.(.+)")


class NotAVae(ValueError):
    """The keys or shapes are not those of a VAE that is known here; the message says which one and why."""


@dataclass(frozen=True)
class Layout:
    """How to load a file: class and configuration for diffusers, and where each entry comes from."""

    kind: str  # AutoencoderKL or AutoencoderTiny
    config: dict[str, Any]
    source: dict[str, str]  # diffusers' key -> key in the file
    family: str = ""  # a latent space, if the other entries of the file tell


def recognise(shapes: Mapping[str, Shape]) -> Layout:
    """The layout of a file with these entries. Raises NotAVae."""
    for prefix in PREFIXES:
        if f"{prefix}decoder.conv_in.weight" in shapes:
            own = {key[len(prefix):]: key for key in shapes if key.startswith((prefix + "encoder.", prefix + "decoder.",
                   prefix + "quant_conv.", prefix + "post_quant_conv."))}
            source = kl_keys(own)
            family = next((name for start, name in FAMILIES if any(key.startswith(start) for key in shapes)), "")
            return Layout("AutoencoderKL", kl_config({new: shapes[old] for new, old in source.items()}), source, family)
    source = tiny_keys(shapes)
    if source:
        return Layout("AutoencoderTiny", tiny_config({new: shapes[old] for new, old in source.items()}), source)
    raise NotAVae("it has no entry 'decoder.conv_in.weight', with or without 'first_stage_model.'")


def kl_keys(keys: Mapping[str, str]) -> dict[str, str]:
    """Rename LDM or older diffusers entries of an AutoencoderKL; ``keys`` and the result: name -> name in the file."""
    ups = 1 + max((int(m[1]) for key in keys if (m := re.match(r"decoder\.up\.(\d+)\.", key))), default=-1)
    return {_kl_key(key, ups): old for key, old in keys.items()}


def _kl_key(key: str, ups: int) -> str:
    """One key. LDM counts the decoder's levels from the fine end, diffusers from the coarse end, ``ups`` in all."""
    if m := re.fullmatch(r"(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.(\d+)\.(.+)", key):
        level = f"down_blocks.{m[2]}" if m[1] == "encoder" else f"up_blocks.{ups - 1 - int(m[2])}"
        return f"{m[1]}.{level}.resnets.{m[3]}.{m[4].replace('nin_shortcut', 'conv_shortcut')}"
    if m := re.fullmatch(r"encoder\.down\.(\d+)\.downsample\.(.+)", key):
        return f"encoder.down_blocks.{m[1]}.downsamplers.0.{m[2]}"
    if m := re.fullmatch(r"decoder\.up\.(\d+)\.upsample\.(.+)", key):
        return f"decoder.up_blocks.{ups - 1 - int(m[1])}.upsamplers.0.{m[2]}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.block_(\d+)\.(.+)", key):
        return f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}.{m[3].replace('nin_shortcut', 'conv_shortcut')}"
    if m := re.fullmatch(r"(encoder|decoder)\.(?:mid\.attn_1|mid_block\.attentions\.0)\.(\w+)\.(weight|bias)", key):
        return f"{m[1]}.mid_block.attentions.0.{_ATTENTION.get(m[2], m[2])}.{m[3]}"
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", key)


def kl_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Configuration of an AutoencoderKL from diffusers' keys; the rest as in Stable Diffusion 1.5. Raises NotAVae."""
    for key, shape in shapes.items():
        if len(shape) == 5:
            raise NotAVae(f"'{key}' is {shape}: a VAE for video; expected one for pictures")
    widths: list[int] = []
    while (key := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in shapes:
        if len(shapes[key]) != 4:
            raise NotAVae(f"'{key}' is {shapes[key]}; expected 4 dimensions")
        widths.append(shapes[key][0])
    if not widths:
        raise NotAVae("its entry 'encoder.down.0.block.0.conv1.weight' is missing; a decoder alone is not enough")
    count = len({key.split(".")[4] for key in shapes if key.startswith("encoder.down_blocks.0.resnets.")})
    decoder_in = shapes["decoder.conv_in.weight"]
    image_in = shapes.get("encoder.conv_in.weight", (0, 3))
    if len(decoder_in) != 4 or len(image_in) < 2 or image_in[1] != 3:
        raise NotAVae(f"'encoder.conv_in.weight' is {image_in} and 'decoder.conv_in.weight' is {decoder_in}; expected "
                      "3 colours and 4 dimensions")
    if any(width % 32 for width in widths):
        raise NotAVae(f"its widths are {widths}; expected multiples of 32, the groups of the normalisation")
    config: dict[str, Any] = {
        "in_channels": 3, "out_channels": 3, "block_out_channels": tuple(widths), "layers_per_block": count,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "latent_channels": decoder_in[1], "norm_num_groups": 32, "sample_size": 512}
    # Only where it differs from the default: older diffusers do not know these options.
    if "quant_conv.weight" not in shapes:
        config["use_quant_conv"] = False
    if "post_quant_conv.weight" not in shapes:
        config["use_post_quant_conv"] = False
    if not any(".mid_block.attentions." in key for key in shapes):
        config["mid_block_add_attention"] = False
    return config


def tiny_half(keys: Iterable[str]) -> str:
    """Which half of a TAESD pair has these plain keys ("0.weight", "1.conv.0.weight", ...), or empty."""
    names = set(keys)
    if not names or not all(re.fullmatch(r"\d+\.(conv\.\d+\.)?(skip\.)?(weight|bias)", name) for name in names):
        return ""
    return "encoder" if "0.weight" in names else "decoder" if "1.weight" in names else ""


def tiny_keys(keys: Iterable[str]) -> dict[str, str]:
    """Diffusers' keys of an AutoencoderTiny -> keys in the file; empty if the file is none.

    TAESD's own decoder counts the clamp in front as layer 0, diffusers does not.
    """
    found = {key: m for key in keys if (m := _TINY.fullmatch(key))}
    if not found or not any(m[4].startswith("conv.") for m in found.values()):
        return {}
    plain = [int(m[3]) for m in found.values() if m[1] == "decoder" and not m[2]]
    shift = 1 if plain and min(plain) == 1 else 0
    return {f"{m[1]}.layers.{int(m[3]) - (shift if m[1] == 'decoder' and not m[2] else 0)}.{m[4]}": key
            for key, m in found.items()}


def tiny_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Configuration of an AutoencoderTiny from diffusers' keys and shapes. Raises NotAVae."""
    config: dict[str, Any] = {"in_channels": 3, "out_channels": 3}
    for half in ("encoder", "decoder"):
        layers = sorted({int(key.split(".")[2]) for key in shapes if key.startswith(f"{half}.layers.")})
        if not layers:
            raise NotAVae(f"it has no entries of the {half}")
        single = [i for i in layers if f"{half}.layers.{i}.weight" in shapes]
        # Residual blocks between two single convolutions: a level.
        runs = [sum(low < i < high for i in layers) for low, high in pairwise(single)]
        first, last = (shapes.get(f"{half}.layers.{i}.weight", ()) for i in (layers[0], layers[-1]))
        if not runs or len(first) != 4 or len(last) != 4:
            raise NotAVae(f"'{half}.layers.{layers[0]}.weight' and '{half}.layers.{layers[-1]}.weight' should be the "
                          f"first and last convolution and are {first} and {last}")
        config[f"num_{half}_blocks"] = tuple(runs)
        config[f"{half}_block_out_channels"] = (first[0],) * len(runs)
        config["latent_channels"] = last[0] if half == "encoder" else first[1]
    return config
