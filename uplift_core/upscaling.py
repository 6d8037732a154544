"""From a picture or a latent to a larger one: source -> guide + latent -> UPLiFT -> codec -> picture."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .color import COLOR_METHODS, match_color
from .consistency import make_consistent
from .errors import InputError
from .memory import parse_bytes
from .model import UPLiFT, imagenet_normalise
from .noise import SeededNoise
from .resample import antialias
from .tiling import Job, Progress, choose_tile, run, steps_for
from .vae.spaces import BUNDLED_VAE, check_pair

MAX_FACTOR = 8
Picture = TypeVar("Picture")


def upscale_latents(model: UPLiFT, latents: Tensor, image: Tensor, *, scale: int = 2, seed: int = 0,
                    noise_strength: float = 1.0, tile: str | int | None = "auto",
                    memory_budget: int | str | None = None, progress: Progress | None = None,
                    should_stop: Callable[[], bool] | None = None) -> Tensor:
    """Enlarge latents or features: ``b c h w`` to ``b c scale*h scale*w``.

    latents: unscaled (SD1.5: without the factor 0.18215). image: the guide ``b 3 H W`` in [0, 1], covering the same
    pixels (H = patch h, W = patch w). scale: 2, 4, 8, ... Item i of the batch uses ``seed + i``; ``noise_strength``
    scales the noise the model was trained with (1; 0 for none).

    tile: "auto" fits ``memory_budget`` (bytes or "4GB": working memory beyond weights, picture and latents; default
    most of what is free) and shrinks the tiles if memory runs out; None for no tiles; or a side in image pixels.
    progress: called as ``(done, total)`` in tiles. should_stop: asked often; True ends with Cancelled.

    Raises InputError for inputs that do not fit, OutOfMemory when even the smallest tiles do not.
    """
    config = model.config
    steps = steps_for(model, scale)
    if image.ndim != 4 or image.shape[1] != 3:
        raise InputError(f"the guide image has shape {tuple(image.shape)}; expected b 3 H W in [0, 1]")
    for name, values, unit in (("guide image", image, "numbers in [0, 1]"), ("latents", latents, "numbers")):
        if not values.is_floating_point():
            raise InputError(f"the {name} has the type {values.dtype}; expected floating-point {unit}")
    if latents.ndim != 4 or latents.shape[1] != config.channels or 0 in latents.shape:
        raise InputError(f"the latents have shape {tuple(latents.shape)}; this model enlarges b {config.channels} h w")
    expected = tuple(n * config.patch for n in latents.shape[2:])
    if tuple(image.shape[2:]) != expected:
        raise InputError(f"the guide image is {image.shape[3]}x{image.shape[2]} pixels, but latents of "
                         f"{latents.shape[3]}x{latents.shape[2]} cover {expected[1]}x{expected[0]}; give the picture "
                         "that the latents were made from")
    if image.shape[0] not in (1, latents.shape[0]):
        raise InputError(f"{latents.shape[0]} latents and {image.shape[0]} guide images; expected as many, or one")
    side = parse_tile(tile, config.patch)
    SeededNoise(seed, noise_strength)  # a bad strength is reported before any work
    budget = parse_bytes(memory_budget)

    guide = image.expand(latents.shape[0], -1, -1, -1)
    if config.image_norm == "imagenet":
        guide = imagenet_normalise(guide)
    unit = config.step_factor**steps
    many = latents.shape[0] > 1
    out = latents.new_empty(*latents.shape[:2], *(n * unit for n in latents.shape[2:])) if many else None
    for i in range(latents.shape[0]):
        job = Job(model, guide[i:i + 1], latents[i:i + 1], steps, SeededNoise(seed + i, noise_strength),
                  _item(progress, i, latents.shape[0]), should_stop, None if out is None else out[i:i + 1])
        chosen = choose_tile(job, budget) if side == "auto" else side
        result = run(job, chosen, adapt=side is not None)  # type: ignore[arg-type]
    return result.to(latents.device) if out is None else out


def parse_tile(tile: str | int | None, patch: int) -> str | int | None:
    """ "auto", None (also "off", "none") or a side in pixels, checked."""
    if isinstance(tile, str):
        text = tile.strip().lower()
        if text in ("auto", "off", "none"):
            return "auto" if text == "auto" else None
        if not text.isdigit():
            raise InputError(f"tile is {tile!r}; expected auto, off or a side in pixels")
        tile = int(text)
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, (int, np.integer)) or tile < patch):
        raise InputError(f"tile is {tile!r}; expected auto, off or a side of at least {patch} pixels")
    return tile


def _item(progress: Progress | None, i: int, n: int) -> Progress | None:
    if progress is None or n == 1:
        return progress
    return lambda done, total: progress(done + i * total, total * n)


def upscale_image(model: UPLiFT, vae: Any, image: Picture, *, scale: float = 2, seed: int = 0,
                  noise_strength: float = 1.0, tile: str | int | None = "auto",
                  memory_budget: int | str | None = None, color_fix: str = "mean", consistency: bool | None = None,
                  progress: Progress | None = None, should_stop: Callable[[], bool] | None = None) -> Picture:
    """Enlarge a picture by any factor above 1, up to 8; the same kind of thing comes back as went in.

    image: PIL image (turned upright; an alpha channel is enlarged separately; 16-bit gray comes back as such); NumPy
    ``H W 3`` or ``b H W 3``, uint8 or float in [0, 1]; or tensor ``3 H W`` or ``b 3 H W`` in [0, 1]. Any size:
    what is not a multiple of the patch is padded and cropped back. The model takes the next power of two, an
    antialiased resize goes to exactly ``round(scale * H) x round(scale * W)``.

    vae: a codec of :func:`uplift_core.load_vae` (anything with ``encode``, ``decode`` and ``latent_space``).
    color_fix: one of none, mean, adain, wavelet. consistency: pin the result to the given pixels by back-projection
    and take faint unrest out (make_consistent); None: for the bundled model only, which needs it (``pins_pixels``).
    The other options are those of :func:`upscale_latents`.
    """
    check_options(scale, color_fix)
    parse_tile(tile, model.config.patch)
    parse_bytes(memory_budget)
    SeededNoise(seed, noise_strength)
    check_pair(model.config.latent_space, vae.latent_space)
    if consistency is None:
        consistency = pins_pixels(model)
    low, restore = _to_tensor(image)
    result = _upscale(model, vae, low, scale, seed, noise_strength, tile, memory_budget, color_fix, consistency,
                      progress, should_stop)
    return restore(result)


def pins_pixels(model: UPLiFT) -> bool:
    """Whether pictures of this model are made consistent with the given pixels unless the user says otherwise."""
    return model.config.latent_space == BUNDLED_VAE


def check_options(scale: float, color_fix: str) -> None:
    """Raises InputError for a factor or colour method that no picture could be enlarged with."""
    if not isinstance(scale, (int, float, np.integer, np.floating)) or not 1 < scale <= MAX_FACTOR:
        raise InputError(f"scale is {scale!r}; expected a factor above 1, up to {MAX_FACTOR}")
    if color_fix not in COLOR_METHODS:
        raise InputError(f"color_fix is {color_fix!r}; choose one of {', '.join(COLOR_METHODS)}")


@torch.no_grad()
def _upscale(model: UPLiFT, vae: Any, low: Tensor, scale: float, seed: int, noise_strength: float,
             tile: str | int | None, memory_budget: int | str | None, color_fix: str, consistency: bool,
             progress: Progress | None, should_stop: Callable[[], bool] | None) -> Tensor:
    height, width = low.shape[2:]
    factor = model.config.step_factor
    if factor < 2:
        raise InputError("this model keeps the size of what it is given (up_steps 0): it cannot enlarge pictures")
    power = factor ** math.ceil(math.log(scale, factor) - 1e-9)
    guide = pad_to(low, model.config.patch)
    latents = vae.encode(guide, **_codec_options(vae.encode, memory_budget, should_stop))
    larger = upscale_latents(model, latents, guide, scale=power, seed=seed, noise_strength=noise_strength, tile=tile,
                             memory_budget=memory_budget, progress=progress, should_stop=should_stop)
    del latents
    decoded = vae.decode(larger, **_codec_options(vae.decode, memory_budget, should_stop))
    picture = decoded[:, :, :height * power, :width * power].to(low)
    picture = antialias(picture, (max(1, round(height * scale)), max(1, round(width * scale))))
    picture = match_color(picture, low, color_fix).clamp(0, 1)
    return make_consistent(picture, low) if consistency else picture


def _codec_options(method: Any, memory_budget: int | str | None, should_stop: Callable[[], bool] | None
                   ) -> dict[str, Any]:
    """What of our options a codec understands; a host's own VAE may take none."""
    known = inspect.signature(method).parameters
    options = {"free_bytes": parse_bytes(memory_budget), "should_stop": should_stop}
    return {name: value for name, value in options.items() if name in known}


def pad_to(image: Tensor, multiple: int) -> Tensor:
    """``b c H W`` with H and W brought to a multiple by mirroring (repeating, where there is too little to mirror)."""
    bottom, right = -image.shape[2] % multiple, -image.shape[3] % multiple
    if not (bottom or right):
        return image
    mirror = bottom < image.shape[2] and right < image.shape[3]
    return F.pad(image, (0, right, 0, bottom), mode="reflect" if mirror else "replicate")


def _to_tensor(image: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """``b 3 H W`` in [0, 1], and the way back."""
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if hasattr(image, "convert") and hasattr(image, "mode"):
        return _from_pil(image)
    raise InputError(f"cannot enlarge a {type(image).__name__}; expected a PIL image, a NumPy array or a tensor")


def _from_tensor(image: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    if not image.is_floating_point():
        raise InputError(f"the tensor is {image.dtype}; expected floats in [0, 1]")
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape:
        raise InputError(f"the tensor has shape {tuple(image.shape)}; expected 3 H W or b 3 H W")
    batch = image if image.ndim == 4 else image[None]
    return batch.float(), lambda y: (y if image.ndim == 4 else y[0]).to(image)


def _from_array(image: np.ndarray) -> tuple[Tensor, Callable[[Tensor], np.ndarray]]:
    if image.ndim not in (3, 4) or image.shape[-1] != 3 or 0 in image.shape:
        raise InputError(f"the array has shape {image.shape}; expected H W 3 or b H W 3")
    whole = image.dtype.kind == "u" and image.dtype.itemsize <= 2
    if not whole and not np.issubdtype(image.dtype, np.floating):  # of wider integers nobody knows what white is
        raise InputError(f"the array is {image.dtype}; expected uint8, uint16 or floats in [0, 1]")
    top = float(np.iinfo(image.dtype).max) if whole else 1.0
    batch = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32) / np.float32(top))

    def back(y: Tensor) -> np.ndarray:
        values = y.permute(0, 2, 3, 1).cpu().numpy()
        values = np.rint(values * top) if whole else values
        return (values if image.ndim == 4 else values[0]).astype(image.dtype)

    return (batch if image.ndim == 4 else batch[None]).permute(0, 3, 1, 2), back


def _from_pil(image: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    from PIL import Image, ImageOps

    from .imageio import fill_transparent

    image = ImageOps.exif_transpose(image)  # what comes back has no EXIF that could turn it later
    if image.mode in ("I;16", "I;16B", "I;16L"):
        return _from_deep_gray(image)
    if image.mode in ("I", "F"):
        raise InputError(f"the picture has mode {image.mode!r}, whose range is unknown; convert it to a NumPy array of "
                         "floats in [0, 1], H W 3")
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    alpha = image.convert("RGBA").getchannel("A") if has_alpha else None
    try:
        rgb = np.asarray(image.convert("RGB"), dtype=np.float32)
    except ValueError:
        raise InputError(f"the picture has mode {image.mode!r}; convert it to RGB or RGBA first") from None
    low = torch.from_numpy(rgb / 255).permute(2, 0, 1)[None]
    if alpha is not None:
        low = fill_transparent(low[0], torch.from_numpy(np.array(alpha, np.float32))[None])[None]
    gray = image.mode in ("L", "LA", "1")

    def back(y: Tensor) -> Any:
        out = Image.fromarray(np.rint(y[0].permute(1, 2, 0).cpu().numpy() * 255).astype(np.uint8))
        out = out.convert("L") if gray else out
        if alpha is not None:
            out.putalpha(alpha.resize(out.size, Image.Resampling.BICUBIC))
        return out

    return low, back


def _from_deep_gray(image: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    from PIL import Image

    values = torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)
    return values.expand(1, 3, -1, -1), lambda y: Image.fromarray(
        np.rint(y[0].mean(0).cpu().numpy() * 65535).astype(np.uint16))
