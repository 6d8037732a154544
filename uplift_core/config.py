"""What an UPLiFT is made of, as frozen data: the published config language, read, written and guessed from weights.

A configuration travels in three forms: these dataclasses, the published YAML section (a plain ``dict``; the same
JSON goes into the metadata of files we save), and, as far as shapes can tell, the state dict itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import ConfigError

BLOCKS = ("SingleConv", "DoubleConv", "TransposeConv", "IdentityBlock")
NORMS = ("batch", "layer")
SAMPLING = ("none", "nearest", "bilinear")
ATTENDER_SIZES = (5, 9, 13, 17, 25)
MAX_LEVELS = 4


def _one_of(value: Any, allowed: tuple, what: str) -> Any:
    if value not in allowed:
        raise ConfigError(f"{what} is {value!r}; expected one of {', '.join(map(str, allowed))}")
    return value


@dataclass(frozen=True)
class GroupConfig:
    """A row of equal blocks. ``widths`` holds the output channels of each."""

    block: str = "SingleConv"
    widths: tuple[int, ...] = ()
    norm: str = "batch"
    residual: bool = True
    stride: int = 1
    one_by: bool = True
    width: int = 0  # output channels when there is no block to tell (count 0)

    def __post_init__(self) -> None:
        _one_of(self.block, BLOCKS, "block")
        _one_of(self.norm, NORMS, "norm")
        _one_of(self.stride, (1, 2), "stride")
        if any(w < 1 for w in self.widths):
            raise ConfigError(f"hc is {list(self.widths)}; expected channel counts of at least 1")
        if self.block == "DoubleConv" and self.stride == 2 and self.residual:
            raise ConfigError("a DoubleConv of stride 2 shrinks 4x, its residual 2x: set residual false or stride 1")

    @property
    def out_channels(self) -> int:
        return self.widths[-1] if self.widths else self.width

    @property
    def scale(self) -> int:
        """By how much the group enlarges a map (only the legacy transpose convolutions do)."""
        return 2 ** len(self.widths) if self.block == "TransposeConv" else 1


@dataclass(frozen=True)
class DownConfig:
    """What shrinks the map between two encoder groups: ``none``, ``conv`` or ``max``."""

    op: str = "none"
    factor: float = 1.0
    residual: str = "none"

    def __post_init__(self) -> None:
        _one_of(self.op, ("none", "conv", "max"), "down_op")
        _one_of(self.residual, ("none", "bilinear"), "residual of a down block")
        if self.op != "none" and not 0 < self.factor <= 1:
            raise ConfigError(f"factor of a down block is {self.factor}; expected 0 < factor <= 1, 0.5 to halve")

    @property
    def stride(self) -> int:
        return {"none": 1, "max": 2}.get(self.op) or int(1 / self.factor)


@dataclass(frozen=True)
class UpConfig:
    """What enlarges the map between two decoder groups: ``none`` or a transpose convolution."""

    op: str = "tconv"
    factor: int = 2
    residual: str = "bilinear"

    def __post_init__(self) -> None:
        _one_of(self.op, ("none", "tconv"), "up_op")
        _one_of(self.residual, ("none", "bilinear"), "residual of an up block")
        if self.op == "tconv" and self.factor < 1:
            raise ConfigError(f"factor of an up block is {self.factor}; expected a whole number of at least 1")

    @property
    def scale(self) -> int:
        return self.factor if self.op == "tconv" else 1


@dataclass(frozen=True)
class RefinerConfig:
    """The blocks after the attender. ``source`` (``ref_con``) indexes the encoder's maps f0..f4."""

    group: GroupConfig
    source: int
    sampling: str = "nearest"
    noise_channels: int = 0
    noise_scale: float = 1.0
    residual: bool = False  # ours: x' + refiner(x'), the last convolution starting at zero

    def __post_init__(self) -> None:
        _one_of(self.sampling, SAMPLING, "enc_resample of the refiner")


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build an UPLiFT.

    ``channels``: of the feature map or latent. ``patch``: image pixels per latent pixel. ``latent_space``: the name
    of the codec or backbone whose output it enlarges (``sd15``, ``tiny``, ``dinov2-s14``, ...; empty: unknown).
    ``latent_mean``, ``latent_std``: ours; per-channel constants the latent is normalised with (empty: none).
    """

    channels: int
    patch: int
    encoder: tuple[GroupConfig, ...]
    downs: tuple[DownConfig, ...]
    decoder: tuple[GroupConfig, ...]
    ups: tuple[UpConfig, ...]
    attender: int | None = 17
    share_encoder: bool = True
    up_factor: int = 2
    sampling: str = "nearest"
    noise_channels: int = 0
    noise_scale: float = 1.0
    residual_outc: bool = True
    refiner: RefinerConfig | None = None
    latent_space: str = ""
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    image_norm: str = field(default="")  # "imagenet" or "": how the guide is normalised before the encoder

    def __post_init__(self) -> None:
        if self.channels < 1 or self.patch < 1:
            raise ConfigError(f"channels {self.channels} and patch {self.patch} must be at least 1")
        if not 1 <= len(self.encoder) <= MAX_LEVELS + 1 or len(self.downs) != len(self.encoder) - 1:
            raise ConfigError(f"an encoder has 1 to {MAX_LEVELS + 1} groups with a down block between; "
                              f"got {len(self.encoder)} and {len(self.downs)}")
        if not 1 <= len(self.decoder) <= MAX_LEVELS + 1 or len(self.ups) != len(self.decoder) - 1:
            raise ConfigError(f"a decoder has 1 to {MAX_LEVELS + 1} groups with an up block between; "
                              f"got {len(self.decoder)} and {len(self.ups)}")
        if len(self.decoder) > len(self.encoder):
            raise ConfigError(f"decoder group {len(self.encoder)} has no encoder map left to read: "
                              f"{len(self.decoder)} decoder groups, {len(self.encoder)} encoder groups")
        if self.attender is not None:
            _one_of(self.attender, ATTENDER_SIZES, "attender")
            if self.decoder[-1].out_channels < 1:
                raise ConfigError("the decoder's last group has no channels for the attender to read")
        _one_of(self.sampling, SAMPLING, "enc_resample of the decoder")
        if self.refiner and not -len(self.encoder) <= self.refiner.source < len(self.encoder):
            raise ConfigError(f"ref_con is {self.refiner.source}; the encoder has {len(self.encoder)} maps")
        if not len(self.latent_mean) == len(self.latent_std) or len(self.latent_mean) not in (0, self.channels):
            raise ConfigError(f"latent_mean and latent_std need one number per channel ({self.channels}); "
                              f"got {len(self.latent_mean)} and {len(self.latent_std)}")
        if any(s <= 0 for s in self.latent_std):
            raise ConfigError("every latent_std must be above 0")

    @property
    def step_factor(self) -> int:
        """By how much one step enlarges the map (2 in all published models)."""
        scale = 1
        for up in self.ups:
            scale *= up.scale
        for group in self.decoder:
            scale *= group.scale
        return scale

    @property
    def takes_noise(self) -> bool:
        return self.noise_channels > 0 or (self.refiner is not None and self.refiner.noise_channels > 0)

    # -- the published language ------------------------------------------------------------------------------------

    @classmethod
    def from_published(cls, section: Mapping[str, Any], *, channels: int, patch: int) -> ModelConfig:
        """Read the ``uplift`` section of a published YAML file (as a plain mapping).

        Raises ConfigError naming the first entry that is missing or not understood.
        """
        try:
            return _read_published(section, channels=channels, patch=patch)
        except KeyError as missing:
            raise ConfigError(f"the model section has no entry {missing}; expected the layout of the published "
                              "uplift_*.yaml files") from None
        except (TypeError, AttributeError) as wrong:
            raise ConfigError(f"the model section cannot be read ({wrong}); expected nested mappings as in the "
                              "published uplift_*.yaml files") from None

    def to_published(self) -> dict[str, Any]:
        """The same configuration in the published language, with our additions only where they are used."""
        return _write_published(self)

    # -- files -----------------------------------------------------------------------------------------------------

    def to_metadata(self) -> dict[str, str]:
        """Safetensors metadata that :meth:`from_metadata` reads back."""
        data = {"format": "pt", "config": json.dumps(self.to_published()), "channels": str(self.channels),
                "patch": str(self.patch)}
        if self.latent_space:
            data["latent_space"] = self.latent_space
        if self.image_norm:
            data["image_norm"] = self.image_norm
        return data

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ModelConfig | None:
        """The configuration a file was saved with, or None when it carries none."""
        if not {"config", "channels", "patch"} <= set(metadata):
            return None
        try:
            section = json.loads(metadata["config"])
            config = cls.from_published(section, channels=int(metadata["channels"]), patch=int(metadata["patch"]))
        except ValueError as bad:
            raise ConfigError(f"the metadata of the file holds no readable configuration: {bad}") from None
        return replace(config, latent_space=metadata.get("latent_space", ""),
                       image_norm=metadata.get("image_norm", ""))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> ModelConfig:
        """Read the configuration off metadata if there is any, else off the shapes of the weights.

        Not visible in shapes, and filled in from the matching preset or else with the published models' values: the
        patch size, the noise scale, ``ref_con`` where widths tie, max-pooling between encoder groups, residuals.

        Raises ConfigError when the keys are not those of an UPLiFT.
        """
        known = cls.from_metadata(metadata or {})
        if known is not None:
            return known
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        config = _read_shapes(shapes)
        if metadata:
            if "patch" in metadata and str(metadata["patch"]).isdigit():
                config = replace(config, patch=int(metadata["patch"]))
            config = replace(config, latent_space=metadata.get("latent_space", config.latent_space))
        return config


# -- published language, in ----------------------------------------------------------------------------------------

def _group(section: Mapping[str, Any]) -> GroupConfig:
    count, widths = int(section["count"]), [int(w) for w in section.get("hc") or []]
    if count > len(widths):
        raise ConfigError(f"a group of {count} blocks needs {count} widths in hc; got {widths}")
    return GroupConfig(block=section["block"], widths=tuple(widths[:count]), norm=section.get("norm", "batch"),
                       residual=bool(section.get("residual", True)), stride=int(section.get("stride", 1)),
                       one_by=bool(section.get("one_by", True)), width=widths[-1] if widths and not count else 0)


def _levels(steps: Any, what: str) -> int:
    return _one_of(int(steps), tuple(range(MAX_LEVELS + 1)), what)


def _read_published(section: Mapping[str, Any], *, channels: int, patch: int) -> ModelConfig:
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


# -- published language, out ---------------------------------------------------------------------------------------

def _write_group(group: GroupConfig) -> dict[str, Any]:
    section: dict[str, Any] = {"block": group.block, "norm": group.norm, "count": len(group.widths),
                               "hc": list(group.widths) or [group.width]}
    for name, default in (("residual", True), ("stride", 1), ("one_by", True)):
        if getattr(group, name) != default:
            section[name] = getattr(group, name)
    return section


def _write_published(config: ModelConfig) -> dict[str, Any]:
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


# -- shapes --------------------------------------------------------------------------------------------------------

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
    raise ConfigError(f"the weights have no {prefix}blocks.0: these are not the weights of an UPLiFT")


def _levels_in(shapes: Shapes, part: str) -> int:
    found = [int(m[1]) for key in shapes if (m := re.match(rf"{part}\.(?:block|down|up)_(\d+)\.", key))]
    if not found:
        raise ConfigError(f"the weights have no '{part}.block_...' entries: these are not the weights of an UPLiFT")
    return max(found)


def _read_shapes(shapes: Shapes) -> ModelConfig:
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


# -- the published models ------------------------------------------------------------------------------------------

def _layer(*widths: int) -> GroupConfig:
    return GroupConfig("SingleConv", widths, norm="layer")


def _sd15_vae() -> ModelConfig:
    return ModelConfig(
        channels=4, patch=8, latent_space="sd15",
        encoder=(_layer(64, 64), _layer(128, 128), _layer(256, 256), _layer(512, 512), _layer(512, 512)),
        downs=(DownConfig(),) * 4, decoder=(_layer(512), _layer(512, 512)), ups=(UpConfig(),), noise_channels=4,
        refiner=RefinerConfig(_layer(*[512] * 12), source=-1, noise_channels=4))


def _dino(patch: int, space: str) -> ModelConfig:
    return ModelConfig(
        channels=384, patch=patch, latent_space=space, image_norm="imagenet",
        encoder=tuple(GroupConfig("SingleConv", (w,)) for w in (16, 32, 64, 128, 128)), downs=(DownConfig(),) * 4,
        decoder=(GroupConfig("DoubleConv", (64,)),) * 2, ups=(UpConfig(),))


PRESETS: dict[str, ModelConfig] = {
    "sd15-vae": _sd15_vae(),
    "dinov2-s14": _dino(14, "dinov2-s14"),
    "dinov3-splus16": _dino(16, "dinov3-splus16"),
}


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
