"""UPLiFT Feature Segments."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..uplift_core.features import segment_masks, segment_picture, segments
from . import host
from .feature_maps import UpliftFeatures, checked
from .pictures import room


class UPLiFTFeatureSegments(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="UPLiFTFeatureSegments", display_name="UPLiFT Feature Segments", category=host.CATEGORY,
            description="Cuts pictures into segments of like features (k-means), one mask each, the largest first.",
            search_aliases=["segmentation", "k-means", "clusters", "auto mask"],
            inputs=[
                UpliftFeatures.Input("features", tooltip="From UPLiFT Dense Features."),
                io.Int.Input("segments", default=6, min=1, max=64, tooltip="How many. Fewer come back where there are "
                                                                           "fewer different features."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="Of the clusters' start. The same seed gives the same segments."),
                io.Int.Input("clean", default=1, min=0, max=16,
                             tooltip="Radius, in features, of a vote among neighbours that removes specks."),
            ],
            outputs=[io.Mask.Output(display_name="MASK", tooltip="The masks of the first picture, then those of the "
                                                                 "next."),
                     io.Image.Output(display_name="IMAGE", tooltip="The segments in colours, mixed with the picture.")])

    @classmethod
    def execute(cls, features: Any, segments: int, seed: int, clean: int) -> io.NodeOutput:
        host.number("segments", segments, 1, 64)
        host.number("clean", clean, 0, 16)
        host.number("seed", seed, 0, 0xffffffffffffffff)
        given = checked(features)
        masks, shown, bar = [], room(len(given.maps), *given.size), host.Bar(len(given.maps))
        for i, found in enumerate(given.maps):
            host.stop_if_asked()
            count = min(segments, found.shape[1] * found.shape[2])
            labels = _segments(found, count, seed=seed % 2**63, clean=clean)
            masks.append(segment_masks(labels, given.size))
            picture = 0.6 * segment_picture(labels, given.size) + 0.4 * given.pictures[i]
            shown[i] = picture.movedim(0, -1)
            bar.item(i)(1, 1)
        return io.NodeOutput(torch.cat(masks), shown)


_segments = segments
"""The core's function: in ``execute`` the name is the input's."""
