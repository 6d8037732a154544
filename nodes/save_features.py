"""UPLiFT Save Features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from . import host
from .feature_maps import UpliftFeatures, checked

FORMATS = ["safetensors", "npy"]
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


class UPLiFTSaveFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="UPLiFTSaveFeatures", display_name="UPLiFT Save Features", category=host.CATEGORY,
            description="Writes features to the output folder, one file a picture, for other programs.",
            search_aliases=["export features", "npy", "safetensors"], is_output_node=True,
            inputs=[
                UpliftFeatures.Input("features", tooltip="From UPLiFT Dense Features."),
                io.String.Input("filename_prefix", default="features", tooltip="May name a folder: dino/features."),
                io.Combo.Input("format", options=FORMATS, default="safetensors",
                               tooltip="safetensors also tells the picture's size and the stride; npy is for NumPy."),
                io.Combo.Input("dtype", options=list(DTYPES), default="fp16", tooltip="The number format in the file."),
            ],
            outputs=[])

    @classmethod
    def execute(cls, features: Any, filename_prefix: str, format: str, dtype: str) -> io.NodeOutput:
        host.choice("format", format, FORMATS)
        host.choice("dtype", dtype, list(DTYPES))
        given = checked(features)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory())
        written = []
        for found in given.maps:
            host.stop_if_asked()
            while (path := Path(folder) / f"{name}_{counter:05}_.{format}").exists():
                counter += 1
            found.save(path, dtype=DTYPES[dtype])
            written.append(str(Path(subfolder) / path.name))
        return io.NodeOutput(ui={"text": written})
