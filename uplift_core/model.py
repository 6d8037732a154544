"""UPLiFT (arXiv 2601.17950) in its plain form. Start reading here.

One step doubles a feature map ``x``. The image is encoded into maps f0..f4; a decoder reads x and the deepest maps
and produces a guide at twice the size (paper section 3.1); the Local Attender pools every new pixel from the
neighbours below it (section 3.2); for latents, a refiner adds what pooling cannot (section B.1). Then again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attender import LocalAttender
from .config import ModelConfig
from .devices import has_cpu_fp16
from .errors import InputError
from .guide import Guide
from .layers import BlockGroup, DownBlock, UpBlock, add_residual
from .noise import Noise, NoiseCall, as_noise
from .resample import Span, antialias, sample

FORMS = ("auto", "plain", "fast")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet_normalise(image: Tensor) -> Tensor:
    """RGB ``b 3 H W`` in [0, 1] to the guide of models whose configuration says ``image_norm: imagenet``."""
    mean, std = (torch.tensor(v, dtype=image.dtype, device=image.device).view(1, 3, 1, 1)
                 for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


class Encoder(nn.Module):
    """Image ``b 3 H W`` to the maps f0..f4, in the published models all at the image's own size."""

    def __init__(self, config: ModelConfig, operations: Any = nn):
        super().__init__()
        channels = 3
        self.widths: list[int] = []
        for g, group in enumerate(config.encoder):
            if g:
                self.add_module(f"down_{g}", DownBlock(channels, config.downs[g - 1], operations))
            self.add_module(f"block_{g}", BlockGroup(channels, group, operations))
            channels = group.out_channels or channels
            self.widths.append(channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        x = image
        for g in range(len(self.widths)):
            if g:
                x = self.get_submodule(f"down_{g}")(x)
            x = self.get_submodule(f"block_{g}")(x)
            maps.append(x)
        return maps


class Decoder(nn.Module):
    """Map ``b c h w`` and the encoder's maps to the guide ``b g 2h 2w`` (without an attender: to ``b c 2h 2w``)."""

    def __init__(self, config: ModelConfig, widths: Sequence[int], operations: Any = nn):
        super().__init__()
        self.config = config
        channels = config.channels
        for s, group in enumerate(config.decoder):
            if s:
                self.add_module(f"up_{s}", UpBlock(channels, config.ups[s - 1], operations))
            channels += widths[-1 - s] + config.noise_channels
            self.add_module(f"block_{s}", BlockGroup(channels, group, operations))
            channels = group.out_channels or channels
        self.out_channels = channels
        if config.attender is None:
            self.outc = operations.Conv2d(channels, config.channels, 1)

    def forward(self, x: Tensor, maps: list[Tensor], noise: Noise, step: int) -> Tensor:
        config = self.config
        for s in range(len(config.decoder)):
            if s:
                x = self.get_submodule(f"up_{s}")(x)
            x = combine(x, maps[-1 - s], config.sampling, noise, step, f"decoder{s}", config.noise_channels,
                        config.noise_scale)
            x = self.get_submodule(f"block_{s}")(x)
        if config.attender is not None:
            return x
        y = self.outc(x)
        return add_residual(x, y) if config.residual_outc else y


def combine(x: Tensor, f: Tensor, sampling: str, noise: Noise, step: int, site: str, channels: int,
            scale: float) -> Tensor:
    """``x``, an encoder map brought to its size, and noise channels, side by side."""
    size = (x.shape[2], x.shape[3])
    parts = [x]
    if sampling == "none" and f.shape[-2:] != x.shape[-2:]:
        raise InputError(f"the encoder's map is {tuple(f.shape[-2:])}, the decoder's {size}, and the configuration "
                         "says enc_resample: none; use nearest or bilinear")
    if sampling == "bilinear":
        f = antialias(f, size)
    elif sampling == "nearest":
        y_in, x_in = Span.all(f.shape[2]), Span.all(f.shape[3])
        f = sample(f, "nearest", y_in, x_in, Span.all(size[0]), Span.all(size[1]))
    parts.append(f)
    if channels:
        drawn = noise.window(step, site, channels, x.shape[0], Span.all(size[0]), Span.all(size[1]))
        parts.append(x.new_zeros(x.shape[0], channels, *size) if drawn is None else drawn.to(x) * scale)
    return torch.cat(parts, 1)


def _size(outsize: Any) -> tuple[int, int]:
    try:
        rows, columns = (int(n) for n in outsize)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise InputError(f"outsize is {outsize!r}; expected (rows, columns), two whole numbers of at least 1")
    return rows, columns


class UPLiFT(nn.Module):
    """The model. State-dict keys are those of the published checkpoints.

    ``operations``: the namespace that Conv2d, ConvTranspose2d, LayerNorm and BatchNorm2d come from.
    """

    run_device: torch.device | None = None
    """Where the fast form computes; None for where the weights are. For hosts whose modules bring weights over as
    they are used."""

    def __init__(self, config: ModelConfig, operations: Any = nn):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, operations)
        self.decoder = Decoder(config, self.encoder.widths, operations)
        self.attender = None
        if config.attender is not None:
            self.attender = LocalAttender(self.decoder.out_channels, config.attender, operations)
        self.refiner = None
        if config.refiner is not None:
            ref = config.refiner
            channels = config.channels + self.encoder.widths[ref.source] + ref.noise_channels
            self.refiner = BlockGroup(channels, ref.group, operations)
            self.ref_outc = operations.Conv2d(ref.group.out_channels or channels, config.channels, 1)
            if ref.residual:
                nn.init.zeros_(self.ref_outc.weight)
                nn.init.zeros_(self.ref_outc.bias)

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, image: Tensor, latent: Tensor, steps: int = 1, *, noise: int | NoiseCall | Noise | None = 0,
                return_steps: bool = False, outsize: tuple[int, int] | None = None, form: str = "auto"
                ) -> Tensor | list[Tensor]:
        """Enlarge a feature map ``steps`` times by ``config.step_factor`` (2).

        image: ``b 3 H W``, the guide; RGB in [0, 1] for VAE models, ImageNet-normalised for DINO models.
        latent: ``b c h w``, covering the same pixels (H = patch h, W = patch w); VAE latents unscaled.
        noise: a seed (item i of the batch uses seed + i), a function ``(shape, step, site) -> Tensor`` of standard
        normal values, or None for zeros.
        outsize: ``(rows, columns)`` to bring the last result to, by antialiased bilinear resize.
        form: "plain" is the definition, "fast" the same numbers sooner and in less memory; "auto" is fast unless
        gradients are wanted or the module is in training mode.

        Returns ``b c 2^steps h 2^steps w``, or with return_steps the results of all steps. Raises InputError.
        """
        self._check(image, latent, steps, form)
        if outsize is not None:
            outsize = _size(outsize)
        source = as_noise(noise)
        if form == "auto":
            form = "plain" if self.training or self._wants_gradients(image, latent) else "fast"
        if form == "fast":
            from .engine import Engine

            results = Engine(self).run(image, latent, steps, source, keep=return_steps)
        else:
            results = self._plain(image, latent, steps, source)
        if outsize is not None:
            results[-1] = antialias(results[-1], outsize)
        return results if return_steps else results[-1]

    # -- the plain form --------------------------------------------------------------------------------------------

    def _plain(self, image: Tensor, latent: Tensor, steps: int, noise: Noise) -> list[Tensor]:
        results: list[Tensor] = []
        maps: list[Tensor] | None = None
        x = self.normalise(latent)
        for i in range(steps):
            if maps is None or not self.config.share_encoder:
                maps = self.encoder(self.guide(image, i).whole())
            x = self.step(x, maps, noise, i)
            results.append(self.denormalise(x))
        return results

    def guide(self, image: Tensor, step: int) -> Guide:
        """The image as the encoder of a step reads it: enlarged when it is not shared, 16/14 for patch 14."""
        k = 1 if self.config.share_encoder else self.config.up_factor**step
        sizes = [(image.shape[2] * k, image.shape[3] * k)]
        if self.config.patch == 14:
            sizes.append((sizes[0][0] * 16 // 14, sizes[0][1] * 16 // 14))
        return Guide(image, sizes)

    def step(self, x: Tensor, maps: list[Tensor], noise: Noise, step: int) -> Tensor:
        """One step, ``b c h w -> b c 2h 2w``, in normalised latents."""
        y = self.decoder(x, maps, noise, step)
        if self.attender is not None:
            y = self.attender(y, x)
        if self.refiner is not None and self.config.refiner is not None:
            ref = self.config.refiner
            z = combine(y, maps[ref.source], ref.sampling, noise, step, "refiner", ref.noise_channels,
                        ref.noise_scale)
            z = self.ref_outc(self.refiner(z))
            y = y + z if ref.residual else z
        return y

    def normalise(self, latent: Tensor) -> Tensor:
        """Latent to the model's own units: per-channel mean 0 and std 1 where the configuration has them."""
        if not self.config.latent_mean:
            return latent
        return (latent - self._constant(self.config.latent_mean, latent)) / self._constant(
            self.config.latent_std, latent)

    def denormalise(self, latent: Tensor) -> Tensor:
        if not self.config.latent_mean:
            return latent
        return latent * self._constant(self.config.latent_std, latent) + self._constant(
            self.config.latent_mean, latent)

    # -- helpers ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _constant(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)

    def _wants_gradients(self, *inputs: Tensor) -> bool:
        return torch.is_grad_enabled() and (any(t.requires_grad for t in inputs)
                                            or any(p.requires_grad for p in self.parameters()))

    def _check(self, image: Tensor, latent: Tensor, steps: int, form: str) -> None:
        if form not in FORMS:
            raise InputError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"steps is {steps!r}; expected a whole number of at least 1")
        if image.ndim != 4 or image.shape[1] != 3:
            raise InputError(f"the image has shape {tuple(image.shape)}; expected b 3 H W")
        if latent.ndim != 4 or latent.shape[1] != self.config.channels:
            raise InputError(f"the latent has shape {tuple(latent.shape)}; this model enlarges maps of "
                             f"{self.config.channels} channels, b {self.config.channels} h w")
        if image.shape[0] != latent.shape[0]:
            raise InputError(f"the image is a batch of {image.shape[0]}, the latent one of {latent.shape[0]}; "
                             "expected one guide for each latent")
        parameter = next(self.parameters())
        where = self.run_device or parameter.device
        if parameter.dtype == torch.float16 and where.type == "cpu" and not has_cpu_fp16():
            raise InputError(f"the model is in fp16, and this version of torch ({torch.__version__}) computes no fp16 "
                             "convolutions on a CPU; use fp32 (model.float()) or a newer torch")
        if 0 in image.shape or 0 in latent.shape:
            raise InputError(f"empty input: image {tuple(image.shape)}, latent {tuple(latent.shape)}")
