"""The blocks an UPLiFT is built from, in their plain form: what each computes, one map in, one map out.

Module names follow the published checkpoints, so that a state dict loads as it is. All module classes come from an
``operations`` namespace (``torch.nn`` or a host's own) given at construction.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DownConfig, GroupConfig, UpConfig
from .errors import InputError

LAYER_NORM_EPS = 1e-6


def channel_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Layer norm over the channels, separately at every pixel: ``b c h w -> b c h w``."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def add_residual(x: Tensor, y: Tensor) -> Tensor:
    """``y`` plus ``x`` cut, or filled up with zeros, to the channels of ``y``. May write into ``y``."""
    if x.shape[2:] != y.shape[2:]:
        raise odd_size(tuple(x.shape[2:]), tuple(y.shape[2:]))
    c = min(x.shape[1], y.shape[1])
    if c == y.shape[1]:
        return y.add_(x[:, :c]) if not y.requires_grad else y + x[:, :c]
    if torch.is_grad_enabled():
        return y + F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - c))
    y[:, :c] += x
    return y


def odd_size(shrunk: tuple[int, ...], block: tuple[int, ...]) -> InputError:
    """The error for a map of odd size in a halving block: convolutions round up, its residual rounds down."""
    return InputError(f"a halving block makes a map of {block} of one whose residual is {shrunk}: this model needs "
                      "guide images whose sides it can halve without remainder; pad the image")


def corner_resize(x: Tensor, factor: float) -> Tensor:
    """Bilinear resize with align_corners=True, sizes rounded down: the published skip connections."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True, recompute_scale_factor=True)


def _norm(kind: str, channels: int, operations: Any) -> nn.Module:
    if kind == "batch":
        return getattr(operations, "BatchNorm2d", nn.BatchNorm2d)(channels)
    return operations.LayerNorm(channels, eps=LAYER_NORM_EPS)


class ConvBlock(nn.Module):
    """SingleConv or DoubleConv: (conv3x3, norm, ReLU) once or twice, a 1x1 convolution, and a residual around all.

    ``conv`` holds the layers under the published indices. The residual is the input, cut or zero-filled to the
    output's channels; with stride 2 it is shrunk bilinearly first.
    """

    def __init__(self, cin: int, cout: int, group: GroupConfig, operations: Any = nn):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(2 if group.block == "DoubleConv" else 1):
            layers += [operations.Conv2d(cout if i else cin, cout, 3, padding=1, stride=group.stride, bias=False),
                       _norm(group.norm, cout, operations), nn.ReLU()]
        if group.one_by:
            layers.append(operations.Conv2d(cout, cout, 1))
        self.conv = nn.Sequential(*layers)
        self.norm, self.residual, self.stride, self.closes = group.norm, group.residual, group.stride, group.one_by

    def stages(self) -> list[tuple[Any, Any]]:
        """The 3x3 convolutions, each with the norm that follows it."""
        layers = list(self.conv)
        return [(layers[j], layers[j + 1]) for j in range(0, len(layers) - 1, 3)]

    @property
    def one_by(self) -> Any:
        return self.conv[-1] if self.closes else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, norm in self.stages():
            y = conv(y)
            y = torch.relu(norm(y) if self.norm == "batch" else channel_norm(norm, y))
        if self.one_by is not None:
            y = self.one_by(y)
        if not self.residual:
            return y
        return add_residual(x if self.stride == 1 else corner_resize(x, 0.5), y)


class TransposeConv(nn.Module):
    """A bare 2x transpose convolution, the legacy block that rebuilds LiFT."""

    def __init__(self, cin: int, cout: int, operations: Any = nn):
        super().__init__()
        self.up = operations.ConvTranspose2d(cin, cout, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class BlockGroup(nn.Module):
    """A row of equal blocks; no block at all passes its input on."""

    def __init__(self, cin: int, group: GroupConfig, operations: Any = nn):
        super().__init__()
        self.out_channels = group.out_channels
        if not group.widths:
            return
        blocks: list[nn.Module] = []
        for width in group.widths:
            if group.block == "IdentityBlock":
                blocks.append(nn.Identity())
            elif group.block == "TransposeConv":
                blocks.append(TransposeConv(cin, width, operations))
            else:
                blocks.append(ConvBlock(cin, width, group, operations))
            cin = width
        self.blocks = nn.Sequential(*blocks)

    def parts(self) -> list[nn.Module]:
        return list(self.blocks) if hasattr(self, "blocks") else []

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) if hasattr(self, "blocks") else x


class DownBlock(nn.Module):
    """Shrinks a map between two encoder groups: nothing, a strided convolution or 2x2 max pooling."""

    def __init__(self, channels: int, config: DownConfig, operations: Any = nn):
        super().__init__()
        self.config = config
        if config.op == "conv":
            batch_norm = getattr(operations, "BatchNorm2d", nn.BatchNorm2d)
            self.down = nn.Sequential(operations.Conv2d(channels, channels, 3, padding=1, stride=config.stride),
                                      batch_norm(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if self.config.op == "none":
            return x
        y = self.down(x) if self.config.op == "conv" else F.max_pool2d(x, 2, 2)
        return add_residual(corner_resize(x, self.config.factor), y) if self.config.residual == "bilinear" else y


class UpBlock(nn.Module):
    """Enlarges a map between two decoder groups: a transpose convolution, plus its input enlarged bilinearly."""

    def __init__(self, channels: int, config: UpConfig, operations: Any = nn):
        super().__init__()
        self.config = config
        if config.op == "tconv":
            self.up = operations.ConvTranspose2d(channels, channels, config.factor, stride=config.factor)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.op == "none":
            return x
        y = self.up(x)
        return add_residual(corner_resize(x, self.config.factor), y) if self.config.residual == "bilinear" else y
