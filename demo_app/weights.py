"""The weights the page can use: by name, never by a caller's path, and loaded when first needed.

One model, one VAE and one backbone are kept in memory; the one queue sees to it that only one job uses them.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .jobs import Job
from .settings import Settings

if TYPE_CHECKING:
    from uplift_core import UPLiFT
    from uplift_core.backbones import Backbone

T = TypeVar("T")

PICTURE_MODELS = ("sd15-vae", "uplift-mini")
FEATURE_MODELS = ("dinov3-splus16", "dinov2-s14")
VAES = ("sd15", "taesd", "tiny")


class Shelf:
    """Names -> weights. ``added``: files that were named by flag, path or upload, by the name they are shown under."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.models: dict[str, Path] = {}
        self.vaes: dict[str, Path] = {}
        self.spaces: dict[str, str] = {}
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._lock = threading.Lock()
        self.default_model = self._from_flag(settings.model, self.models)
        self.default_vae = self._from_flag(settings.vae, self.vaes) if settings.vae else "auto"

    @staticmethod
    def _from_flag(text: str, place: dict[str, Path]) -> str:
        path = Path(text).expanduser()
        if path.suffix and path.exists() or path.is_dir() and os.sep in text:
            place[path.name] = path.resolve()
            return path.name
        return text

    # -- what there is --------------------------------------------------------------------------------------------

    def model_names(self, known: tuple[str, ...] = PICTURE_MODELS) -> list[str]:
        """auto, the published models for this work, the files in the model folders, what was added."""
        from uplift_core.registry import installed

        files = [entry.name for entry in installed()
                 if entry.known is None and not is_backbone(entry.name)]
        return list(dict.fromkeys(["auto", *known, *files, *self.models]))

    def vae_names(self) -> list[str]:
        return list(dict.fromkeys(["auto", *VAES, *self.vaes]))

    # -- loading --------------------------------------------------------------------------------------------------

    def model(self, name: str, job: Job) -> tuple[UPLiFT, str, str]:
        """The model, the name it really has, and a line on why it was chosen. Raises InputError, CheckpointError."""
        from uplift_core import load
        from uplift_core.registry import default_model

        note = ""
        if name == "auto" and self.default_model != "auto":
            name = self.default_model
        if name == "auto":
            name, note = default_model()
            if note:
                note = (f"The SD1.5 weights are not on this machine, so this is the small bundled model, {name}. The "
                        "Models tab downloads the full one.")
        path = self._model_file(name)
        job.say(f"Loading {name}")
        return self._keep("model", (path, _stamp(path)), lambda: load(path, device=self.settings.device)), name, note

    def vae(self, name: str, net: UPLiFT, job: Job) -> tuple[Any, str]:
        """The codec on the model's device and the name it has; ``auto`` is the one the model was made for."""
        from uplift_core import load_vae
        from uplift_core.errors import InputError

        name = self.default_vae if name in ("", "auto") else name
        if name in ("", "auto"):
            name = net.config.latent_space
            if not name:
                raise InputError("the model file does not say which latents it enlarges; choose a VAE")
        where = self._vae_source(name)
        parameter = next(net.parameters())
        job.say(f"Loading the VAE {name}")
        key = (where, _stamp(where), parameter.device, parameter.dtype)
        return self._keep("vae", key, lambda: load_vae(where, device=parameter.device, dtype=parameter.dtype,
                                                             offline=self.settings.offline or None)), name

    def backbone(self, name: str, job: Job) -> Backbone:
        from uplift_core.backbones import BACKBONES, load_backbone
        from uplift_core.errors import InputError

        if name not in BACKBONES:
            raise InputError(f"no backbone is called {name!r}; choose one of {', '.join(BACKBONES)}")
        job.say(f"Loading {name}")
        # Without asking the network: fetching is what the Models tab is for.
        return self._keep("backbone", name, lambda: load_backbone(name, device=self.settings.device, offline=True))

    def features_model(self, name: str, job: Job) -> UPLiFT:
        """An UPLiFT for features; whether it fits the backbone, the core says."""
        from uplift_core import load

        path = self._model_file(name)
        job.say(f"Loading {name}")
        return self._keep("features", (path, _stamp(path)), lambda: load(path, device=self.settings.device))

    def kept(self, slot: str, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` gives, kept until something else is asked for in this slot."""
        return self._keep(slot, key, make)

    def _keep(self, slot: str, key: Any, make: Callable[[], T]) -> T:
        with self._lock:
            if self._loaded.get(slot, (None, None))[0] != key:
                self._loaded.pop(slot, None)  # first, so that two never lie in memory together
                self._loaded[slot] = (key, make())
            return self._loaded[slot][1]

    def _model_file(self, name: str) -> Path:
        from uplift_core.errors import CheckpointError, InputError
        from uplift_core.registry import find, installed, lookup

        if name in self.models:
            return self.models[name]
        known = lookup(name)
        if known is not None:
            path = find(known.name)
            if path is None:
                raise CheckpointError(f"the weights of {known.name} are not on this machine; the Models tab downloads "
                                      f"them ({known.size_bytes / 1e6:.0f} MB) or takes a file")
            return path
        path = next((entry.path for entry in installed() if entry.name == name and entry.path), None)
        if path is None:
            raise InputError(f"no model is called {name!r}; there are {', '.join(self.model_names())}. The Models tab "
                             "takes further files")
        return path

    def _vae_source(self, name: str) -> Path | str:
        from uplift_core.errors import CheckpointError, InputError
        from uplift_core.vae import ALIASES

        if name in self.vaes:
            return self.vaes[name]
        if name not in VAES and name not in ALIASES:
            raise InputError(f"no VAE is called {name!r}; there are {', '.join(self.vae_names())}. The Models tab "
                             "takes further files")
        if name in ALIASES and not vae_is_here(name):
            raise CheckpointError(f"the VAE {name} is not on this machine; the Models tab downloads it or takes a file")
        return name

    # -- adding ---------------------------------------------------------------------------------------------------

    def add(self, path: Path, job: Job) -> tuple[str, str]:
        """Take a weights file (or a VAE's folder) in, if it is one: its name, and what it is.

        Raises CheckpointError with the reasons why it is neither a model nor a VAE.
        """
        from uplift_core import load, load_vae
        from uplift_core.errors import CheckpointError, UpliftError

        job.say(f"Reading {path.name}")
        reasons = []
        if path.is_file():
            try:
                net = load(path, device="cpu")
            except UpliftError as error:
                reasons.append(f"as an UPLiFT model: {error}")
            else:
                name = self._place(path, self.models, net.config.latent_space)
                return name, f"an UPLiFT model for {net.config.latent_space or 'unknown latents'}"
        job.check()
        try:
            codec = load_vae(path)
        except UpliftError as error:
            reasons.append(f"as a VAE: {error}")
        else:
            name = self._place(path, self.vaes, codec.latent_space)
            return name, f"a VAE of {codec.latent_space or 'an unknown latent space'}"
        text = "; ".join(reason.replace(str(path), path.name) for reason in reasons)
        raise CheckpointError(f"{path.name} was not taken in. Tried {text}")

    def _place(self, path: Path, place: dict[str, Path], space: str) -> str:
        name, number = path.name, 1
        while name in place and place[name] != path:
            number += 1
            name = f"{path.stem} ({number}){path.suffix}"
        place[name], self.spaces[name] = path, space
        return name

    def keep_upload(self, path: Path) -> Path:
        """An uploaded file at a place from which Gradio does not clear it away."""
        folder = self.settings.temp / "models"
        folder.mkdir(exist_ok=True)
        target, number = folder / path.name, 1
        while target.exists():
            number += 1
            target = folder / f"{path.stem}-{number}{path.suffix}"
        shutil.move(path, target)
        return target


def is_backbone(name: str) -> bool:
    """Whether a file is called like one of the backbones, which lie in the same folders."""
    from uplift_core.backbones import BACKBONES

    return any(name.startswith(timm_name.split(".")[0]) for timm_name in BACKBONES.values())


def vae_is_here(name: str) -> bool:
    """Whether a VAE of ``uplift_core.vae.ALIASES`` is in the hub's cache."""
    from uplift_core import hub
    from uplift_core.vae import ALIASES
    from uplift_core.vae.loading import WEIGHTS

    repo, _, folder = ALIASES[name].partition(":")
    at = f"{folder}/" if folder else ""
    return bool(hub.cached(repo, f"{at}config.json")) and any(hub.cached(repo, at + w) for w in WEIGHTS)


def _stamp(path: Path | str) -> Any:
    """What changes when a file does."""
    if isinstance(path, str) or not path.is_file():
        return None
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size
