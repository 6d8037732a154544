"""The published config language: the ``uplift`` section of a YAML file, as a plain mapping, in and out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from .config import MAX_LEVELS, DownConfig, GroupConfig, ModelConfig, RefinerConfig, UpConfig, one_of
from .errors import ConfigError

_BLOCK = ("block", "norm", "count", "hc", "residual", "stride", "one_by")
_LEVELS = range(MAX_LEVELS + 1)
KNOWN: dict[str, Any] = {
    **dict.fromkeys(("up_factor", "no_UEP", "attender", "enc_share", "latent_mean", "latent_std")),
    "encoder": {"down_steps": None, **{f"block_{g}": _BLOCK for g in _LEVELS},
                **{f"down_{g}": ("down_op", "factor", "residual") for g in _LEVELS[1:]}},
    "decoder": {**dict.fromkeys(("up_steps", "ncat_c", "ncat_s", "enc_resample", "residual_outc")),
                **{f"block_{g}": _BLOCK for g in _LEVELS},
                **{f"up_{g}": ("up_op", "factor", "residual") for g in _LEVELS[1:]}},
    "refiner": {**dict.fromkeys(("enc_resample", "ncat_c", "ncat_s", "ref_con", "residual")), "block_0": _BLOCK},
}
"""Every entry of the language: its published ones and ours."""


def unknown_entry(section: Mapping[str, Any], known: Any = None, where: str = "") -> str:
    """What is wrong with the first entry that is not of the language, or a group with a width too many; or empty.

    A published file may say more than is read; in a file that a person writes it is a mistake.
    """
    known = KNOWN if known is None else known
    for name, value in section.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            return f"{where}{name} is not known" + (f"; did you mean {where}{near[0]}?" if near else
                                                    f"; expected one of {', '.join(known)}")
        inner = known[name] if isinstance(known, Mapping) else None
        if inner and isinstance(value, Mapping):
            if wrong := unknown_entry(value, inner, f"{where}{name}."):
                return wrong
            widths, count = value.get("hc"), value.get("count")
            if isinstance(widths, list) and isinstance(count, int) and 0 < count < len(widths):
                return f"{where}{name}: {len(widths)} widths in hc, but count is {count}"
    return ""


def _part(section: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = section[name]
    if not isinstance(part, Mapping):
        raise ConfigError(f"{name} is {part!r}; expected entries")
    return part


def _int(value: Any, name: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {value!r}; expected a whole number") from None


def _float(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {value!r}; expected a number") from None


def _floats(values: Any, name: str) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ConfigError(f"{name} is {values!r}; expected a list of numbers")
    return tuple(_float(value, name) for value in values)


def _group(section: Mapping[str, Any]) -> GroupConfig:
    listed = section.get("hc") or []
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise ConfigError(f"hc is {listed!r}; expected a list of widths")
    count, widths = _int(section["count"], "count"), [_int(w, "hc") for w in listed]
    if count > len(widths):
        raise ConfigError(f"a group of {count} blocks needs {count} widths in hc; got {widths}")
    return GroupConfig(block=section["block"], widths=tuple(widths[:count]), norm=section.get("norm", "batch"),
                       residual=bool(section.get("residual", True)), stride=_int(section.get("stride", 1), "stride"),
                       one_by=bool(section.get("one_by", True)), width=widths[-1] if widths and not count else 0)


def _levels(steps: Any, what: str) -> int:
    return one_of(_int(steps, what), tuple(_LEVELS), what)


def read(section: Mapping[str, Any], *, channels: int, patch: int) -> ModelConfig:
    enc, dec = _part(section, "encoder"), _part(section, "decoder")
    down_steps, up_steps = _levels(enc["down_steps"], "down_steps"), _levels(dec["up_steps"], "up_steps")
    downs = []
    for g in range(1, down_steps + 1):
        down = _part(enc, f"down_{g}")
        factor = down.get("factor", 1.0 if down["down_op"] == "none" else 0.5)
        downs.append(DownConfig(down["down_op"], _float(factor, f"down_{g}.factor"), down.get("residual", "none")))
    ups = []
    for s in range(1, up_steps + 1):
        up = _part(dec, f"up_{s}")
        ups.append(UpConfig(up["up_op"], _int(up.get("factor", 2), f"up_{s}.factor"), up.get("residual", "none")))
    attender = section.get("attender", -1)
    refiner = None
    if section.get("refiner"):
        ref = _part(section, "refiner")
        refiner = RefinerConfig(group=_group(_part(ref, "block_0")),
                                source=_int(ref.get("ref_con", -1 - up_steps), "ref_con"),
                                sampling=ref.get("enc_resample", "none"),
                                noise_channels=_int(ref.get("ncat_c", 0), "ncat_c"),
                                noise_scale=_float(ref.get("ncat_s", 1), "ncat_s"),
                                residual=bool(ref.get("residual", False)))
    return ModelConfig(
        channels=channels, patch=patch,
        encoder=tuple(_group(_part(enc, f"block_{g}")) for g in range(down_steps + 1)), downs=tuple(downs),
        decoder=tuple(_group(_part(dec, f"block_{s}")) for s in range(up_steps + 1)), ups=tuple(ups),
        attender=None if attender in (-1, None) else _int(attender, "attender"),
        share_encoder=bool(section.get("enc_share", False)), up_factor=_int(section.get("up_factor", 2), "up_factor"),
        sampling=dec.get("enc_resample", "none"), noise_channels=_int(dec.get("ncat_c", 0), "ncat_c"),
        noise_scale=_float(dec.get("ncat_s", 1), "ncat_s"), residual_outc=bool(dec.get("residual_outc", True)),
        refiner=refiner, latent_mean=_floats(section.get("latent_mean", ()), "latent_mean"),
        latent_std=_floats(section.get("latent_std", ()), "latent_std"))


def _write_group(group: GroupConfig) -> dict[str, Any]:
    section: dict[str, Any] = {"block": group.block, "norm": group.norm, "count": len(group.widths),
                               "hc": list(group.widths) or [group.width]}
    for name, default in (("residual", True), ("stride", 1), ("one_by", True)):
        if getattr(group, name) != default:
            section[name] = getattr(group, name)
    return section


def write(config: ModelConfig) -> dict[str, Any]:
    encoder: dict[str, Any] = {"down_steps": len(config.downs)}
    for g, group in enumerate(config.encoder):
        if g:
            down = config.downs[g - 1]
            encoder[f"down_{g}"] = {"down_op": down.op, "factor": down.factor, "residual": down.residual}
        encoder[f"block_{g}"] = _write_group(group)
    decoder: dict[str, Any] = {"up_steps": len(config.ups), "ncat_c": config.noise_channels,
                               "ncat_s": config.noise_scale, "enc_resample": config.sampling}
    if not config.residual_outc:
        decoder["residual_outc"] = False
    for s, group in enumerate(config.decoder):
        if s:
            up = config.ups[s - 1]
            decoder[f"up_{s}"] = {"up_op": up.op, "factor": up.factor, "residual": up.residual}
        decoder[f"block_{s}"] = _write_group(group)
    section: dict[str, Any] = {"up_factor": config.up_factor, "attender": config.attender or -1,
                               "enc_share": config.share_encoder, "encoder": encoder, "decoder": decoder}
    if config.refiner:
        ref = config.refiner
        section["refiner"] = {"enc_resample": ref.sampling, "ncat_c": ref.noise_channels, "ncat_s": ref.noise_scale,
                              "ref_con": ref.source, "block_0": _write_group(ref.group)}
        if ref.residual:
            section["refiner"]["residual"] = True
    if config.latent_mean:
        section["latent_mean"], section["latent_std"] = list(config.latent_mean), list(config.latent_std)
    return section
