"""What an UPLiFT is made of, as frozen data.

A configuration travels in three forms: these dataclasses, the published YAML section (published.py; the same as JSON
goes into the metadata of files we save), and, as far as shapes can tell, the state dict itself (shapes.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import ConfigError

BLOCKS = ("SingleConv", "DoubleConv", "TransposeConv", "IdentityBlock")
NORMS = ("batch", "layer")
SAMPLING = ("none", "nearest", "bilinear")
ATTENDER_SIZES = (5, 9, 13, 17, 25)
MAX_LEVELS = 4


def one_of(value: Any, allowed: tuple, what: str) -> Any:
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
        one_of(self.block, BLOCKS, "block")
        one_of(self.norm, NORMS, "norm")
        one_of(self.stride, (1, 2), "stride")
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
        one_of(self.op, ("none", "conv", "max"), "down_op")
        one_of(self.residual, ("none", "bilinear"), "residual of a down block")
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
        one_of(self.op, ("none", "tconv"), "up_op")
        one_of(self.residual, ("none", "bilinear"), "residual of an up block")
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
        one_of(self.sampling, SAMPLING, "enc_resample of the refiner")


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
            one_of(self.attender, ATTENDER_SIZES, "attender")
            if self.decoder[-1].out_channels < 1:
                raise ConfigError("the decoder's last group has no channels for the attender to read")
        one_of(self.sampling, SAMPLING, "enc_resample of the decoder")
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
        from . import published

        try:
            return published.read(section, channels=channels, patch=patch)
        except KeyError as missing:
            raise ConfigError(f"the model section has no entry {missing}; expected the layout of the published "
                              "uplift_*.yaml files") from None
        except (TypeError, AttributeError) as wrong:
            raise ConfigError(f"the model section cannot be read ({wrong}); expected nested mappings as in the "
                              "published uplift_*.yaml files") from None

    def to_published(self) -> dict[str, Any]:
        """The same configuration in the published language, with our additions only where they are used."""
        from . import published

        return published.write(self)

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
        except (ValueError, OverflowError) as bad:
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
        from .shapes import read_shapes

        known = cls.from_metadata(metadata or {})
        if known is not None:
            return known
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        config = read_shapes(shapes)
        if metadata:
            of_dinov2 = metadata.get("latent_space") == "dinov2-s14" or str(metadata.get("patch")) == "14"
            if config == PRESETS["dinov3-splus16"] and of_dinov2:  # which has the same shapes
                config = PRESETS["dinov2-s14"]
            patch = str(metadata.get("patch", ""))
            if patch.isdigit() and int(patch) > 0:
                config = replace(config, patch=int(patch))
            config = replace(config, latent_space=metadata.get("latent_space") or config.latent_space)
        return config


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
