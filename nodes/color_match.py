"""UPLiFT Color Match."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..uplift_core.color import COLOR_METHODS, match_color
from ..uplift_core.errors import InputError
from . import host
from .pictures import room, to_core

METHODS = [method for method in COLOR_METHODS if method != "none"]


class UPLiFTColorMatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="UPLiFTColorMatch", display_name="UPLiFT Color Match", category=host.CATEGORY,
            description="Gives pictures the colours of a reference, such as the small picture they were enlarged from.",
            search_aliases=["color match", "colour match", "color transfer", "color fix", "wavelet color fix"],
            inputs=[
                io.Image.Input("image", tooltip="The pictures to correct."),
                io.Image.Input("reference", tooltip="As many pictures, or one, of any size: the guide output of "
                                                    "UPLiFT Latent Upscale, say."),
                io.Combo.Input("method", options=METHODS, default="mean",
                               tooltip="mean: each channel's mean; adain: mean and contrast; wavelet: everything "
                                       "coarser than 32 pixels, which also undoes local shifts."),
            ],
            outputs=[io.Image.Output(display_name="IMAGE")])

    @classmethod
    def execute(cls, image: Any, reference: Any, method: str) -> io.NodeOutput:
        host.choice("method", method, METHODS)
        pictures, references = to_core(image), to_core(reference, "reference")
        if len(references) not in (1, len(pictures)):
            raise InputError(f"there are {len(pictures)} pictures and {len(references)} references; connect as many "
                             "references as pictures, or one")
        out = room(len(pictures), *pictures.shape[2:])
        bar = host.Bar(len(pictures))
        for i in range(len(pictures)):
            wanted = references[i:i + 1] if len(references) > 1 else references
            out[i] = match_color(pictures[i:i + 1], wanted, method).clamp(0, 1)[0].movedim(0, -1)
            bar.item(i)(1, 1)
        return io.NodeOutput(out)
