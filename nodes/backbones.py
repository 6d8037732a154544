"""Vision transformers in ComfyUI: the list, and a loaded one whose weights ComfyUI moves."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import torch

from ..uplift_core.backbones import BACKBONES, SUFFIXES, Backbone, import_timm, load_backbone
from ..uplift_core.errors import InputError
from . import host

FOLDER = "uplift_backbones"

if importlib.util.find_spec("timm") is None:
    # Without it the nodes are no use, and an entry in the menu that can only fail helps nobody.
    raise ImportError("it needs the package timm: pip install timm")
import_timm()  # one that cannot be imported is no use either; about a second where torchvision is loaded anyway


def _register_folder() -> None:
    """Make ``models/uplift_backbones`` known to ComfyUI."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(SUFFIXES))


_register_folder()


def names() -> list[str]:
    """The two that published models are made for, then files of other ViTs, called by their timm names."""
    known = set(BACKBONES.values())
    return [*BACKBONES, *(name for name in folder_paths.get_filename_list(FOLDER) if Path(name).stem not in known)]


def locate(name: str) -> str:
    """What :func:`load_backbone` is to be given: a file here, or the name. Raises InputError."""
    wanted = [f"{BACKBONES[name]}{suffix}" for suffix in SUFFIXES] if name in BACKBONES else [name]
    for file in wanted:
        if path := folder_paths.get_full_path(FOLDER, file):
            return str(path)
    if name not in BACKBONES:
        raise InputError(f"the backbone '{name}' is not in {' or '.join(folder_paths.get_folder_paths(FOLDER))}; "
                         f"choose one of: {', '.join(names())}")
    return name


@dataclass(frozen=True)
class HostBackbone:
    """A backbone and the host's patcher around it."""

    backbone: Backbone
    patcher: Any


def load(name: str) -> HostBackbone:
    """Raises InputError, CheckpointError, DownloadError, MissingExtra."""
    device, away = management.get_torch_device(), management.unet_offload_device()
    with torch.inference_mode(False):
        backbone = load_backbone(locate(name), device="cpu", folders=folder_paths.get_folder_paths(FOLDER))
        parameters = sum(p.numel() for p in backbone.module.parameters())
        backbone.to(away, host.preferred_dtype(device, parameters))
        return HostBackbone(backbone, host.patcher_class()(backbone.module, load_device=device, offload_device=away))
