"""UPLiFT models in ComfyUI: the folder ``models/uplift``, the names in the list, and weights the host looks after."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.ops
import folder_paths
import torch
from comfy_api.latest import io

from ..uplift_core import registry
from ..uplift_core.checkpoints import build, read_weights
from ..uplift_core.devices import choose_dtype
from ..uplift_core.errors import CheckpointError, InputError
from ..uplift_core.foreign import SUFFIXES
from ..uplift_core.model import UPLiFT
from ..uplift_core.tiling import Progress, estimate_memory
from ..uplift_core.vae.spaces import BUNDLED_VAE, LATENT_SPACES
from . import host

log = logging.getLogger(__name__)
FOLDER = "uplift"
DOWNLOAD, BUNDLED = " (download)", " (bundled)"
DTYPES = ["auto", "fp32", "fp16", "bf16"]

UpliftModel = io.Custom("UPLIFT_MODEL")


def register_folder() -> None:
    """Make ``models/uplift`` known to ComfyUI, beside whatever extra_model_paths.yaml says."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    # With no suffixes set, everything in the folder would be listed.
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(SUFFIXES))


def folders() -> list[str]:
    return list(folder_paths.get_folder_paths(FOLDER))


def _published() -> list[registry.KnownModel]:
    """Known models that enlarge the latents of a VAE."""
    return [known for known in registry.KNOWN.values() if known.latent_space in LATENT_SPACES]


def names() -> list[str]:
    """The model list: files, then what is bundled, then what can be downloaded."""
    files = folder_paths.get_filename_list(FOLDER)
    known = _published()
    there = [model for model in known if not model.bundled and registry.find(model.name, folders=folders()) is not None]
    kept = [model.filename for model in there if model.filename not in files]  # in the Hugging Face cache, say
    return [*files, *kept, *(model.name + BUNDLED for model in known if model.bundled),
            *(model.filename + DOWNLOAD for model in known if not model.bundled and model not in there)]


def _plain(name: str) -> str:
    """The name without its mark. A workflow saved before the download, or after it elsewhere, means the same model."""
    return name.removesuffix(DOWNLOAD).removesuffix(BUNDLED)


def locate(name: str) -> Path | None:
    """The file of a name from the list, or None when it has to be downloaded. Raises CheckpointError."""
    plain = _plain(name)
    listed = folder_paths.get_full_path(FOLDER, plain)
    if listed:
        return Path(listed)
    known = registry.lookup(plain)
    if known is None:
        raise CheckpointError(f"the model '{name}' is not in {' or '.join(folders())}; put the file there, or choose "
                              f"one of: {', '.join(names())}")
    return registry.find(known.name, folders=folders())


@dataclass(frozen=True)
class HostModel:
    """A loaded UPLiFT whose weights ComfyUI moves to the device when they are used and away when others need room."""

    name: str
    model: UPLiFT
    patcher: Any
    dtype: torch.dtype

    @property
    def channels(self) -> int:
        return self.model.config.channels

    @property
    def patch(self) -> int:
        return self.model.config.patch

    def ready(self, height: int, width: int, scale: int, tile: str | int | None) -> UPLiFT:
        """The model, its weights in place for a guide of that size. The host frees what the work will take."""
        device = self.patcher.load_device
        self.model.run_device = device
        side = None if tile in ("auto", None) else int(tile)  # type: ignore[arg-type]
        needed = estimate_memory(self.model, height, width, scale, side, self.dtype)
        if tile == "auto" and device.type != "cpu":
            # Whatever is more than the device has will be done in tiles.
            needed = min(needed, int(management.get_total_memory(device) * 0.6))
        management.load_models_gpu([self.patcher], memory_required=needed)
        return self.model


def load(name: str, dtype: str, progress: Progress | None = None) -> HostModel:
    """A model from the list, downloaded into ``models/uplift`` if need be.

    Raises CheckpointError for a file that is missing or no UPLiFT, DownloadError, InputError.
    """
    path = locate(name)
    if name.endswith(BUNDLED):
        log.info("%s: the small bundled model, for photographs and the UPLiFT Tiny VAE; SD1.5 latents need the "
                 "published weights or a file of your own", name)
    if path is None:
        path = registry.download(_plain(name), folder=folders()[0], progress=progress)
    device, away = management.get_torch_device(), management.unet_offload_device()
    # Nodes run in inference mode; weights made in it could not be moved or patched outside.
    with torch.inference_mode(False):
        weights = read_weights(path)
        parameters = sum(value.numel() for value in weights.state.values())
        number = host.preferred_dtype(device, parameters) if dtype == "auto" else choose_dtype(dtype, device)
        model = build(weights, operations=comfy.ops.disable_weight_init)
        if dtype == "auto" and number == torch.bfloat16 and model.config.latent_space == BUNDLED_VAE:
            number = torch.float32  # its latents are pixels nearly, of which bf16 keeps too few levels
        model = model.to(away, number)
        patcher = host.patcher_class()(model, load_device=device, offload_device=away)
    if model.config.step_factor < 2:
        raise InputError(f"{path} keeps the size of what it is given (up_steps 0): it cannot enlarge pictures")
    return HostModel(Path(name).name, model, patcher, number)
