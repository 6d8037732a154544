"""Super-resolution: shrink an original, enlarge it again by every method, and measure against the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..color import match_color
from ..consistency import make_consistent
from ..errors import InputError, MissingExtra
from ..imageio import find_pictures, read_picture
from ..model import UPLiFT
from ..resample import antialias
from ..upscaling import upscale_latents
from ..vae import Codec

METHODS = ("nearest latent", "bilinear latent", "UPLiFT", "UPLiFT + colour", "UPLiFT + consistency", "codec",
           "bicubic", "bicubic + consistency")
"""``codec`` is the original through the codec: what no latent can beat without consistency."""

SAMPLES = "skimage"
_SAMPLES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")


@dataclass
class SuperResolution:
    """Results of one scale: ``psnr[method][i]`` in dB and ``ssim[method][i]``, in the order of ``names``."""

    scale: int
    names: list[str] = field(default_factory=list)
    psnr: dict[str, list[float]] = field(default_factory=lambda: {m: [] for m in METHODS})
    ssim: dict[str, list[float]] = field(default_factory=lambda: {m: [] for m in METHODS})

    def mean(self, method: str) -> tuple[float, float]:
        n = max(1, len(self.names))
        return sum(self.psnr[method]) / n, sum(self.ssim[method]) / n

    def least_gain(self, method: str, over: str) -> float:
        """The smallest difference in PSNR on any single picture."""
        return min(a - b for a, b in zip(self.psnr[method], self.psnr[over], strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "names": self.names, "psnr": self.psnr, "ssim": self.ssim,
                "mean": {method: dict(zip(("psnr", "ssim"), self.mean(method), strict=True)) for method in METHODS}}


def originals(data: str | Path, crop: int | None, multiple: int) -> Iterator[tuple[str, Tensor]]:
    """Names and pictures ``1 3 H W`` in [0, 1]: of a folder, or scikit-image's colour photographs ("skimage").

    The center ``crop`` pixels of each, or all of it cut to a multiple. Pictures that are too small are an error.
    """
    for name, picture in _samples() if str(data) == SAMPLES else _folder(Path(data)):
        height, width = picture.shape[1:]
        side = (crop, crop) if crop else (height // multiple * multiple, width // multiple * multiple)
        if height < side[0] or width < side[1] or 0 in side:
            raise InputError(f"{name} is {width}x{height} pixels; expected at least {side[1] or multiple}x"
                             f"{side[0] or multiple}. Use a smaller --crop, or take it out of the folder")
        top, left = (height - side[0]) // 2, (width - side[1]) // 2
        yield name, picture[None, :, top:top + side[0], left:left + side[1]]


def _folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path, name in find_pictures([folder]):
        yield str(name), read_picture(path).rgb


def _samples() -> Iterator[tuple[str, Tensor]]:
    try:
        import skimage.data
    except ImportError:
        raise MissingExtra("scikit-image", "eval", "Measuring on its samples") from None
    for name in _SAMPLES:
        yield name, torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1).float().div(255)


def enlarge_all(model: UPLiFT, vae: Codec, original: Tensor, scale: int, seed: int = 0) -> dict[str, Tensor]:
    """Every method's picture of an original ``1 3 H W`` shrunk by ``scale`` (antialiased bilinear), clamped."""
    height, width = original.shape[2:]
    low = antialias(original, (height // scale, width // scale))
    latent = vae.encode(low)
    nearest = vae.decode(F.interpolate(latent, scale_factor=scale, mode="nearest"))
    bilinear = vae.decode(F.interpolate(latent, scale_factor=scale, mode="bilinear", align_corners=False))
    ours = vae.decode(upscale_latents(model, latent, low, scale=scale, seed=seed)).clamp(0, 1)
    fixed = match_color(ours, low, "mean").clamp(0, 1)
    bicubic = F.interpolate(low, scale_factor=scale, mode="bicubic", align_corners=False).clamp(0, 1)
    return dict(zip(METHODS, (nearest, bilinear, ours, fixed, make_consistent(fixed, low),
                              vae.decode(vae.encode(original)), bicubic, make_consistent(bicubic, low)), strict=True))


def evaluate_sr(model: UPLiFT, vae: Codec, data: str | Path, *, scale: int = 2, crop: int | None = 256, seed: int = 0,
                progress: Callable[[str], None] | None = None,
                keep: Callable[[str, Tensor, dict[str, Tensor]], None] | None = None) -> SuperResolution:
    """PSNR and SSIM of every method (torchmetrics, data range 1) on pictures that the model has not seen.

    keep: called with the name, the original and all pictures, to make sheets of. Raises InputError, MissingExtra.
    """
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio as psnr
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    except ImportError:
        raise MissingExtra("torchmetrics", "eval", "Measuring PSNR and SSIM") from None
    multiple = vae.patch * scale
    if crop is not None and crop % multiple:
        raise InputError(f"crop is {crop}; expected a multiple of {multiple} for {scale}x")
    result = SuperResolution(scale)
    for name, original in originals(data, crop, multiple):
        if progress is not None:
            progress(name)
        with torch.no_grad():
            pictures = enlarge_all(model, vae, original, scale, seed)
        result.names.append(name)
        for method, picture in pictures.items():
            result.psnr[method].append(float(psnr(picture, original, data_range=1.0)))
            result.ssim[method].append(float(ssim(picture, original, data_range=1.0)))  # type: ignore[arg-type]
        if keep is not None:
            keep(name, original, pictures)
    if not result.names:
        raise InputError(f"{data}: no pictures")
    return result
