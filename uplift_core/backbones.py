"""Images to features: vision transformers of timm, by name or from a local file or folder."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import hub
from .devices import choose_device, choose_dtype
from .errors import CheckpointError, DownloadError, InputError, MissingExtra, UpliftError
from .model import IMAGENET_MEAN, IMAGENET_STD
from .registry import StrPath, model_folders, user_folder

BACKBONES = {"dinov2-s14": "vit_small_patch14_dinov2.lvd142m",
             "dinov3-splus16": "vit_small_plus_patch16_dinov3.lvd1689m"}
"""The backbones the published models enlarge, by latent space, as timm calls them."""

SUFFIXES = (".safetensors", ".bin", ".pth")


class Backbone:
    """A frozen vision transformer. Last block, final norm applied, prefix tokens dropped (spec of the published
    models)."""

    def __init__(self, module: Any, name: str):
        self.module = module.eval().requires_grad_(False)
        self.name = name
        size = module.patch_embed.patch_size
        self.patch = int(size[0] if isinstance(size, (tuple, list)) else size)
        self.channels = int(module.num_features)
        self.latent_space = next((space for space, timm_name in BACKBONES.items() if timm_name == name), "")

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Backbone:
        self.module.to(device=device, dtype=dtype)
        return self

    def normalise(self, image: Tensor) -> Tensor:
        """RGB in [0, 1], ``b 3 H W``, to what the network was trained on."""
        settings = getattr(self.module, "pretrained_cfg", None) or {}
        mean = torch.tensor(settings.get("mean", IMAGENET_MEAN), device=image.device, dtype=image.dtype)
        std = torch.tensor(settings.get("std", IMAGENET_STD), device=image.device, dtype=image.dtype)
        return (image - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """``b 3 H W`` in [0, 1], sides multiples of the patch, to features ``b c H/patch W/patch``."""
        if image.shape[2] % self.patch or image.shape[3] % self.patch:
            raise InputError(f"the picture is {image.shape[3]} x {image.shape[2]} pixels; {self.name} needs multiples "
                             f"of {self.patch}")
        weight = next(self.module.parameters())
        x = self.normalise(image).to(weight.device, weight.dtype)
        maps = self.module.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
        return maps[-1].to(image.device, torch.float32)


def import_timm() -> Any:
    """The package timm. Raises MissingExtra when it is not installed, UpliftError when it cannot be imported."""
    if importlib.util.find_spec("timm") is None:
        raise MissingExtra("timm", "features", "Computing features")
    try:
        return importlib.import_module("timm")
    except Exception as error:  # a package that does not fit torch or torchvision fails in many ways
        raise UpliftError(f"the package timm is installed but cannot be imported ({type(error).__name__}: {error}); "
                          "timm, torch and torchvision have to fit: pip install --upgrade timm") from error


def load_backbone(name_or_path: StrPath, *, device: str | torch.device = "cpu",
                  dtype: str | torch.dtype = torch.float32, pretrained: bool = True, offline: bool | None = None,
                  folders: Iterable[StrPath] = ()) -> Backbone:
    """A timm vision transformer by latent space (``dinov2-s14``), timm name, or path of a local weights file or
    folder whose name begins with the timm name (``vit_small_patch14_dinov2.lvd142m.safetensors``).

    A name is looked for in ``folders``, the model folders (see registry.py), in the Hugging Face cache, then on the
    hub. ``offline`` True never asks the hub, None leaves it to HF_HUB_OFFLINE. ``pretrained`` False: random weights.

    Raises InputError, CheckpointError, DownloadError, MissingExtra.
    """
    timm = import_timm()
    where, searched = choose_device(device), [Path(folder).expanduser() for folder in folders]
    name = os.fspath(name_or_path)
    timm_name, path = BACKBONES.get(name, name), Path(name).expanduser()
    if pretrained and not path.exists():
        path = in_folders(timm_name, searched) or path
    weights = None
    if path.exists():
        weights, timm_name = _weights_in(path), _timm_name(path)
    if not timm.is_model(timm_name.split(".")[0]):
        if name in BACKBONES:
            raise InputError(f"timm {timm.__version__} is too old for {name}: it has no {timm_name}; "
                             "pip install --upgrade timm")
        raise InputError(f"{name!r} is no model of timm and no file; expected {', '.join(BACKBONES)}, a name that "
                         "timm.list_models() shows, or the path of a weights file called like one")
    if not hasattr(timm.models, "VisionTransformer"):
        raise InputError("this version of timm is too old; install timm 1.0 or newer")
    if weights is None and pretrained:
        weights = _from_hub(timm, timm_name, (*searched, user_folder())[0], bool(offline))
    # Not with the reader for .npz files that some models name for their own.
    options = {"pretrained_cfg_overlay": {"file": str(weights), "custom_load": False}} if weights else {}
    try:
        module = timm.create_model(timm_name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **options)
    except TypeError:
        raise InputError(f"{timm_name} is no vision transformer: it takes no pictures of any size") from None
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{weights} does not fit {timm_name}: {str(error).splitlines()[0]}") from None
    if not hasattr(module, "forward_intermediates"):
        raise InputError(f"{timm_name} gives no feature maps; expected a vision transformer")
    return Backbone(module, timm_name).to(where, choose_dtype(dtype, where))


def in_folders(timm_name: str, folders: Iterable[StrPath] = ()) -> Path | None:
    """The file or folder of such weights in ``folders`` or the model folders, or None."""
    names = (*(timm_name + suffix for suffix in SUFFIXES), timm_name)
    return next((folder / n for folder in model_folders(folders) for n in names if (folder / n).exists()), None)


def _from_hub(timm: Any, timm_name: str, by_hand: Path, offline: bool) -> Path:
    """The weights in the hub's cache, after a download if need be: not by timm, which asks for two files six times each
    and tells of every try. ``by_hand``: the folder that an error names."""
    try:
        about = timm.models.get_pretrained_cfg(timm_name)
    except RuntimeError as error:
        raise InputError(f"timm has no such weights: {error}") from None
    if about is None or not about.hf_hub_id:
        raise InputError(f"timm names no weights on the hub for {timm_name}; put your own into {by_hand} as "
                         f"{timm_name}.safetensors")
    files = [about.hf_hub_filename] if about.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for file in files:
        if found := hub.cached(about.hf_hub_id, file):
            return found
    missing: list[DownloadError] = []
    for file in files:
        try:
            return hub.fetch(about.hf_hub_id, file, folder=None, by_hand=by_hand,
                             rename=f"{timm_name}{Path(file).suffix}", offline=offline)
        except DownloadError as error:
            missing.append(error)
            if not hub.is_absent(error):
                break
    raise missing[0]


def _weights_in(path: Path) -> Path:
    if path.is_file():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path} holds no model.safetensors")


def _timm_name(path: Path) -> str:
    import timm

    for name in (path.stem if path.is_file() else path.name, path.parent.name):
        if timm.is_model(name.split(".")[0]):
            return name
    raise InputError(f"{path}: call the file or its folder by the timm name of the model, such as "
                     f"{BACKBONES['dinov2-s14']}.safetensors")
