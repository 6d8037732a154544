"""The nodes. Each is a module of its own; one that cannot be imported is left out, with a line in the log."""

from __future__ import annotations

import importlib
import logging

from comfy_api.latest import ComfyExtension, io

from .models import register_folder

log = logging.getLogger(__name__)

MODULES = {
    "model_loader": "UPLiFTModelLoader",
    "latent_upscale": "UPLiFTLatentUpscale",
    "image_upscale": "UPLiFTImageUpscale",
    "color_match": "UPLiFTColorMatch",
    "tiny_vae": "UPLiFTTinyVAE",
    "sample_photo": "UPLiFTSamplePhoto",
}
"""Module and node, in the order of the menu."""


def available() -> list[type[io.ComfyNode]]:
    """The nodes whose packages are all there."""
    nodes = []
    for module, name in MODULES.items():
        try:
            nodes.append(getattr(importlib.import_module(f".{module}", __name__), name))
        except Exception as error:  # whatever is wrong with one node, the others are not to suffer
            cause = f"{type(error).__name__}: {error}"
            log.warning("UPLiFT: the node %s is not available (%s); the others are", name, cause)
    return nodes


class UpliftExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folder()
        return available()
