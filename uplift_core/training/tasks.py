"""What the trainer can train: an UPLiFT under a frozen teacher, the tiny codec, and diffusers' AutoencoderTiny."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoints
from ..backbones import Backbone, load_backbone
from ..config import ModelConfig
from ..errors import InputError
from ..loading import load
from ..model import UPLiFT, imagenet_normalise
from ..vae import LATENT_SPACES, Codec, load_vae
from ..vae.building import autoencoder
from ..vae.codec import ModuleCodec, PatchCodec, TinyCodec
from ..vae.patchnet import BlockStatistics, PatchNet
from .latent_cache import LatentCache, fingerprint
from .linear_start import begin, fit_readout
from .objective import MultiDepth, distance, drawn, pyramid
from .preview import sheet
from .recipe import Recipe

log = logging.getLogger(__name__)


class Task(Protocol):
    """What the trainer drives. ``objective`` is the module whose forward pass returns the loss."""

    objective: nn.Module
    measured_crops: int
    """How many crops ``prepare`` wants to see."""

    @property
    def looks_first(self) -> bool:
        """Whether a fresh run begins with a look at that many crops."""

    @property
    def network(self) -> nn.Module: ...

    def prepare(self, images: Callable[[], Iterator[Tensor]]) -> None:
        """Look at the first pictures before a fresh run, for what has to be measured; ``images()``: ``b 3 S S``."""

    def inputs(self, images: Tensor, keys: list[str], seed: int, device: torch.device, *, cached: bool = True
               ) -> tuple[Any, ...]:
        """What the objective takes, for pictures ``b 3 S S`` in [0, 1]."""

    def blank_inputs(self) -> tuple[Any, ...]:
        """The same on the meta device, in the recipe's sizes: shapes without values."""

    def save(self, state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None: ...

    def preview(self, network: nn.Module, images: Tensor, path: Path) -> None: ...

    def describe(self) -> dict[str, str]: ...


class UpliftTask:
    """An UPLiFT for the latents of a VAE or the features of a backbone."""

    measured_crops = 1024

    def __init__(self, recipe: Recipe, device: torch.device, teacher: Codec | Backbone | None = None):
        self.recipe, self.device = recipe, device
        self.vae: Codec | None = None
        self.backbone: Backbone | None = None
        if isinstance(teacher, Backbone):
            self.backbone = teacher
        elif teacher is not None:
            self.vae = teacher
        elif recipe.teacher.vae:
            self.vae = load_vae(recipe.teacher.vae, device=device, latent_space=recipe.teacher.latent_space or None)
        else:
            self.backbone = load_backbone(recipe.teacher.backbone, device=device)
        start = recipe.model.start
        model = load(start, device="cpu").requires_grad_() if start else UPLiFT(self._config())
        self._check(model.config)
        self.objective = self._wrap(model)
        self.cache = None
        if recipe.data.cache:
            if recipe.data.crop == "random" and not recipe.data.crops_per_photo:
                log.warning("data.cache: random crops never come again, so that nothing is found in the cache; set "
                            "data.crops_per_photo, or data.crop to center")
            module = self.vae.module if isinstance(self.vae, ModuleCodec) else self.backbone.module  # type: ignore
            # A TAESD's latents are scaled as the latent space says that it is taken for.
            scaled = f":{self.vae.scaling_factor}:{self.vae.shift}" if self.vae else ""
            self.cache = LatentCache(Path(recipe.data.cache).expanduser(), fingerprint(module) + scaled)

    def _config(self) -> ModelConfig:
        config = self.recipe.model_config()
        if self.backbone:
            config = replace(config, image_norm="imagenet")  # as the published models: whatever the backbone reads
        if not config.latent_space:
            space = self.vae.latent_space if self.vae else (
                self.backbone.latent_space or self.backbone.name)  # type: ignore[union-attr]
            config = replace(config, latent_space=space)
        return config

    def _check(self, config: ModelConfig) -> None:
        if self.vae:
            if config.latent_space and self.vae.latent_space not in ("", config.latent_space):
                raise InputError(f"model.latent_space is '{config.latent_space}', and the teacher makes "
                                 f"'{self.vae.latent_space}' latents; leave model.latent_space empty (--set "
                                 "model.latent_space=), or name a VAE of that space as the teacher")
            if (config.channels, config.patch) != (self.vae.channels, self.vae.patch):
                raise InputError(f"the VAE makes latents of {self.vae.channels} channels, patch {self.vae.patch}; the "
                                 f"model takes {config.channels}, patch {config.patch}")
            return
        assert self.backbone is not None
        if config.latent_space in LATENT_SPACES:
            raise InputError(f"model.latent_space is '{config.latent_space}', which is of a VAE, and the teacher is "
                             f"the backbone {self.backbone.name}; leave it empty")
        if (config.channels, config.patch) != (self.backbone.channels, self.backbone.patch):
            raise InputError(f"{self.backbone.name} gives {self.backbone.channels} channels of patch "
                             f"{self.backbone.patch}; the model takes {config.channels} of patch {config.patch}")

    def _wrap(self, model: UPLiFT) -> MultiDepth:
        recipe = self.recipe
        return MultiDepth(model, recipe.data.depths, recipe.loss, recipe.latents.augment, floor=recipe.loss_floor,
                          fixed_norm=recipe.model.fixed_norm).train()

    @property
    def network(self) -> UPLiFT:
        return self.objective.model

    def encode(self, images: Tensor) -> Tensor:
        if self.vae:
            return self.vae.encode(images, tile=None)
        return self.backbone.encode(images)  # type: ignore[union-attr]

    @property
    def _normalises(self) -> bool:
        return self.recipe.latents.normalise and not self.recipe.model.start

    @property
    def looks_first(self) -> bool:
        return self._normalises or self.recipe.model.linear_start

    def prepare(self, images: Callable[[], Iterator[Tensor]]) -> None:
        if self._normalises:
            self._measure_latents(images())
        if self.recipe.model.linear_start:
            self._begin_linear(images)

    def _begin_linear(self, images: Callable[[], Iterator[Tensor]]) -> None:
        def batches() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
            for batch in images():
                guides, maps, _ = self.inputs(batch, [], 0, self.device, cached=False)
                yield guides, maps

        model = self.network.eval().to(self.device)
        begin(model)
        fit_readout(model, batches, self.recipe.data.depths, self.recipe.loss_floor)
        self.objective.train()

    def _measure_latents(self, images: Iterator[Tensor]) -> None:
        n, count = self.network.config.channels, 0
        total, squares = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        for batch in images:
            latent = self.encode(batch.to(self.device)).double().cpu()
            total += latent.sum((0, 2, 3))
            squares += (latent**2).sum((0, 2, 3))
            count += latent.shape[0] * latent.shape[2] * latent.shape[3]
        mean = total / count
        std = (squares / count - mean**2).clamp_min(1e-12).sqrt()
        config = replace(self.network.config, latent_mean=tuple(round(v, 6) for v in mean.tolist()),
                         latent_std=tuple(max(1e-6, round(v, 6)) for v in std.tolist()))
        self.adopt(config)

    def adopt(self, config: ModelConfig) -> None:
        """Go on with the same weights under another configuration (measured latents, or those of a snapshot)."""
        model = UPLiFT(config)
        model.load_state_dict(self.network.state_dict())
        self.objective = self._wrap(model)

    def inputs(self, images: Tensor, keys: list[str], seed: int, device: torch.device, *, cached: bool = True
               ) -> tuple[Any, ...]:
        levels = max(self.recipe.data.depths)
        images = images.to(device)
        sizes = pyramid(images, levels)
        with torch.no_grad():
            maps = [self._encoded(image, keys if cached else [], level) for level, image in enumerate(sizes)]
            guides = [g.contiguous(memory_format=torch.channels_last) for g in self._guides(sizes, maps, seed)]
        return guides, maps, seed

    def blank_inputs(self) -> tuple[Any, ...]:
        data, config = self.recipe.data, self.network.config
        sides = [data.size >> level for level in range(max(data.depths) + 1)]
        guides = [_blank(data.batch, 3, side, side) for side in sides]
        maps = [_blank(data.batch, config.channels, side // config.patch, side // config.patch) for side in sides]
        return guides, maps, 0

    def _guides(self, sizes: list[Tensor], maps: list[Tensor], seed: int) -> list[Tensor]:
        if self.backbone:
            return [imagenet_normalise(image) for image in sizes]
        share = self.recipe.data.guides_decoded
        if not share:
            return sizes
        decoded = torch.rand(len(sizes[0]), generator=torch.Generator().manual_seed(seed)) < share
        if not decoded.any():
            return sizes
        guides = [sizes[0]]
        for image, latent in zip(sizes[1:], maps[1:], strict=True):
            image = image.clone()
            image[decoded] = self.vae.decode(latent[decoded], tile=None).to(image)  # type: ignore[union-attr]
            guides.append(image)
        return guides

    def _encoded(self, images: Tensor, keys: list[str], level: int) -> Tensor:
        if self.cache is None or not keys:
            return self.encode(images)
        found = [self.cache.read(f"{key}:{level}") for key in keys]
        missing = [i for i, latent in enumerate(found) if latent is None]
        if missing:
            for i, latent in zip(missing, self.encode(images[missing]), strict=True):
                self.cache.write(f"{keys[i]}:{level}", latent)
                found[i] = latent
        return torch.stack([latent.to(images.device) for latent in found])  # type: ignore[union-attr]

    def save(self, state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        checkpoints.save(state, path, config=self.network.config, extra_metadata=metadata)

    def load(self, path: Path) -> None:
        """Take the configuration of a saved file: a snapshot may hold measured latents."""
        self.adopt(checkpoints.build(checkpoints.read_weights(path)).config)

    def preview(self, network: nn.Module, images: Tensor, path: Path) -> None:
        if self.vae is None:
            return
        sizes = pyramid(images.to(self.device), 1)
        latent = self.vae.encode(sizes[1], tile=None)
        bilinear = F.interpolate(latent, scale_factor=2, mode="bilinear", align_corners=False)
        network.eval()
        with torch.no_grad():
            upscaled = network(sizes[1].to(self.device), latent, 1, noise=0)
        self.objective.train()
        decode = self.vae.decode
        sheet(path, {"low resolution": F.interpolate(sizes[1], scale_factor=2, mode="nearest"),
                     "bilinear latent": decode(bilinear, tile=None), "UPLiFT": decode(upscaled, tile=None),
                     "codec": decode(self.vae.encode(sizes[0], tile=None), tile=None), "original": sizes[0]})

    def describe(self) -> dict[str, str]:
        of = f"latents of {self.vae!r}" if self.vae else f"features of {self.backbone.name}"  # type: ignore[union-attr]
        return {"trains": f"UPLiFT for {of}", "depths": ", ".join(map(str, self.recipe.data.depths)),
                "crops": f"{self.recipe.data.size} px, batch {self.recipe.data.batch}"}


class _CodecLoss(nn.Module):
    def __init__(self, net: PatchNet, loss: str, augment: float, floor: float):
        super().__init__()
        self.net, self.loss, self.augment, self.floor = net, loss, augment, floor

    def forward(self, images: Tensor, latent: Tensor, seed: int) -> Tensor:
        if self.augment:
            generator = torch.Generator().manual_seed(seed)
            strength = self.augment * torch.rand(len(latent), 1, 1, 1, generator=generator)
            noise = drawn(latent.shape, generator, latent)
            latent = latent + (strength.to(noise.device) * noise).to(latent)
        unit = self.net.get_buffer("residual_std")
        return distance(self.net.decode(latent) / unit, images / unit, self.loss, self.floor)


class CodecTask:
    """The tiny codec. Its encoder is the linear optimum, measured once and kept; what is learned is the decoder's
    residual, from zero or from the weights in ``model.start``. Noise of up to ``latents.augment`` on the latents makes
    it bear the errors of an UPLiFT. The loss is in units of what the linear codec leaves."""

    measured_crops = 4096

    def __init__(self, recipe: Recipe, device: torch.device):
        assert recipe.codec is not None
        self.recipe, self.device = recipe, device
        net = PatchNet(recipe.codec)
        self.space = recipe.model.latent_space or "own"  # other components make other latents
        if recipe.model.start:
            start = load_vae(recipe.model.start)
            if not isinstance(start, PatchCodec) or start.module.config != recipe.codec:
                raise InputError(f"{recipe.model.start} is no tiny codec with {recipe.codec}")
            net.load_state_dict(start.module.state_dict())
            self.space = recipe.model.latent_space or start.latent_space  # the same components, the same latents
        self.objective = self._wrap(net)

    def _wrap(self, net: PatchNet) -> _CodecLoss:
        for part in (net.analysis, net.synthesis):
            part.requires_grad_(False)
        return _CodecLoss(net.train(), self.recipe.loss, self.recipe.latents.augment, self.recipe.loss_floor)

    @property
    def network(self) -> PatchNet:
        return self.objective.net

    @property
    def looks_first(self) -> bool:
        return not self.recipe.model.start

    def prepare(self, images: Callable[[], Iterator[Tensor]]) -> None:
        if not self.looks_first:
            return
        statistics = BlockStatistics(self.network.config.patch)
        for batch in images():
            statistics.add(batch)
        left = statistics.install(self.network)
        log.warning("%d components leave %.2f dB on the measured pictures", self.network.config.channels,
                    -10 * torch.tensor(max(left, 1e-12)).log10())

    def inputs(self, images: Tensor, keys: list[str], seed: int, device: torch.device, *, cached: bool = True
               ) -> tuple[Any, ...]:
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            return images, self.network.encode(images), seed

    def blank_inputs(self) -> tuple[Any, ...]:
        data, config = self.recipe.data, self.network.config
        side = data.size // config.patch
        return _blank(data.batch, 3, data.size, data.size), _blank(data.batch, config.channels, side, side), 0

    def save(self, state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        checkpoints.write_safetensors(state, path, {**self.network.config.to_metadata(), "latent_space": self.space,
                                                    **metadata})

    def load(self, path: Path) -> None:
        """Nothing of a snapshot but its weights matters."""

    def preview(self, network: nn.Module, images: Tensor, path: Path) -> None:
        codec = PatchCodec(network)  # type: ignore[arg-type]
        latent = codec.encode(images.to(self.device), tile=None)
        with torch.no_grad():
            linear = network.synthesis(latent).clamp(0, 1)  # type: ignore[operator]
        sheet(path, {"linear": linear, "codec": codec.decode(latent, tile=None), "original": images})
        network.train()
        for name, value in network.named_parameters():
            value.requires_grad_(not name.startswith(("analysis", "synthesis")))

    def describe(self) -> dict[str, str]:
        return {"trains": f"tiny codec, {self.recipe.codec}",
                "crops": f"{self.recipe.data.size} px, batch {self.recipe.data.batch}"}


class _AutoencoderLoss(nn.Module):
    def __init__(self, module: nn.Module, recipe: Recipe):
        super().__init__()
        assert recipe.autoencoder is not None
        self.module, self.loss, self.floor = module, recipe.loss, recipe.loss_floor
        self.augment, self.part = recipe.latents.augment, recipe.autoencoder

    def forward(self, images: Tensor, seed: int) -> Tensor:
        signed = images * 2 - 1
        latent = self.module.encode(signed).latents  # type: ignore[operator]
        held = latent.new_zeros(())
        if self.part.anchor:
            held = F.mse_loss(latent[:, :3].float(), F.avg_pool2d(signed, self.part.patch))
        if self.augment:
            generator = torch.Generator().manual_seed(seed)
            latent = latent + self.augment * drawn(latent.shape, generator, latent).to(latent)
        decoded = self.module.decode(latent).sample  # type: ignore[operator]
        return distance(decoded, signed, self.loss, self.floor) + self.part.anchor * held


class AutoencoderTask:
    """A diffusers ``AutoencoderTiny``, encoder and decoder together. Noise of std ``latents.augment`` on the latents
    makes the decoder bear the errors of an UPLiFT."""

    measured_crops, looks_first = 0, False

    def __init__(self, recipe: Recipe, device: torch.device):
        assert recipe.autoencoder is not None
        self.recipe, self.device, self.part = recipe, device, recipe.autoencoder
        blocks = (1, *[self.part.blocks] * (self.part.levels - 1))
        widths = (self.part.width,) * self.part.levels
        module = autoencoder("AutoencoderTiny")(
            latent_channels=self.part.channels, num_encoder_blocks=blocks, num_decoder_blocks=blocks[::-1],
            encoder_block_out_channels=widths, decoder_block_out_channels=widths)
        if recipe.model.start:
            start = load_vae(recipe.model.start)
            if not isinstance(start, TinyCodec) or shapes(start.module) != shapes(module):
                raise InputError(f"{recipe.model.start} is no AutoencoderTiny with {self.part}")
            module.load_state_dict(start.module.state_dict())
        self.objective = _AutoencoderLoss(module.train().requires_grad_(True), recipe)

    @property
    def network(self) -> nn.Module:
        return self.objective.module

    def prepare(self, images: Callable[[], Iterator[Tensor]]) -> None:
        """Nothing is measured before."""

    def inputs(self, images: Tensor, keys: list[str], seed: int, device: torch.device, *, cached: bool = True
               ) -> tuple[Any, ...]:
        return images.to(device).contiguous(memory_format=torch.channels_last), seed

    def blank_inputs(self) -> tuple[Any, ...]:
        data = self.recipe.data
        return _blank(data.batch, 3, data.size, data.size), 0

    def save(self, state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        checkpoints.write_safetensors(state, path, {"format": "pt", "latent_space": self.part.latent_space, **metadata})

    def load(self, path: Path) -> None:
        """Nothing of a snapshot but its weights matters."""

    def preview(self, network: nn.Module, images: Tensor, path: Path) -> None:
        with torch.no_grad():
            latent = network.encode(images.to(self.device) * 2 - 1).latents  # type: ignore[operator]
            decoded = network.decode(latent).sample * 0.5 + 0.5  # type: ignore[operator]
        colours = F.interpolate(latent[:, :3] * 0.5 + 0.5, size=tuple(images.shape[2:]), mode="nearest")
        sheet(path, {"first channels": colours.clamp(0, 1), "codec": decoded.clamp(0, 1), "original": images})

    def describe(self) -> dict[str, str]:
        return {"trains": f"AutoencoderTiny, {self.part}",
                "crops": f"{self.recipe.data.size} px, batch {self.recipe.data.batch}"}


def _blank(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in module.state_dict().items()}


def make_task(recipe: Recipe, device: torch.device) -> UpliftTask | CodecTask | AutoencoderTask:
    if recipe.autoencoder is not None:
        return AutoencoderTask(recipe, device)
    return CodecTask(recipe, device) if recipe.codec is not None else UpliftTask(recipe, device)
