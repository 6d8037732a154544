"""UPLiFT Dense Features."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from typing import Any

import comfy.model_management as management
import folder_paths
import torch
from comfy_api.latest import io

from ..uplift_core.dense import DenseFeatures, dense_features
from ..uplift_core.errors import InputError
from ..uplift_core.features import pca_pictures
from . import backbones, host, models, options
from .feature_maps import HostFeatures, UpliftFeatures, checked
from .pictures import room, to_core
from .run import carry_out

SCALES = ["pixel", "1x", "2x", "4x", "8x"]
KEPT_IN_MEMORY = 512 << 20
"""Bytes of features; more go to a file in ComfyUI's temp folder. 384 channels at 1024x1024 are 805 MB."""


class UPLiFTDenseFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = backbones.names()
        return host.schema(
            node_id="UPLiFTDenseFeatures", display_name="UPLiFT Dense Features", category=host.CATEGORY,
            description="A feature vector of DINOv2 or DINOv3 for every pixel: the backbone's coarse map, enlarged by "
                        "UPLiFT. For masks by likeness, segments and matches.",
            search_aliases=["dino", "dinov2", "dinov3", "vit features", "pca", "feature upsampling", "segmentation"],
            inputs=[
                io.Image.Input("image", tooltip="Pictures of any size. A batch gets the same PCA colours throughout."),
                io.Combo.Input("backbone", options=names, default=names[0],
                               tooltip="The vision transformer. The two DINO models and their UPLiFT are downloaded on "
                                       "first use; other ViTs of timm lie in models/uplift_backbones."),
                io.Int.Input("resolution", default=0, min=0, max=8192, step=16,
                             tooltip="Longer side the picture is brought to first; 0 leaves it. Smaller is faster and "
                                     "takes less memory."),
                io.Combo.Input("scale", options=SCALES, default="pixel",
                               tooltip="How fine: a feature for every pixel, or 1 to 8 times the backbone's grid."),
                options.tile(),
                models.UpliftModel.Input("model", optional=True,
                                         tooltip="The UPLiFT of another backbone; the two DINO models have theirs."),
                UpliftFeatures.Input("colors_of", optional=True,
                                     tooltip="Features of the same backbone whose PCA colours are taken, so that two "
                                             "pictures can be compared."),
            ],
            outputs=[UpliftFeatures.Output(display_name="UPLIFT_FEATURES", tooltip="For the other feature nodes."),
                     io.Image.Output(display_name="PCA", tooltip="The three main directions of the features as red, "
                                                                 "green and blue.")])

    @classmethod
    def execute(cls, image: Any, backbone: str, resolution: int, scale: str, tile: str, model: Any = None,
                colors_of: Any = None) -> io.NodeOutput:
        host.choice("scale", scale, SCALES)
        host.number("resolution", resolution, 0, 8192)
        side, fine = options.chosen_tile(tile), scale if scale == "pixel" else int(scale.removesuffix("x"))
        pictures = to_core(image)
        like = None if colors_of is None else checked(colors_of).maps
        vit = backbones.load(backbone)
        if like is not None and like[0].shape[0] != vit.backbone.channels:
            raise InputError(f"colors_of has {like[0].shape[0]} channels, features of {backbone} have "
                             f"{vit.backbone.channels}; connect features of the same backbone")
        network: Any = "auto"
        bar = host.Bar(len(pictures))
        if fine != 1:
            space = vit.backbone.latent_space
            loaded = model or (models.load(space, "auto") if space else None)
            network = loaded.model if loaded else "auto"
            patchers = [vit.patcher, *([loaded.patcher] if loaded else [])]
            if loaded:
                loaded.model.run_device = loaded.patcher.load_device
        else:
            patchers = [vit.patcher]
        management.load_models_gpu(patchers)
        maps = []
        for i in range(len(pictures)):
            def work(tile: Any, i: int = i) -> DenseFeatures:
                path = _file(pictures.shape[2:], vit.backbone, fine, resolution, len(pictures))
                found = dense_features(pictures[i].cpu(), backbone=vit.backbone, model=network, scale=fine,
                                       resolution=resolution or None, tile=tile, storage=path,
                                       memory_budget=host.free_bytes(vit.patcher.load_device),
                                       progress=bar.item(i), should_stop=host.should_stop)
                if path:
                    weakref.finalize(found, _remove, path)
                return found
            maps.append(carry_out(work, side))
        shown = pca_pictures(maps, like)
        out = room(len(maps), *shown[0].shape[1:])
        for i, picture in enumerate(shown):
            out[i] = picture.movedim(0, -1)
        return io.NodeOutput(HostFeatures(maps, pictures.cpu()), out)


def _file(size: torch.Size, backbone: Any, scale: int | str, resolution: int, count: int) -> str | None:
    """A new file in ComfyUI's temp folder for what is too large for memory, else None."""
    factor = resolution / max(size) if resolution else 1.0
    stride = 1 if scale == "pixel" else backbone.patch / int(scale)
    rows, columns = (math.ceil(n * factor / stride) for n in size)
    total = 2 * backbone.channels * rows * columns
    if total * count <= KEPT_IN_MEMORY:
        return None
    folder = folder_paths.get_temp_directory()
    os.makedirs(folder, exist_ok=True)
    handle, path = tempfile.mkstemp(prefix="uplift_features_", suffix=".npy", dir=folder)
    os.close(handle)
    os.remove(path)  # only the name is wanted: the writer makes the file, whole or not at all
    return path


def _remove(path: str) -> None:
    for file in (path, path + ".json"):
        if os.path.exists(file):
            os.remove(file)
