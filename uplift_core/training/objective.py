"""What an UPLiFT is trained to do (paper section 3.3): from every depth, hit the teacher's map at every size above."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import UPLiFT
from ..resample import antialias


def pyramid(image: Tensor, levels: int) -> list[Tensor]:
    """The image ``b 3 S S`` and its halves, quarters, ...: ``levels + 1`` of them."""
    return [image if not level else antialias(image, (image.shape[2] >> level, image.shape[3] >> level))
            for level in range(levels + 1)]


def distance(prediction: Tensor, target: Tensor, loss: str, floor: float = 1e-4) -> Tensor:
    """l2: mean square. l1: mean absolute. log: the mean over pictures of ln(mean square + floor), which is what a mean
    PSNR counts: a smooth picture weighs as much as a textured one. cosine: one minus the mean cosine over channels."""
    prediction, target = prediction.float(), target.float()
    if loss == "l2":
        return F.mse_loss(prediction, target)
    if loss == "l1":
        return F.l1_loss(prediction, target)
    if loss == "log":
        return ((prediction - target).square().mean((1, 2, 3)) + floor).log().mean()
    return 1 - F.cosine_similarity(prediction, target, dim=1).mean()


def drawn(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Normal numbers from the CPU, the same for every device; where ``like`` is a shape alone, a shape alone: a plan's
    batch may be larger than memory."""
    return like.new_empty(shape) if like.is_meta else torch.randn(shape, generator=generator)


class MultiDepth(nn.Module):
    """The objective as one module, so that distributed training sees a single forward pass.

    For every depth d: begin with the map of level d (plus noise of std ``augment``, added out of place so that it
    stays clean as a target), take d steps, and add up the distances to levels d - 1, ..., 0. With ``fixed_norm``
    batch norms use their kept statistics and not those of the batch.
    """

    def __init__(self, model: UPLiFT, depths: Sequence[int], loss: str = "l2", augment: float = 0.0, *,
                 floor: float = 1e-4, fixed_norm: bool = False):
        super().__init__()
        self.model, self.depths, self.loss, self.augment, self.floor = model, tuple(depths), loss, augment, floor
        self.fixed_norm = fixed_norm

    def train(self, mode: bool = True) -> MultiDepth:
        super().train(mode)
        if self.fixed_norm:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, guides: list[Tensor], maps: list[Tensor], seed: int) -> Tensor:
        total = maps[0].new_zeros(())
        generator = torch.Generator().manual_seed(seed)

        def noise(shape: tuple[int, ...], step: int, site: str) -> Tensor:
            return drawn(shape, generator, total)

        for depth in self.depths:
            start = maps[depth]
            if self.augment:
                start = start + self.augment * drawn(start.shape, generator, start).to(start)
            results = self.model(guides[depth], start, depth, noise=noise, return_steps=True, form="plain")
            for step, result in enumerate(results):
                total = total + distance(result, maps[depth - 1 - step], self.loss, self.floor)
        return total
