"""ComfyUI's door: clone this folder into ``custom_nodes`` and the UPLiFT nodes are there."""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls for the list of nodes. Nothing is imported before, so that the folder is also a project."""
    from .nodes import UpliftExtension

    return UpliftExtension()
