"""Begin at the linear optimum and learn what it leaves.

Blocks begin as identities. The picture's own pixels are carried to the refiner (a strided convolution can lay 2x2
pixels side by side, as channels), the attender pools bilinearly (the decoder's transpose convolution tells the four
new pixels apart), and the refiner's last convolution is solved by least squares. Trained from there, a small UPLiFT
begins level with bicubic pixels instead of far below them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..attender import OFFSETS
from ..errors import ConfigError
from ..layers import ConvBlock
from ..model import UPLiFT

RIDGE = 1e-6
"""Of the mean variance of the features, added to each of them: keeps the solution small along what is never seen."""
ROUNDS = 3
FAINTEST = 2e-3
"""The attender's first weight for neighbours that bilinear pooling leaves out: at 0 they could not be learned."""


@torch.no_grad()
def begin(model: UPLiFT) -> None:
    """Blocks as identities, pixels carried, bilinear pooling. Raises ConfigError where the model has no room for it."""
    config = model.config
    if config.refiner is None or not config.refiner.residual or not config.share_encoder or config.attender is None:
        raise ConfigError("model.linear_start needs an attender, a refiner with residual: true, and enc_share: true")
    for module in model.modules():
        if isinstance(module, ConvBlock):
            if not module.residual or module.one_by is None or module.stride != 1:
                raise ConfigError("model.linear_start needs blocks with residual and one_by, without stride")
            nn.init.zeros_(module.one_by.weight)
            nn.init.zeros_(module.one_by.bias)
    carry_pixels(model)
    pool_bilinearly(model)


@torch.no_grad()
def carry_pixels(model: UPLiFT) -> int:
    """Let the encoder's strided convolutions carry the pixels; returns how many values of the picture reach the map
    the refiner reads. Raises ConfigError where the configuration has no room for them."""
    config, carried = model.config, 3
    assert config.refiner is not None
    last = config.refiner.source % len(model.encoder.widths)
    for g in range(1, last + 1):
        if config.downs[g - 1].op == "none":
            continue
        if config.downs[g - 1].op != "conv":
            raise ConfigError(f"encoder.down_{g} must be conv for model.linear_start; pooling forgets positions")
        conv = model.encoder.get_submodule(f"down_{g}.down.0")
        assert isinstance(conv, nn.Conv2d)
        if 4 * carried > min(conv.out_channels, model.encoder.widths[g]):
            raise ConfigError(f"encoder.down_{g} has {conv.out_channels} channels, the block after it "
                              f"{model.encoder.widths[g]}; carrying the pixels takes {4 * carried}")
        conv.weight[:4 * carried].zero_()
        conv.bias[:4 * carried].zero_()  # type: ignore[index]
        for corner in range(4):  # pixels are not negative: the ReLU after it lets them pass
            for c in range(carried):
                conv.weight[corner * carried + c, c, 1 + corner // 2, 1 + corner % 2] = 1
        carried *= 4
    return carried


@torch.no_grad()
def pool_bilinearly(model: UPLiFT) -> None:
    """A constant channel of the last encoder map, spread by the decoder's transpose convolution into one channel for
    each of the four new pixels, from which the attender reads its logits. Raises ConfigError without the room."""
    config, encoder, decoder = model.config, model.encoder, model.decoder
    room, (first, last) = encoder.widths[-2], (decoder.get_submodule("block_0"), decoder.get_submodule("block_1"))
    code = config.channels + room  # where the decoder has the constant
    if encoder.widths[-1] < room + 4 or len(config.decoder) != 2 or config.ups[0].op != "tconv":
        raise ConfigError(f"model.linear_start needs a last encoder group at least 4 channels wider than the one "
                          f"before it ({room}), and a decoder of two groups with a transpose convolution between")
    widths = [int(group.out_channels) for group in (first, last)]  # type: ignore[arg-type]
    if min(widths) < code + 4:
        raise ConfigError(f"the decoder's groups are {widths[0]} and {widths[1]} channels wide; "
                          f"model.linear_start needs {code + 4}")
    constant = encoder.get_submodule(f"block_{len(encoder.widths) - 1}.blocks.0")
    assert isinstance(constant, ConvBlock) and constant.one_by is not None
    constant.one_by.bias[room] = 1
    up = decoder.get_submodule("up_1.up")
    assert isinstance(up, nn.ConvTranspose2d) and model.attender is not None
    up.weight[:, code:code + 4] = 0
    up.bias[code:code + 4] = 0  # type: ignore[index]
    for p in range(4):
        up.weight[code, code + p, p // 2, p % 2] = 1
    logits = model.attender.conv1
    logits.weight.zero_()
    n = model.attender.n
    logits.weight[:, :n, 0, 0] = -torch.eye(n)  # the attender adds these channels to its logits
    for p in range(4):
        wanted = {0: 0.75, -1 + 2 * (p // 2): 0.25}, {0: 0.75, -1 + 2 * (p % 2): 0.25}
        for k, (dy, dx) in enumerate(OFFSETS[n]):
            share = wanted[0].get(dy, 0) * wanted[1].get(dx, 0)
            logits.weight[k, code + p, 0, 0] = math.log(max(share, FAINTEST))
    logits.bias.copy_(-logits.weight[:, code, 0, 0])  # an UpBlock's residual adds the constant everywhere


class _Equations:
    """Normal equations of ``features w = target``, added up over pixels."""

    def __init__(self) -> None:
        self.left: Tensor | None = None
        self.right: Tensor | None = None

    def add(self, features: Tensor, target: Tensor, weight: Tensor) -> None:
        """features ``b f h w``, target ``b c h w``, weight ``b``."""
        root = weight.double().sqrt().view(-1, 1, 1, 1)
        x = torch.cat([features, torch.ones_like(features[:, :1])], 1).double() * root
        y = target.double() * root
        x, y = x.transpose(0, 1).flatten(1), y.transpose(0, 1).flatten(1)
        self.left = x @ x.T + (0 if self.left is None else self.left)
        self.right = x @ y.T + (0 if self.right is None else self.right)

    def solve(self) -> Tensor:
        assert self.left is not None and self.right is not None
        ridge = RIDGE * self.left.diagonal().mean() * torch.eye(len(self.left), dtype=torch.float64,
                                                                device=self.left.device)
        return torch.linalg.solve(self.left + ridge, self.right).T.float()


@torch.no_grad()
def fit_readout(model: UPLiFT, batches: Callable[[], Iterable[tuple[list[Tensor], list[Tensor]]]],
                depths: Sequence[int], floor: float) -> None:
    """Solve the refiner's last convolution for the teacher's maps, in rounds: a picture weighs 1 / (what the round
    before left of it + floor), so that smooth pictures count as much as textured ones.

    batches: called for each round; gives guides and maps, finest first, as the objective takes them.
    """
    assert model.attender is not None
    for _ in range(ROUNDS):
        equations = _Equations()
        for guides, maps in batches():
            for depth in depths:
                pooled: list[Tensor] = []
                features: list[Tensor] = []
                hooks = [model.attender.register_forward_hook(lambda m, a, out, kept=pooled: kept.append(out)),
                         model.ref_outc.register_forward_pre_hook(lambda m, a, kept=features: kept.append(a[0]))]
                try:
                    results = model(guides[depth], maps[depth], depth, noise=None, form="plain", return_steps=True)
                finally:
                    for hook in hooks:
                        hook.remove()
                for step in range(depth):
                    target = maps[depth - 1 - step]
                    left = (results[step] - target).square().mean((1, 2, 3))
                    equations.add(features[step], model.normalise(target) - pooled[step], 1 / (left + floor))
        solution = equations.solve()
        model.ref_outc.weight.copy_(solution[:, :-1, None, None])
        model.ref_outc.bias.copy_(solution[:, -1])  # type: ignore[union-attr]
