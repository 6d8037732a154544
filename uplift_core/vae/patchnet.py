"""The tiny codec's network: the linear optimum, and a small network for what it leaves out.

A latent pixel holds the first principal components of its 8x8 block of the picture (an orthonormal, linear map: an
error in the latent is the same error in the picture). Decoding is the transpose of that, plus a residual that a few
convolutions read off the neighbouring latents, mainly what a block alone cannot know: its edges and its fine grain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d, ConvTranspose2d

from ..devices import no_autocast
from ..errors import ConfigError, InputError


@dataclass(frozen=True)
class PatchNetConfig:
    """``channels`` of the latent, of the ``patch`` x ``patch`` blocks; the residual's ``width`` and number of
    ``blocks`` at the latent's size, then of ``detail`` channels and ``detail_blocks`` at half the picture's."""

    channels: int = 32
    patch: int = 8
    width: int = 128
    blocks: int = 4
    detail: int = 32
    detail_blocks: int = 2

    def __post_init__(self) -> None:
        if self.patch < 2 or self.patch % 2:
            raise ConfigError(f"patch is {self.patch}; expected an even number of at least 2")
        if not 1 <= self.channels <= 3 * self.patch**2:
            raise ConfigError(f"channels is {self.channels}; a block of {self.patch}x{self.patch} colours has 1 to "
                              f"{3 * self.patch**2}")
        if min(self.width, self.detail) < 1 or min(self.blocks, self.detail_blocks) < 0:
            raise ConfigError(f"{self} has a width below 1 or a negative number of blocks")

    @property
    def reach(self) -> int:
        """How many latent pixels around its own a picture pixel depends on."""
        at_half_size = 2 * self.detail_blocks + 1
        return 1 + 2 * self.blocks + math.ceil(at_half_size / (self.patch / 2))

    def to_metadata(self) -> dict[str, str]:
        return {"format": "pt", "codec": "patchnet", "config": json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> PatchNetConfig:
        try:
            values: dict[str, Any] = json.loads(metadata["config"])
            return cls(**{field.name: int(values[field.name]) for field in fields(cls)})
        except (KeyError, TypeError, ValueError) as bad:
            raise ConfigError(f"the metadata holds no readable configuration of a tiny codec ({bad})") from None


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = Conv2d(width, width, 3, padding=1)
        self.conv2 = Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.conv1(x)))


class PatchNet(nn.Module):
    """Pictures ``b 3 H W`` in [0, 1] to latents ``b c H/patch W/patch`` and back."""

    def __init__(self, config: PatchNetConfig):
        super().__init__()
        self.config = config
        c, p = config.channels, config.patch
        self.analysis = Conv2d(3, c, p, stride=p)
        self.synthesis = ConvTranspose2d(c, 3, p, stride=p)
        self.register_buffer("latent_mean", torch.zeros(c))
        self.register_buffer("latent_std", torch.ones(c))
        self.register_buffer("residual_std", torch.ones(()))  # the unit of what is learned; it is small
        self.head = Conv2d(c, config.width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Residual(config.width) for _ in range(config.blocks)))
        self.spread = Conv2d(config.width, config.detail * (p // 2)**2, 1)
        self.details = nn.Sequential(*(_Residual(config.detail) for _ in range(config.detail_blocks)))
        self.tail = Conv2d(config.detail, 3 * 4, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    def encode(self, image: Tensor) -> Tensor:
        return self.analysis(image)

    def decode(self, latent: Tensor) -> Tensor:
        """The picture, not clamped."""
        mean, std = self.get_buffer("latent_mean"), self.get_buffer("latent_std")
        x = (latent - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
        x = self.blocks(torch.relu(self.head(x)))
        x = F.pixel_shuffle(self.spread(torch.relu(x)), self.config.patch // 2)
        residual = F.pixel_shuffle(self.tail(self.details(x)), 2) * self.get_buffer("residual_std")
        with no_autocast(latent.device.type):  # mixed precision is for the residual only
            return self.synthesis(latent) + residual.to(latent.dtype)

    def forward(self, image: Tensor) -> Tensor:
        return self.decode(self.encode(image))


class BlockStatistics:
    """Mean and covariance of picture blocks, added up over batches: what the linear optimum is made of."""

    def __init__(self, patch: int):
        self.patch, self.count = patch, 0
        n = 3 * patch**2
        self.total, self.products = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)

    def add(self, images: Tensor) -> None:
        """images: ``b 3 H W`` in [0, 1], sides multiples of the block's."""
        blocks = F.unfold(images.double(), self.patch, stride=self.patch).transpose(1, 2).flatten(0, 1)
        self.count += len(blocks)
        self.total += blocks.sum(0)
        self.products += blocks.T @ blocks

    def install(self, net: PatchNet) -> float:
        """Put the principal components into a network; returns the mean squared error they leave, per value."""
        n = len(self.total)
        if self.count < n:
            raise InputError(f"{self.count} blocks are too few for the statistics of {n} values; give more pictures")
        # One mean per colour and not per value of the block: what a transpose convolution's bias can hold.
        mean = (self.total / self.count).view(3, -1).mean(1).repeat_interleave(self.patch**2)
        second = self.products / self.count
        second += mean.outer(mean) - mean.outer(self.total / self.count) - (self.total / self.count).outer(mean)
        values, vectors = torch.linalg.eigh(second)
        c = net.config.channels
        basis = vectors.flip(1)[:, :c].T
        basis = basis * torch.where(basis.sum(1, keepdim=True) < 0, -1.0, 1.0)  # eigenvectors come in either sign
        with torch.no_grad():
            filters = basis.float().view(c, 3, self.patch, self.patch)
            net.analysis.weight.copy_(filters)
            net.analysis.bias.copy_((-basis @ mean).float())  # type: ignore[union-attr]
            net.synthesis.weight.copy_(filters)
            net.synthesis.bias.copy_(mean.view(3, -1)[:, 0].float())  # type: ignore[union-attr]
            center = basis @ (self.total / self.count - mean)
            spread = values.flip(0)[:c] - center**2
            net.get_buffer("latent_mean").copy_(center.float())
            net.get_buffer("latent_std").copy_(spread.clamp_min(1e-12).sqrt().float())
            left = float(values.flip(0)[c:].clamp_min(0).sum() / n)
            net.get_buffer("residual_std").fill_(max(left, 1e-12)**0.5)
        return left
