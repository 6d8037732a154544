"""The golden vectors (see golden/README.md): outputs of the published research code on weights made by rule."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rule_weights import rule_state
from uplift_core import ModelConfig, UPLiFT

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
TOLERANCE = 1e-4  # of the output's standard deviation


@dataclass
class Case:
    model: UPLiFT
    image: Tensor
    latent: Tensor
    steps: int
    outsize: list[int] | None
    seed: int
    expected: dict[int, Tensor]  # by step, counted from 1
    parameters: int

    def noise(self):
        """Draws as the published code does: the global generator, whole batch, in the order of the calls."""
        torch.manual_seed(self.seed)
        return lambda shape, step, site: torch.randn(shape)


@lru_cache(maxsize=4)
def ruled(config: ModelConfig) -> UPLiFT:
    """A model with weights by rule."""
    model = UPLiFT(config).eval().requires_grad_(False)
    model.load_state_dict(rule_state({key: tuple(value.shape) for key, value in model.state_dict().items()}))
    return model


@lru_cache(maxsize=4)
def golden(name: str) -> Case:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = ModelConfig.from_published(json.loads(meta["config"]), channels=int(meta["channels"]),
                                        patch=int(meta["patch"]))
    steps = int(meta["iters"])
    expected = {steps if key == "resized" else int(key[4:]): value for key, value in tensors.items()
                if key == "resized" or key.startswith("step")}
    return Case(ruled(config), tensors["image"], tensors["latent"], steps, json.loads(meta.get("outsize", "null")),
                int(meta["noise_seed"]), expected, int(meta["params"]))


def difference(value: Tensor, reference: Tensor) -> float:
    """Largest difference, in standard deviations of the reference."""
    assert value.shape == reference.shape
    return float((value - reference).abs().max() / reference.std())
