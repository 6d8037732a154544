"""UPLiFT Feature Mask."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..uplift_core.errors import InputError
from ..uplift_core.features import feature_mask, heat_picture, similarity
from . import host
from .feature_maps import HostFeatures, UpliftFeatures, checked, read_points
from .pictures import room


class UPLiFTFeatureMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="UPLiFTFeatureMask", display_name="UPLiFT Feature Mask", category=host.CATEGORY,
            description="Click on what you mean: everything with features like it becomes a mask.",
            search_aliases=["click mask", "segment by click", "similarity mask", "points editor", "select object"],
            is_output_node=True,
            inputs=[
                UpliftFeatures.Input("features", tooltip="From UPLiFT Dense Features."),
                io.String.Input("points", default="[]",
                                tooltip="Written by clicking on the picture: a click adds a point, a right or shift "
                                        "click one of what is not meant; drag to move, double click to remove. Points "
                                        "belong to the first picture of a batch and find the same thing in the rest."),
                io.Float.Input("threshold", default=0.6, min=-1.0, max=1.0, step=0.01,
                               tooltip="Likeness from which the mask is on: higher for less."),
                io.Float.Input("softness", default=0.1, min=0.0, max=1.0, step=0.01,
                               tooltip="Width of the ramp around the threshold; 0 for a hard edge."),
                io.Mask.Input("mask", optional=True, tooltip="A rough mask of what is meant, of the size of the "
                                                             "picture; with or without points."),
            ],
            outputs=[io.Mask.Output(display_name="MASK"),
                     io.Image.Output(display_name="heat map", tooltip="Likeness in colours over the picture.")])

    @classmethod
    def execute(cls, features: Any, points: str, threshold: float, softness: float, mask: Any = None
                ) -> io.NodeOutput:
        host.number("threshold", threshold, -1, 1)
        host.number("softness", softness, 0, 1)
        given = checked(features)
        positive, negative = read_points(points, given.size)
        marks = _marked(mask, given) if mask is not None else None
        height, width = given.size
        masks = torch.zeros(len(given.maps), height, width)
        heat = room(len(given.maps), height, width)
        first, bar = given.maps[0], host.Bar(len(given.maps))
        down = first.image_size[0] / height, first.image_size[1] / width
        for i, found in enumerate(given.maps):
            host.stop_if_asked()
            near = torch.zeros(found.shape[1:])
            if positive or marks is not None:  # else there is nothing yet, and the picture is shown to click on
                near = similarity(found, _scaled(positive, down), _scaled(negative, down), mask=marks, of=first)
                masks[i] = feature_mask(near, given.size, threshold=threshold, softness=softness)
            heat[i] = heat_picture(near, given.pictures[i]).movedim(0, -1)
            bar.item(i)(1, 1)
        # The picture that the points are set on.
        shown = ui.PreviewImage(given.pictures[:1].movedim(1, -1), cls=cls).as_dict()["images"]
        return io.NodeOutput(masks, heat, ui={"uplift_picture": shown, "uplift_size": [[width, height]]})


def _scaled(points: list[tuple[float, float]], down: tuple[float, float]) -> list[tuple[float, float]]:
    return [(x * down[1], y * down[0]) for x, y in points]


def _marked(mask: Any, features: HostFeatures) -> torch.Tensor:
    """The mask on the first map's picture, on where anything of a pixel is marked. Raises InputError."""
    marks = mask.reshape(-1, *mask.shape[-2:])[:1].float()
    if tuple(marks.shape[1:]) != features.size:
        raise InputError(f"the mask is {marks.shape[2]}x{marks.shape[1]} and the picture "
                         f"{features.size[1]}x{features.size[0]}; connect a mask of the picture")
    size = features.maps[0].image_size
    return torch.nn.functional.adaptive_max_pool2d(marks[None], size)[0, 0]
