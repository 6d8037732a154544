"""Pictures to latents and back. The [-1, 1] that a VAE wants, and the scaling TAESD has, exist only in here."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import InputError, OutOfMemory
from ..memory import free_memory, is_out_of_memory
from .patchnet import PatchNet
from .spaces import check_channels
from .tiles import check_stop, run_tiled

log = logging.getLogger(__name__)

TILES = (1024, 768, 512, 384, 256, 128, 64)
"""Sides that ``tile="auto"`` chooses from, in picture pixels, without the margin each tile is computed with."""

Progress = Callable[[int, int], None]
ShouldStop = Callable[[], bool]


@runtime_checkable
class Codec(Protocol):
    """Between pictures (``b 3 H W`` in [0, 1]) and *unscaled* latents (``b c H/patch W/patch``)."""

    latent_space: str
    """One of LATENT_SPACES, or empty when it is not known."""
    channels: int
    patch: int
    scaling_factor: float
    shift: float

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Codec: ...

    def encode(self, image: Tensor, *, tile: str | int | None = "auto", free_bytes: int | None = None,
               progress: Progress | None = None, should_stop: ShouldStop | None = None) -> Tensor: ...

    def decode(self, latent: Tensor, *, tile: str | int | None = "auto", free_bytes: int | None = None,
               progress: Progress | None = None, should_stop: ShouldStop | None = None) -> Tensor: ...

    def to_scaled(self, latent: Tensor) -> Tensor: ...

    def from_scaled(self, latent: Tensor) -> Tensor: ...


class ModuleCodec:
    """What all kinds of autoencoder share: checks, scaling, tiles, memory."""

    margin = 0  # latent pixels around a tile that are computed and thrown away or faded
    blend = 0  # latent pixels on each side of a seam over which tiles fade
    encode_bytes = decode_bytes = 0.0  # peak per picture pixel and batch item, for 4-byte numbers

    def __init__(self, module: nn.Module, latent_space: str, *, channels: int, patch: int, scaling_factor: float,
                 shift: float = 0.0):
        self.module = module.eval().requires_grad_(False)
        self.latent_space, self.channels, self.patch = latent_space, channels, patch
        self.scaling_factor, self.shift = scaling_factor, shift
        self.to()

    def __repr__(self) -> str:
        return (f"{type(self).__name__}(latent_space={self.latent_space!r}, channels={self.channels}, "
                f"patch={self.patch}, scaling_factor={self.scaling_factor}, device={self.device}, dtype={self.dtype})")

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ModuleCodec:
        """Move to the device and number format, None for as it is; returns itself."""
        # Not the module's own ``to``: in diffusers it warns of formats that do not matter here.
        nn.Module.to(self.module, device=device, dtype=dtype)
        # On a CPU a tenth to a quarter less time, and less memory; MPS reads such weights wrongly in some versions.
        last = self.device.type in ("cpu", "cuda", "xpu")
        nn.Module.to(self.module,  # type: ignore[call-overload]
                     memory_format=torch.channels_last if last else torch.contiguous_format)
        return self

    def to_scaled(self, latent: Tensor) -> Tensor:
        """Unscaled latents ``b c h w`` to those a diffusion model (diffusers, WebUI) works on."""
        check_channels(latent, self.channels, "the VAE")
        return (latent - self.shift) * self.scaling_factor

    def from_scaled(self, latent: Tensor) -> Tensor:
        """Latents ``b c h w`` of a diffusion model (diffusers, WebUI) to unscaled ones."""
        check_channels(latent, self.channels, "the VAE")
        return latent / self.scaling_factor + self.shift

    def encode(self, image: Tensor, *, tile: str | int | None = "auto", free_bytes: int | None = None,
               progress: Progress | None = None, should_stop: ShouldStop | None = None) -> Tensor:
        """Picture ``b 3 H W`` in [0, 1] to its unscaled latent ``b c H/patch W/patch``: the mode of the posterior.

        Height and width are multiples of ``patch``. The rest, and what is raised, is as in ``decode``.
        """
        self._check_image(image)
        return self._run(image, self._encode, tile=tile, src=self.patch, dst=1, channels=self.channels,
                         pixel_bytes=self.encode_bytes, free_bytes=free_bytes, progress=progress,
                         should_stop=should_stop)

    def decode(self, latent: Tensor, *, tile: str | int | None = "auto", free_bytes: int | None = None,
               progress: Progress | None = None, should_stop: ShouldStop | None = None) -> Tensor:
        """Unscaled latent ``b c h w`` to its picture ``b 3 h*patch w*patch`` in [0, 1].

        The result is fp32, on the device the input is on. ``tile``: the side of a tile in picture pixels, margins not
        counted; None for no tiles; "auto" for none as long as the estimate fits into ``free_bytes`` (default: the free
        memory of the device), then the largest that fit. ``progress(done, total)`` counts tiles.

        Tiles of an AutoencoderTiny are exact. An AutoencoderKL normalises over, and attends to, all it sees, so that
        its tiles are close to the whole and not equal; large ones are closer.

        Raises InputError, Cancelled, and OutOfMemory when not even small tiles fit.
        """
        check_channels(latent, self.channels, "the VAE")
        image = self._run(latent, self._decode, tile=tile, src=1, dst=self.patch, channels=3,
                          pixel_bytes=self.decode_bytes, free_bytes=free_bytes, progress=progress,
                          should_stop=should_stop)
        return image.clamp_(0, 1)

    def estimate_memory(self, what: str, height: int, width: int, *, tile: int | None = None, batch: int = 1) -> int:
        """Bytes that "encode" or "decode" of a picture of that size needs beside the weights, at its peak."""
        if what not in ("encode", "decode"):
            raise InputError(f"what is {what!r}; expected 'encode' or 'decode'")
        return self._estimate(self.encode_bytes if what == "encode" else self.decode_bytes, height, width, tile, batch)

    def _estimate(self, pixel_bytes: float, height: int, width: int, tile: int | None, batch: int) -> int:
        if tile is not None:
            side = tile + 2 * self.margin * self.patch
            height, width, batch = min(height, side), min(width, side), 1
        return int(batch * height * width * pixel_bytes * self.dtype.itemsize / 4) + (32 << 20)

    def _encode(self, image: Tensor) -> Tensor:
        """Picture in [-1, 1] to unscaled latent, in the module's own format."""
        raise NotImplementedError

    def _decode(self, latent: Tensor) -> Tensor:
        """Unscaled latent to picture in [0, 1], unclamped."""
        raise NotImplementedError

    def _check_image(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise InputError(f"the picture has the shape {tuple(image.shape)}; expected batch x 3 x height x width")
        if not image.is_floating_point():
            raise InputError(f"the picture holds {image.dtype}; expected floating point numbers in [0, 1]: divide "
                             "8-bit values by 255")
        height, width = image.shape[-2:]
        down, right = -height % self.patch, -width % self.patch
        if down or right:
            raise InputError(f"the picture is {width} x {height} pixels and the VAE needs multiples of {self.patch}: "
                             f"pad it to {width + right} x {height + down} with torch.nn.functional.pad(image, "
                             f"(0, {right}, 0, {down}), mode='replicate') and crop the result")
        low, high = (float(v) for v in torch.aminmax(image))
        if low < -0.5 or high > 1.5:
            raise InputError(f"the picture's values go from {low:.3g} to {high:.3g}; expected [0, 1]")

    def _run(self, x: Tensor, compute: Callable[[Tensor], Tensor], *, tile: str | int | None, src: int, dst: int,
             channels: int, pixel_bytes: float, free_bytes: int | None, progress: Progress | None,
             should_stop: ShouldStop | None) -> Tensor:
        if not x.is_floating_point() or not torch.isfinite(x).all():
            raise InputError(f"the {'picture' if src > 1 else 'latent'} ({x.dtype}) holds NaN or infinite numbers, or "
                             "no floating point numbers; expected finite ones")
        batch, height, width = x.shape[0], x.shape[-2] // src * self.patch, x.shape[-1] // src * self.patch
        free = free_memory(self.device) if free_bytes is None else free_bytes
        for plan in self._plans(tile, batch, height, width, pixel_bytes, free):
            try:
                with torch.no_grad():
                    if plan is None:
                        check_stop(should_stop)
                        out = self._finite(compute, x).to(x.device, torch.float32)
                        if progress is not None:
                            progress(1, 1)
                        return out
                    return run_tiled(x, lambda part: self._finite(compute, part), tile=plan, margin=self.margin,
                                     blend=self.blend, src=src, dst=dst, channels=channels, progress=progress,
                                     should_stop=should_stop)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("the VAE ran out of memory at %d x %d pixels (%s); trying smaller parts", width, height,
                            "whole" if plan is None else f"tiles of {plan * self.patch}")
            if self.device.type in ("cuda", "xpu"):
                getattr(torch, self.device.type).empty_cache()
        advice = "set tile='auto'" if tile is None else "close other programs, or use the CPU or a smaller picture"
        raise OutOfMemory(f"the VAE does not fit in memory at {width} x {height} pixels; {advice}")

    def _plans(self, tile: str | int | None, batch: int, height: int, width: int, pixel_bytes: float,
               free: int) -> list[int | None]:
        """What to try, in order: None is the batch in one go, a number is item by item in tiles of latent pixels."""
        whole = max(height, width)
        estimate = self._estimate(pixel_bytes, height, width, None, batch)
        if tile is None:
            return [None] if batch == 1 else [None, whole // self.patch] if estimate <= free else [whole // self.patch]
        if tile == "auto":
            sides = [whole, *(side for side in TILES if side < whole)]
            fit = [side for side in sides if self._estimate(pixel_bytes, height, width, side, 1) <= free]
            first = fit[0] if fit else sides[-1]
            if first < whole:
                log.info("the VAE needs about %d MB at %d x %d pixels and %d MB are free: tiles of %d", estimate >> 20,
                         width, height, free >> 20, first)
            sides = [side for side in sides if side <= first]
        elif isinstance(tile, int) and not isinstance(tile, bool) and tile > 0:
            sides = [tile, *(side for side in TILES if side <= tile // 2)]
        else:
            raise InputError(f"tile is {tile!r}; expected 'auto', None for no tiles, or a side in pixels")
        plans: list[int | None] = [max(1, -(-side // self.patch)) for side in sides]
        if sides[0] < whole or (batch > 1 and estimate > free):
            return plans
        return [None, *(plans if batch > 1 else plans[1:])]

    def _finite(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Compute on the module's device and format; in fp32 from here on where fp16 overflows, as some VAEs do."""
        result = compute(x.to(self.device, self.dtype))
        if self.dtype == torch.float16 and not torch.isfinite(result).all():
            log.warning("the VAE overflows in fp16; it goes on in fp32")
            self.to(dtype=torch.float32)
            result = compute(x.to(self.device, self.dtype))
        return result


class KLCodec(ModuleCodec):
    """An ``AutoencoderKL``: the VAE of Stable Diffusion, SDXL, SD3 or Flux."""

    margin, blend = 16, 8

    def __init__(self, module: Any, latent_space: str, *, scaling_factor: float, shift: float = 0.0):
        widths = module.config.block_out_channels
        # Measured on a CPU at 512 x 512, fp32, SD1.5 widths: 2600 bytes a pixel to encode, 3420 to decode; most of it
        # are copies of the maps at full size, which have the first (encode) or second (decode) width.
        self.encode_bytes = 22.0 * widths[0]
        self.decode_bytes = 15.0 * max(widths[:2])
        super().__init__(module, latent_space, channels=module.config.latent_channels, patch=2 ** (len(widths) - 1),
                         scaling_factor=scaling_factor, shift=shift)

    def _encode(self, image: Tensor) -> Tensor:
        return self.module.encode(image * 2 - 1).latent_dist.mode()  # type: ignore[operator]

    def _decode(self, latent: Tensor) -> Tensor:
        return self.module.decode(latent).sample.float() * 0.5 + 0.5  # type: ignore[operator]


class TinyCodec(ModuleCodec):
    """An ``AutoencoderTiny`` (TAESD and its kin): fast previews. It was trained on *scaled* latents."""

    def __init__(self, module: Any, latent_space: str, *, scaling_factor: float, shift: float = 0.0):
        blocks, widths = module.config.num_decoder_blocks, module.config.decoder_block_out_channels
        # How far one 3 x 3 convolution after the other can see, in latent pixels: then tiles are exact.
        reach = [sum((3 * n + 1) / 2**i for i, n in enumerate(order)) + 1
                 for order in (blocks, module.config.num_encoder_blocks[::-1])]
        self.margin = math.ceil(max(reach))
        # Measured on a CPU at 512 x 512, fp32, width 64: 1080 bytes a pixel to encode, 870 to decode.
        self.encode_bytes = self.decode_bytes = 18.0 * widths[-1]
        super().__init__(module, latent_space, channels=module.config.latent_channels, patch=2 ** (len(blocks) - 1),
                         scaling_factor=scaling_factor, shift=shift)

    def _encode(self, image: Tensor) -> Tensor:
        return self.module.encode(image * 2 - 1).latents / self.scaling_factor + self.shift  # type: ignore[operator]

    def _decode(self, latent: Tensor) -> Tensor:
        scaled = (latent - self.shift) * self.scaling_factor
        return self.module.decode(scaled).sample.float() * 0.5 + 0.5  # type: ignore[operator]


class PatchCodec(ModuleCodec):
    """A ``PatchNet``: the bundled tiny codec."""

    def __init__(self, module: PatchNet, latent_space: str = "tiny"):
        config = module.config
        self.margin = config.reach
        # Maps at half size, of which a few are alive at a time, and the picture twice.
        self.encode_bytes = 40.0
        self.decode_bytes = 4.0 * config.detail + 24.0 * config.width / config.patch**2 + 64
        super().__init__(module, latent_space, channels=config.channels, patch=config.patch, scaling_factor=1.0)

    def _encode(self, image: Tensor) -> Tensor:
        return self.module.encode(image)  # type: ignore[operator]

    def _decode(self, latent: Tensor) -> Tensor:
        return self.module.decode(latent)  # type: ignore[operator]
