"""The published models as data, and where on this machine their files are.

Order of the search: a path as given; the folders of the host; the folders in UPLIFT_MODELS (separated like PATH); the
user's own folder (``$XDG_DATA_HOME/uplift/models``, on Windows ``%LOCALAPPDATA%/uplift/models``, else
``~/.local/share/uplift/models``); the Hugging Face cache; only then the hub.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hub
from .assets import asset
from .checkpoints import config_and_source, read_weights
from .config import PRESETS
from .errors import CheckpointError, InputError
from .foreign import SUFFIXES
from .hub import Progress

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class KnownModel:
    """A published model. ``size_bytes`` is about what the download weighs."""

    name: str
    repo: str
    filename: str
    preset: str
    latent_space: str
    size_bytes: int
    description: str
    licence: str = "MIT"
    aliases: tuple[str, ...] = ()

    @property
    def bundled(self) -> bool:
        """Whether it comes with the package and is never downloaded."""
        return not self.repo


def _published(name: str, stem: str, parameters: int, description: str, *aliases: str) -> KnownModel:
    return KnownModel(name, f"UPLiFT-upsampler/{stem}", f"{stem}.safetensors", name, PRESETS[name].latent_space,
                      4 * parameters, description, aliases=(stem, *aliases))


KNOWN: dict[str, KnownModel] = {model.name: model for model in (
    _published("sd15-vae", "uplift_sd1.5vae", 53_487_445,
               "latents of the Stable Diffusion 1.5 VAE: enlarges pictures and latents", "sd15", "sd1.5-vae"),
    _published("dinov2-s14", "uplift_dinov2-s14", 789_521, "features of DINOv2 small, patch 14", "dinov2"),
    _published("dinov3-splus16", "uplift_dinov3-splus16", 789_521, "features of DINOv3 small plus, patch 16", "dinov3"),
    KnownModel("uplift-mini", "", "uplift-mini.safetensors", "", "tiny", 4_000_000,
               "the bundled small model: enlarges pictures by way of the bundled VAE 'tiny'", aliases=("mini",)),
)}

FULL, BUNDLED = "sd15-vae", "uplift-mini"
"""What enlarges pictures by default: the first where its weights are on this machine, else the second."""


@dataclass(frozen=True)
class Entry:
    """A line of the models list: a known model or a file of the user's, and where it lies (None: not there)."""

    name: str
    path: Path | None
    known: KnownModel | None = None

    @property
    def state(self) -> str:
        return str(self.path) if self.path else "not downloaded"


def lookup(name: StrPath) -> KnownModel | None:
    """The known model of this name, alias, repository or file name (in any case of letters), or None."""
    wanted = os.fspath(name).lower()
    return next((model for model in KNOWN.values()
                 if wanted in {s.lower() for s in (model.name, model.repo, model.filename, *model.aliases) if s}), None)


def default_model(folders: Iterable[StrPath] = ()) -> tuple[str, str]:
    """The model to enlarge pictures with when none is named, and a line for the user on why (empty: nothing to say).

    The bundled small model is chosen only where the SD1.5 weights are not on this machine.
    """
    if find(FULL, folders=folders) is not None:
        return FULL, ""
    return BUNDLED, (f"the SD1.5 weights are not on this machine: using the small bundled model '{BUNDLED}' "
                     f"('uplift models download {FULL}' gets the full one)")


def user_folder() -> Path:
    """Where a user's own model files are looked for when nothing else is said."""
    base = os.environ.get("XDG_DATA_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return Path(base or Path.home() / ".local" / "share") / "uplift" / "models"


def model_folders(folders: Iterable[StrPath] = ()) -> list[Path]:
    """All folders that are searched, in order, whether they exist or not."""
    listed = filter(None, os.environ.get("UPLIFT_MODELS", "").split(os.pathsep))
    every = [Path(folder).expanduser() for folder in (*folders, *listed)] + [user_folder()]
    return list(dict.fromkeys(every))


def _is_path(name: StrPath) -> bool:
    if not isinstance(name, str):
        return True
    if lookup(name) and not os.path.isfile(name):
        return False  # a folder that happens to be called like a model is not meant
    separators = (os.sep, os.altsep or os.sep)
    return any(s in name for s in separators) or name.startswith("~") or os.path.exists(name)


def find(name: StrPath, *, folders: Iterable[StrPath] = ()) -> Path | None:
    """The file of a model on this machine, or None; no network.

    ``name``: a path, a known model, or the name of a file in one of the folders, with or without its suffix.
    """
    if _is_path(name):
        path = Path(name).expanduser()
        return path if path.exists() else None
    known = lookup(name)
    if known and known.bundled:
        return asset(known.filename)
    names = [str(name), *(f"{name}{suffix}" for suffix in SUFFIXES)]
    if known:
        names = [known.filename, f"{known.name}.safetensors", *names]
    for folder in model_folders(folders):
        for candidate in names:
            if (folder / candidate).is_file():
                return folder / candidate
    return hub.cached(known.repo, known.filename) if known else None


def _unknown(name: str, folders: Iterable[StrPath]) -> InputError | CheckpointError:
    searched = ", ".join(map(str, model_folders(folders)))
    if name.lower().endswith(SUFFIXES):
        return CheckpointError(f"{name} does not exist, neither here nor in {searched}")
    pool = {alias: model.name for model in KNOWN.values() for alias in (model.name, *model.aliases)}
    near = dict.fromkeys(pool[match] for match in difflib.get_close_matches(name.lower(), pool, n=3, cutoff=0.5))
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return InputError(f"no model is called '{name}'; known are {', '.join(KNOWN)}, any file in {searched}, or a path."
                      f"{hint}")


def download(name: str, *, folder: StrPath | None = None, progress: Progress | None = None, token: str | None = None,
             revision: str | None = None, offline: bool = False) -> Path:
    """Download a known model into ``folder``, or into the Hugging Face cache when none is given.

    ``progress`` is called with the bytes there and the bytes in all; an error it raises stops the download. Raises
    InputError for an unknown name, DownloadError with address and cause, MissingExtra without huggingface_hub.
    """
    known = lookup(name)
    if known is None:
        raise _unknown(name, ())
    if known.bundled:
        return asset(known.filename)
    return hub.fetch(known.repo, known.filename, folder=Path(folder).expanduser() if folder else None,
                     by_hand=user_folder(), progress=progress, token=token, revision=revision, offline=offline)


def get(name_or_path: StrPath, *, folders: Iterable[StrPath] = (), offline: bool | None = None,
        progress: Progress | None = None) -> Path:
    """The file of a model: found on this machine, else downloaded. ``offline`` None leaves it to HF_HUB_OFFLINE.

    Raises CheckpointError for a path that is not there, InputError for an unknown name, DownloadError.
    """
    folders = tuple(folders)
    found = find(name_or_path, folders=folders)
    if found is not None:
        return found
    if _is_path(name_or_path):
        raise CheckpointError(f"{os.fspath(name_or_path)} does not exist. Check the path; 'uplift models list' shows "
                              "what is there")
    if lookup(name_or_path) is None:
        raise _unknown(str(name_or_path), folders)
    return download(str(name_or_path), progress=progress, offline=bool(offline))


def installed(folders: Iterable[StrPath] = ()) -> list[Entry]:
    """Every known model and where it lies, then the other weight files in the folders."""
    folders = tuple(folders)
    entries = [Entry(model.name, find(model.name, folders=folders), model) for model in KNOWN.values()]
    for folder in model_folders(folders):
        if folder.is_dir():
            entries += [Entry(path.name, path) for path in sorted(folder.iterdir())
                        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
                        and all(path != entry.path for entry in entries)]
    return entries


def describe(path: StrPath) -> dict[str, Any]:
    """What is in a weights file, in plain values (as for JSON). Raises CheckpointError as reading it does."""
    weights = read_weights(path)
    config, source = config_and_source(weights)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    counted = {key: value for key, value in weights.state.items() if not key.endswith(statistics)}
    return {
        "path": str(weights.path), "size_bytes": weights.path.stat().st_size,
        "parameters": sum(value.numel() for value in counted.values()),
        "dtype": ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in counted.values()})),
        "latent_space": config.latent_space or "unknown", "channels": config.channels, "patch": config.patch,
        "step_factor": config.step_factor, "attender": config.attender,
        "refiner_blocks": len(config.refiner.group.widths) if config.refiner else 0,
        "takes_noise": config.takes_noise, "config_source": source, "config": config.to_published(),
        "metadata": {key: value for key, value in weights.metadata.items() if key != "config"},
    }
