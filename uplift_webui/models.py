"""UPLiFT models in the WebUI: the folder ``models/UPLiFT``, the names in the list, one model kept in main memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uplift_core import registry
from uplift_core.checkpoints import build, read_weights
from uplift_core.devices import choose_dtype
from uplift_core.errors import Cancelled, CheckpointError, InputError
from uplift_core.foreign import SUFFIXES
from uplift_core.model import UPLiFT

from . import options
from .hosts import Host

log = logging.getLogger(__name__)

FOLDER = "UPLiFT"
SPACE = "sd15"
"""The latents that these hosts' routes enlarge."""

PUBLISHED = registry.KNOWN[registry.FULL]


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and the host's handle on it. ``key``: what it was loaded from, and how."""

    key: tuple[Any, ...]
    model: UPLiFT
    handle: Any
    dtype: torch.dtype


_kept: Loaded | None = None


def folders(host: Host) -> list[Path]:
    """Where model files are looked for first: the path of the settings page, then ``models/UPLiFT``."""
    path = options.read(host).models_path
    own = [Path(path).expanduser()] if path else []
    return [*own, host.models_folder() / FOLDER]


def names(host: Host) -> list[str]:
    """The list of the settings page: the published model, then the other files in the folders."""
    found = [entry.name for folder in folders(host) if folder.is_dir() for entry in sorted(folder.iterdir())
             if entry.suffix.lower() in SUFFIXES and entry.is_file() and not entry.name.startswith(".")]
    return list(dict.fromkeys([PUBLISHED.name, *(name for name in found if name != PUBLISHED.filename)]))


def locate(host: Host, name: str) -> Path | None:
    """The file of a model from the list, or None when it has to be downloaded. Raises CheckpointError."""
    known = registry.lookup(name)
    found = registry.find(name, folders=folders(host))
    if found is None and (known is None or known.bundled):
        raise CheckpointError(f"the UPLiFT model '{name}' is not in {' or '.join(map(str, folders(host)))}; put the "
                              "file there, or choose another one in Settings -> UPLiFT")
    return found


def download(host: Host, name: str = PUBLISHED.name) -> Path:
    """Bring a published model into the first folder, with a line of progress. Raises DownloadError, Cancelled."""
    known = registry.lookup(name) or PUBLISHED
    folder = folders(host)[0]
    log.warning("UPLiFT: downloading %s (%d MB) into %s", known.filename, known.size_bytes // 10**6, folder)
    before = host.state.textinfo

    def tell(done: int, total: int) -> None:
        if host.should_stop():
            raise Cancelled("the download was stopped on request")
        host.state.textinfo = (f"UPLiFT: downloading {known.filename}, {done // 10**6} of "
                               f"{(total or known.size_bytes) // 10**6} MB")

    try:
        return registry.download(known.name, folder=folder, progress=tell)
    finally:
        host.state.textinfo = before


def load(host: Host) -> Loaded:
    """The model of the settings page, from memory if it is there, downloaded if need be.

    Raises CheckpointError for a file that is missing or no UPLiFT for SD 1.5 latents, DownloadError, InputError.
    """
    global _kept
    settings = options.read(host)
    path = locate(host, settings.model) or download(host, settings.model)
    about = path.stat()
    key = (type(host), str(path), about.st_mtime_ns, about.st_size, settings.precision, str(host.device()))
    if _kept is not None and _kept.key == key:
        return _kept
    _kept = None  # the old weights go before the new ones come
    # Some hosts sample in inference mode; weights made in it could not be moved outside.
    with torch.inference_mode(False):
        weights = read_weights(path)
        device = host.device()
        parameters = sum(value.numel() for value in weights.state.values())
        dtype = (host.preferred_dtype(device, parameters) if settings.precision == "auto"
                 else choose_dtype(settings.precision, device))
        model = build(weights)
        _check(model, path)
        model = model.to(host.home(), dtype)
        _kept = Loaded(key, model, host.wrap(model), dtype)
    log.info("UPLiFT: %s, %s on %s", path.name, str(dtype).removeprefix("torch."), device)
    return _kept


def forget() -> None:
    """Let go of the kept model."""
    global _kept
    _kept = None


def _check(model: UPLiFT, path: Path) -> None:
    config = model.config
    if config.latent_space not in ("", SPACE) or (config.channels, config.patch) != (4, 8):
        raise InputError(f"{path.name} enlarges {config.latent_space or 'other'} maps of {config.channels} channels, "
                         f"not Stable Diffusion 1.5 latents; choose {PUBLISHED.name} in Settings -> UPLiFT")
    if config.step_factor != 2:
        raise InputError(f"{path.name} enlarges {config.step_factor} times a step; models that double are expected")
