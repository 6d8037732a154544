"""What flows between the feature nodes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..uplift_core.dense import DenseFeatures
from ..uplift_core.errors import InputError

UpliftFeatures = io.Custom("UPLIFT_FEATURES")


@dataclass(frozen=True)
class HostFeatures:
    """maps: one a picture. pictures: ``b 3 H W`` in [0, 1], as they were given (maps may be of smaller ones)."""

    maps: list[DenseFeatures]
    pictures: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the pictures."""
        return int(self.pictures.shape[2]), int(self.pictures.shape[3])


def checked(features: Any) -> HostFeatures:
    if not isinstance(features, HostFeatures):
        raise InputError(f"features is {type(features).__name__}; connect UPLiFT Dense Features")
    return features


def read_points(text: str, size: tuple[int, int]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """``[{"x": 10, "y": 20, "label": 1}, ...]`` to positive and negative points in pixels. Raises InputError."""
    try:
        entries = json.loads(text) if text.strip() else []
        points = [(float(entry["x"]), float(entry["y"]), int(entry.get("label", 1))) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"points is {text[:80]!r}; expected a list like [{{\"x\": 10, \"y\": 20, \"label\": 1}}], in "
                         "pixels, label 0 for what is not meant") from None
    height, width = size
    for x, y, label in points:
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(f"the point ({x:g}, {y:g}) is outside the picture of {width}x{height} pixels; remove it "
                             "by a double click, or clear the points")
        if label not in (0, 1):
            raise InputError(f"the label of the point ({x:g}, {y:g}) is {label}; expected 1 or 0")
    return [(x, y) for x, y, label in points if label], [(x, y) for x, y, label in points if not label]
