"""Weights made by the rule of ``golden/README.md``, so that tests need no checkpoint."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from uplift_core.config import ModelConfig

GOLDEN = Path(__file__).parent / "golden"


def rule_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """The one tensor the rule gives for this name and shape."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        r = 1 + 0.2 * np.abs(r)
    elif key.endswith("running_mean"):
        r = 0.2 * r
    elif len(shape) == 1 and key.endswith("weight"):
        r = 1 + 0.1 * r
    elif len(shape) == 1 and key.endswith("bias"):
        r = 0.1 * r
    else:
        r = r / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(r, dtype=np.float32))


def rule_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A whole state dict by the rule."""
    return {key: rule_tensor(key, tuple(shape)) for key, shape in shapes.items()}


@cache
def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint: ``sd15-vae``, ``dinov2-s14`` or ``dinov3-splus16``."""
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / f"{name}.keys.json").read_text()).items()}


def golden_metadata(case: str) -> dict[str, str]:
    with safe_open(str(GOLDEN / f"{case}.safetensors"), framework="pt") as file:
        return file.metadata()


def golden_config(case: str) -> ModelConfig:
    """The configuration a golden case was made with."""
    meta = golden_metadata(case)
    return ModelConfig.from_published(json.loads(meta["config"]), channels=int(meta["channels"]),
                                      patch=int(meta["patch"]))


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model of this configuration."""
    from uplift_core.model import UPLiFT

    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in UPLiFT(config).state_dict().items()}
