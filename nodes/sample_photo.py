"""UPLiFT Sample Photo."""

from __future__ import annotations

from comfy_api.latest import io

from ..uplift_core.assets import asset
from ..uplift_core.imageio import read_picture
from . import host

PHOTOS = ["astronaut", "chelsea", "coffee"]


class UPLiFTSamplePhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="UPLiFTSamplePhoto", display_name="UPLiFT Sample Photo", category=host.CATEGORY,
            description="A small photograph that comes with this pack, to try the nodes with at once.",
            search_aliases=["example image", "test image", "demo photo"],
            inputs=[io.Combo.Input("photo", options=PHOTOS, default="chelsea",
                                   tooltip="astronaut (NASA, public domain), chelsea (a cat, CC0) or coffee (CC0). Put "
                                           "Load Image in place of this node for a picture of your own.")],
            outputs=[io.Image.Output(display_name="IMAGE")])

    @classmethod
    def execute(cls, photo: str) -> io.NodeOutput:
        picture = read_picture(asset(f"samples/{host.choice('photo', photo, PHOTOS)}.png"))
        return io.NodeOutput(picture.rgb.movedim(0, -1)[None].contiguous())
