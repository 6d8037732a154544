"""A training run as data: small YAML files, read strictly."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..config import PRESETS, ModelConfig
from ..errors import ConfigError, MissingExtra
from ..published import unknown_entry
from ..vae.patchnet import PatchNetConfig
from ..vae.spaces import LATENT_SPACES

LOSSES = ("l2", "l1", "log", "cosine")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")


@dataclass(frozen=True)
class ModelPart:
    """The UPLiFT to train: a preset by name, or channels, patch and the model section in the published language.

    ``latent_space``: what the weights file says (empty: the teacher's; of a codec that is trained: ``own``).
    ``start``: a weights file or known model to begin with instead of random weights. ``linear_start``: begin at the
    linear optimum instead (linear_start.py). ``fixed_norm``: batch norms keep their statistics (with linear_start,
    which sets none, they stay a gain and a shift; a small batch's own would disturb what is carried).
    """

    preset: str = ""
    channels: int = 0
    patch: int = 0
    latent_space: str = ""
    uplift: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    linear_start: bool = False
    fixed_norm: bool = False


@dataclass(frozen=True)
class TeacherPart:
    """What makes the targets: a ``vae`` or a ``backbone``, by name or path. One of the two. ``latent_space``: of a VAE
    whose file does not say it; a name that begins with ``own`` for a VAE of your own."""

    vae: str = ""
    backbone: str = ""
    latent_space: str = ""


@dataclass(frozen=True)
class DataPart:
    """Pictures of ``folder`` (the command's --data comes before it).

    ``size``: the side S of a crop. ``depths``: for each d the input is S / 2^d and d steps are taken.

    ``crop``: random or center, after a resize of the shorter side to S times up to ``zoom`` (random, at least 1).
    ``crops_per_photo``: how many different crops a picture has before they come again (0: no end). ``flips``: mirror,
    ``turns``: quarter turns. ``guides_decoded``: the share of guides that are decoded latents instead of originals.
    ``keep``: memory for decoded pictures (each worker's own). ``cache``: a folder for latents (empty: none).
    """

    folder: str = ""
    size: int = 256
    depths: tuple[int, ...] = (1, 2)
    batch: int = 8
    crop: str = "random"
    zoom: float = 1.0
    crops_per_photo: int = 0
    flips: bool = True
    turns: bool = False
    guides_decoded: float = 0.0
    workers: int = 0
    keep: str = ""
    cache: str = ""


@dataclass(frozen=True)
class LatentPart:
    """``augment``: std of the noise added to the input latents, in their own units (paper B.1: 1.0 for SD1.5).

    ``normalise``: measure mean and std per channel on the first pictures and keep them in the configuration.
    """

    augment: float = 0.0
    normalise: bool = False


@dataclass(frozen=True)
class OptimizerPart:
    """``decay``: the last share of the steps over which the rate falls to 0 linearly. ``warmup``: steps. ``clip``:
    norm of the gradient, 0 for none. ``ema``: of the weights, 0 for none."""

    name: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 0
    decay: float = 0.0
    clip: float = 0.0
    ema: float = 0.0


@dataclass(frozen=True)
class RunPart:
    """``steps``, or ``epochs`` where steps is 0. Intervals in steps, 0 for never; ``save_keep``: snapshots kept.

    ``precision``: fp32, or mixed: fp16, bf16, or auto for one of them on a GPU that is quick in it, fp32 elsewhere.
    """

    steps: int = 0
    epochs: float = 0.0
    seed: int = 0
    precision: str = "fp32"
    log_every: int = 20
    preview_every: int = 1000
    preview_photos: int = 4
    save_every: int = 1000
    save_keep: int = 2


@dataclass(frozen=True)
class AutoencoderPart:
    """A diffusers ``AutoencoderTiny`` to train from scratch, or from ``model.start``; for people with a GPU.

    ``channels`` of the latent; ``levels`` of halved size (4: a latent pixel is 8x8 pixels), each of ``blocks`` residual
    blocks of ``width`` channels (one block at full size). ``anchor``: how strongly the first three latent channels are
    held to the mean colours of their blocks; without it, the latents of short runs collapse to luminance.
    """

    channels: int = 16
    width: int = 64
    levels: int = 4
    blocks: int = 3
    anchor: float = 0.1
    latent_space: str = "own"

    @property
    def patch(self) -> int:
        return 1 << (self.levels - 1)


@dataclass(frozen=True)
class Recipe:
    """All of a run. ``codec`` or ``autoencoder``: set for ``uplift train-vae``, in which case teacher is unused.

    ``loss``: of objective.LOSSES; ``loss_floor``: what "log" adds to every picture's mean square.
    """

    name: str
    model: ModelPart = field(default_factory=ModelPart)
    teacher: TeacherPart = field(default_factory=TeacherPart)
    codec: PatchNetConfig | None = None
    autoencoder: AutoencoderPart | None = None
    data: DataPart = field(default_factory=DataPart)
    latents: LatentPart = field(default_factory=LatentPart)
    optimizer: OptimizerPart = field(default_factory=OptimizerPart)
    run: RunPart = field(default_factory=RunPart)
    loss: str = "l2"
    loss_floor: float = 1e-4

    def __post_init__(self) -> None:
        _check(self)

    @property
    def is_codec(self) -> bool:
        return self.codec is not None or self.autoencoder is not None

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def model_config(self) -> ModelConfig:
        """The configuration the run starts from, before latents are measured."""
        part = self.model
        if part.preset:
            return PRESETS[part.preset]
        config = ModelConfig.from_published(part.uplift, channels=part.channels, patch=part.patch)
        return ModelConfig(**{**{f.name: getattr(config, f.name) for f in fields(config)},
                              "latent_space": part.latent_space})


def _check(recipe: Recipe) -> None:
    data, run, optimizer = recipe.data, recipe.run, recipe.optimizer

    def need(true: bool, what: str) -> None:
        if not true:
            raise ConfigError(f"{recipe.name}: {what}")

    need(recipe.loss in LOSSES, f"loss is {recipe.loss!r}; expected one of {', '.join(LOSSES)}")
    need(run.precision in PRECISIONS, f"run.precision is {run.precision!r}; expected one of {', '.join(PRECISIONS)}")
    need(run.steps >= 0 and run.epochs >= 0 and (run.steps > 0 or run.epochs > 0), "set run.steps or run.epochs")
    need(min(run.log_every, run.preview_every, run.preview_photos, run.save_every) >= 0, "run.log_every, "
         "preview_every, preview_photos and save_every must be at least 0")
    need(run.save_keep >= 1, f"run.save_keep is {run.save_keep}; expected at least 1")
    need(run.seed >= 0, f"run.seed is {run.seed}; expected at least 0")
    need(recipe.latents.augment >= 0, f"latents.augment is {recipe.latents.augment}; expected at least 0")
    need(recipe.loss_floor > 0, f"loss_floor is {recipe.loss_floor}; expected above 0")
    need(data.batch > 0 and data.size > 0, "data.size and data.batch must be at least 1")
    need(data.crop in ("random", "center"), f"data.crop is {data.crop!r}; expected random or center")
    need(min(data.workers, data.crops_per_photo) >= 0, "data.workers and data.crops_per_photo must be at least 0")
    need(data.zoom >= 1, f"data.zoom is {data.zoom}; expected at least 1")
    need(0 <= data.guides_decoded <= 1, f"data.guides_decoded is {data.guides_decoded}; expected 0 to 1")
    need(optimizer.name in ("adam", "adamw"), f"optimizer.name is {optimizer.name!r}; expected adam or adamw")
    need(optimizer.lr > 0, f"optimizer.lr is {optimizer.lr}; expected above 0")
    need(min(optimizer.warmup, optimizer.clip, optimizer.weight_decay) >= 0, "optimizer.warmup, clip and weight_decay "
         "must be at least 0")
    need(0 <= optimizer.decay <= 1, f"optimizer.decay is {optimizer.decay}; expected 0 to 1")
    need(0 <= optimizer.ema < 1, f"optimizer.ema is {optimizer.ema}; expected at least 0 and below 1")
    if part := recipe.autoencoder:
        need(recipe.codec is None, "set codec or autoencoder, not both")
        need(min(part.channels, part.width, part.blocks) >= 1 and part.levels >= 2 and part.anchor >= 0,
             "autoencoder: channels, width and blocks are at least 1, levels at least 2, anchor at least 0")
        need(part.channels >= 3 or not part.anchor, "autoencoder.anchor needs at least 3 channels")
        need(bool(part.latent_space) and part.latent_space not in LATENT_SPACES, "autoencoder.latent_space is a new "
             f"name, not empty and none of {', '.join(LATENT_SPACES)}")
    if coded := recipe.codec or recipe.autoencoder:
        patch = coded.patch
        need(data.size % patch == 0, f"data.size is {data.size}; expected a multiple of {patch}")
        return
    need(bool(data.depths) and all(d >= 1 for d in data.depths), f"data.depths is {list(data.depths)}; expected "
         "numbers of at least 1")
    need(bool(recipe.teacher.vae) != bool(recipe.teacher.backbone), "set teacher.vae or teacher.backbone, one of them")
    need(recipe.model.preset in ("", *PRESETS), f"model.preset is {recipe.model.preset!r}; expected one of "
         f"{', '.join(PRESETS)}")
    need(bool(recipe.model.preset or recipe.model.uplift), "set model.preset, or model.channels, model.patch and "
         "model.uplift")
    need(not (data.guides_decoded and recipe.teacher.backbone), "data.guides_decoded needs a VAE")
    if wrong := unknown_entry(recipe.model.uplift):
        raise ConfigError(f"{recipe.name}: model.uplift.{wrong}")
    config = recipe.model_config()
    need(config.step_factor == 2, f"the model enlarges {config.step_factor}x a step; this trainer wants 2x")
    smallest = config.patch * 2**max(data.depths)
    need(data.size % smallest == 0, f"data.size is {data.size}; patch {config.patch} and depth {max(data.depths)} need "
         f"a multiple of {smallest}")


# -- reading -------------------------------------------------------------------------------------------------------

_FOLDER = Path(__file__).parent / "recipes"


def named_recipes() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name or file. ``changes``: dotted entries to replace, such as ``{"run.steps": 100}``.

    Raises ConfigError naming the file and the entry.
    """
    try:
        import yaml
    except ImportError:
        raise MissingExtra("pyyaml", "train", "Reading a training recipe") from None
    path = Path(name_or_path).expanduser()
    if not path.is_file() and str(name_or_path) in named_recipes():
        path = _FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ConfigError(f"{name_or_path}: no such recipe; give a .yaml file or one of {', '.join(named_recipes())}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as bad:
        raise ConfigError(f"{path}: not readable as YAML ({bad})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections such as model, teacher, data and run")
    for dotted, value in (changes or {}).items():
        place, *rest = dotted.split(".")
        node = content
        for part in rest:
            node, place = node.setdefault(place, {}), part
            if not isinstance(node, dict):
                raise ConfigError(f"{path}: {dotted}: there is no such entry")
        node[place] = value
    content.setdefault("name", path.stem)
    return from_dict(content, str(path))


def from_dict(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The reverse of ``Recipe.to_dict``. Raises ConfigError."""
    return _build(Recipe, content, where)


def _build(kind: Any, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected entries, found {content!r}")
    known = {f.name for f in fields(kind)}
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ConfigError(f"{where}: '{name}' is not known" + (f"; did you mean '{near[0]}'?" if near else
                                                                   f"; expected one of {', '.join(sorted(known))}"))
    types_of = typing.get_type_hints(kind)
    return kind(**{name: _value(types_of[name], value, f"{where}: {name}") for name, value in content.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if is_dataclass(kind):
        return _build(kind, value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        return tuple(_value(typing.get_args(kind)[0], v, where) for v in value)
    if typing.get_origin(kind) is dict:
        kind = dict
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 1e-3 for text
        except ValueError:
            pass
    if kind is str and value is None:
        return ""  # "cache:" in YAML
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value
