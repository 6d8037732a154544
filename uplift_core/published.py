"""The published config language: the ``uplift`` section of a YAML file, as a plain mapping, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import MAX_LEVELS, DownConfig, GroupConfig, ModelConfig, RefinerConfig, UpConfig, one_of
from .errors import ConfigError


def _group(section: Mapping[str, Any]) -> GroupConfig:
    count, widths = int(section["count"]), [int(w) for w in section.get("hc") or []]
    if count > len(widths):
        raise ConfigError(f"a group of {count} blocks needs {count} widths in hc; got {widths}")
    return GroupConfig(block=section["block"], widths=tuple(widths[:count]), norm=section.get("norm", "batch"),
                       residual=bool(section.get("residual", True)), stride=int(section.get("stride", 1)),
                       one_by=bool(section.get("one_by", True)), width=widths[-1] if widths and not count else 0)


def _levels(steps: Any, what: str) -> int:
    return one_of(int(steps), tuple(range(MAX_LEVELS + 1)), what)


def read(section: Mapping[str, Any], *, channels: int, patch: int) -> ModelConfig:
    enc, dec = section["encoder"], section["decoder"]
    down_steps, up_steps = _levels(enc["down_steps"], "down_steps"), _levels(dec["up_steps"], "up_steps")
    downs = []
    for g in range(1, down_steps + 1):
        down = enc[f"down_{g}"]
        downs.append(DownConfig(down["down_op"], float(down.get("factor", 1.0 if down["down_op"] == "none" else 0.5)),
                                down.get("residual", "none")))
    ups = []
    for s in range(1, up_steps + 1):
        up = dec[f"up_{s}"]
        ups.append(UpConfig(up["up_op"], int(up.get("factor", 2)), up.get("residual", "none")))
    attender = section.get("attender", -1)
    refiner = None
    if section.get("refiner"):
        ref = section["refiner"]
        refiner = RefinerConfig(group=_group(ref["block_0"]), source=int(ref.get("ref_con", -1 - up_steps)),
                                sampling=ref.get("enc_resample", "none"), noise_channels=int(ref.get("ncat_c", 0)),
                                noise_scale=float(ref.get("ncat_s", 1)), residual=bool(ref.get("residual", False)))
    return ModelConfig(
        channels=channels, patch=patch,
        encoder=tuple(_group(enc[f"block_{g}"]) for g in range(down_steps + 1)), downs=tuple(downs),
        decoder=tuple(_group(dec[f"block_{s}"]) for s in range(up_steps + 1)), ups=tuple(ups),
        attender=None if attender in (-1, None) else int(attender),
        share_encoder=bool(section.get("enc_share", False)), up_factor=int(section.get("up_factor", 2)),
        sampling=dec.get("enc_resample", "none"), noise_channels=int(dec.get("ncat_c", 0)),
        noise_scale=float(dec.get("ncat_s", 1)), residual_outc=bool(dec.get("residual_outc", True)), refiner=refiner,
        latent_mean=tuple(map(float, section.get("latent_mean", ()))),
        latent_std=tuple(map(float, section.get("latent_std", ()))))


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
