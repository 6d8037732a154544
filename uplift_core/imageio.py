"""Pictures from files and back: what a person's folder really holds, without losing alpha, colour profile or name."""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .errors import InputError

log = logging.getLogger(__name__)

READABLE = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LIMITS = {"JPEG": 65535, "WEBP": 16383}
MAX_PIXELS = 200_000_000
SETTINGS_KEY = "uplift"
_DROPPED_EXIF = (0x0112, 0x0201, 0x0202, 0x0100, 0x0101)  # orientation, thumbnail, size


@dataclass
class Picture:
    """A picture in memory. ``rgb``: ``3 H W`` float32 in [0, 1]; ``alpha``: ``1 H W`` or None.

    ``bits``: of the file's channels. ``gray``: the file had one colour channel. ``notes``: what could not be kept.
    """

    rgb: Tensor
    alpha: Tensor | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    bits: int = 8
    gray: bool = False
    notes: list[str] = field(default_factory=list)


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read any picture Pillow knows, turned upright. Raises InputError naming the file and what is wrong with it."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected a picture")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty (0 bytes)")
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise InputError(f"{path}: {image.width}x{image.height} pixels is more than the limit of "
                                 f"{max_pixels:,}; raise the limit (--max-pixels) if you trust the file")
            return _read(image)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more pixels than the limit of {max_pixels:,}") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a picture that can be read (PNG, JPEG, WebP, TIFF, BMP, GIF)") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read the file") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"{path}: the picture is damaged or cut short ({error})") from None


def _read(image: Image.Image) -> Picture:
    notes: list[str] = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"animated or many pages: only the first of {frames} is used")
    image.load()
    icc, exif = image.info.get("icc_profile"), image.getexif()
    image = ImageOps.exif_transpose(image)
    for tag in _DROPPED_EXIF:
        if tag in exif:
            del exif[tag]
    kept = exif.tobytes() if len(exif) else None

    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(image).astype(np.float32)
        top = 65535.0 if image.mode != "F" else max(1.0, float(values.max()))
        gray = torch.from_numpy(np.clip(values / np.float32(top), 0, 1).astype(np.float32))
        return Picture(gray.expand(3, -1, -1).contiguous(), None, icc, kept, 16, True, notes)
    if image.mode == "CMYK":
        image, icc = _from_cmyk(image, icc, notes)
    if image.mode in ("LAB", "YCbCr", "HSV"):
        image = image.convert("RGB")
    has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    gray_source = image.mode in ("L", "LA", "1", "La")
    if has_alpha:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
        rgb = torch.from_numpy(rgba[..., :3]).permute(2, 0, 1).contiguous()
        alpha = torch.from_numpy(rgba[..., 3])[None].contiguous()
        return Picture(fill_transparent(rgb, alpha), alpha, icc, kept, 8, gray_source, notes)
    values = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    rgb = torch.from_numpy(values).permute(2, 0, 1).contiguous()
    return Picture(rgb, None, icc, kept, 8, gray_source, notes)


def _from_cmyk(image: Image.Image, icc: bytes | None, notes: list[str]) -> tuple[Image.Image, bytes | None]:
    if icc:
        try:
            converted = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(icc)),
                                                  ImageCms.createProfile("sRGB"), outputMode="RGB")
            notes.append("CMYK was converted to sRGB with the file's own profile")
            return converted or image.convert("RGB"), None
        except (ImageCms.PyCMSError, OSError):
            pass
    notes.append("CMYK without a usable profile was converted to RGB")
    return image.convert("RGB"), None


def fill_transparent(rgb: Tensor, alpha: Tensor) -> Tensor:
    """``3 H W`` with the invisible colours replaced by nearby visible ones, so that they cannot bleed into edges.

    Push-pull: averages of what is visible at coarser and coarser scales fill what has nothing visible near.
    """
    visible = (alpha > 0).float()
    if visible.min() > 0 or visible.max() == 0:
        return rgb
    filled = _push_pull((rgb * visible)[None], visible[None])[0]
    return torch.where(visible > 0, rgb, filled)


def _push_pull(color: Tensor, weight: Tensor) -> Tensor:
    if min(color.shape[2:]) == 1 or bool((weight > 0).all()):
        mean = color.sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True).clamp_min(1e-6)
        return torch.where(weight > 0, color / weight.clamp_min(1e-6), mean)
    small = _push_pull(F.avg_pool2d(color, 2, 2, ceil_mode=True), F.avg_pool2d(weight, 2, 2, ceil_mode=True))
    below = F.interpolate(small, size=tuple(color.shape[2:]), mode="bilinear", align_corners=False)
    return torch.where(weight > 0, color / weight.clamp_min(1e-6), below)


# -- writing -------------------------------------------------------------------------------------------------------

def output_format(path: Path) -> str:
    """PNG, JPEG or WEBP by the file's ending."""
    try:
        return WRITABLE[path.suffix.lower()]
    except KeyError:
        raise InputError(f"{path}: cannot write '{path.suffix}' files; use .png, .jpg or .webp") from None


def check_output(path: Path, width: int, height: int, *, overwrite: bool = False) -> None:
    """Raises InputError if a picture of that size cannot be written there; call it before the work, not after."""
    limit = LIMITS.get(output_format(path))
    if limit and max(width, height) > limit:
        raise InputError(f"{path}: {width}x{height} pixels, but {output_format(path)} holds at most {limit} a side; "
                         "use .png")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; use --overwrite to replace it")


def write_picture(picture: Picture, path: Path, *, settings: Mapping[str, Any] | None = None, quality: int = 95,
                  overwrite: bool = False) -> None:
    """Write PNG, JPEG or WebP by the ending of ``path``, whole or not at all.

    settings: kept in the file as JSON (PNG text "uplift", else the EXIF user comment); see :func:`read_settings`.
    """
    kind = output_format(path)
    height, width = picture.rgb.shape[1:]
    check_output(path, width, height, overwrite=overwrite)
    image = _to_pil(picture, kind)
    options = _save_options(picture, image, kind, dict(settings or {}), quality)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:80]}.", suffix=path.suffix, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, kind, **options)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        if path.exists() and not overwrite:
            raise InputError(f"{path} appeared meanwhile; use --overwrite to replace it")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _to_pil(picture: Picture, kind: str) -> Image.Image:
    rgb = picture.rgb.clamp(0, 1)
    if picture.alpha is not None and kind == "JPEG":
        log.warning("JPEG has no transparency: the picture is laid over white")
        rgb = rgb * picture.alpha + (1 - picture.alpha)
    if picture.gray and picture.bits == 16 and kind == "PNG":
        values = np.rint(rgb.mean(0).numpy().astype(np.float64) * 65535).astype(np.uint16)
        return Image.fromarray(values)
    values = np.rint(rgb.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    image = Image.fromarray(values)
    if picture.gray:
        image = Image.fromarray(np.rint(rgb.mean(0).numpy() * 255).astype(np.uint8))
    if picture.alpha is not None and kind != "JPEG":
        image.putalpha(Image.fromarray(np.rint(picture.alpha[0].clamp(0, 1).numpy() * 255).astype(np.uint8)))
    return image


def _save_options(picture: Picture, image: Image.Image, kind: str, settings: dict[str, Any],
                  quality: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if picture.icc and _fits(picture.icc, image):
        options["icc_profile"] = picture.icc
    exif = Image.Exif()
    if picture.exif:
        exif.load(picture.exif)
    text = json.dumps(settings, ensure_ascii=True, default=str)
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        if settings:
            info.add_text(SETTINGS_KEY, text)
        options |= {"pnginfo": info, "compress_level": 4}
    else:
        options |= {"quality": quality}
        if kind == "JPEG":
            options |= {"subsampling": 0}
        if settings:
            exif.get_ifd(ExifTags.IFD.Exif)[0x9286] = b"ASCII\0\0\0" + text.encode("ascii")
    if len(exif) or (settings and kind != "PNG"):
        options["exif"] = exif.tobytes()
    return options


def _fits(icc: bytes, image: Image.Image) -> bool:
    """Whether a colour profile describes the kind of picture it would be attached to."""
    space = icc[16:20]
    gray = image.mode in ("L", "LA", "I;16")
    if space == (b"GRAY" if gray else b"RGB "):
        return True
    log.warning("the colour profile (%s) does not fit a %s picture and was dropped",
                space.decode("ascii", "replace").strip(), "gray" if gray else "colour")
    return False


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings a file was written with, or None."""
    with Image.open(path) as image:
        image.load()
        text = image.info.get(SETTINGS_KEY)
        if text is None:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(0x9286)
            text = comment[8:].decode("ascii", "replace") if isinstance(comment, bytes) else comment
    try:
        found = json.loads(text) if text else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def find_pictures(sources: list[Path]) -> list[tuple[Path, Path]]:
    """``(file, name below the output folder)`` for files and, recursively, folders; sorted, hidden files skipped."""
    found: list[tuple[Path, Path]] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(p for p in source.rglob("*") if p.suffix.lower() in READABLE and p.is_file()
                            and not any(part.startswith(".") for part in p.relative_to(source).parts))
            if not inside:
                raise InputError(f"{source}: no pictures in this folder")
            found += [(p, p.relative_to(source)) for p in inside]
        else:
            found.append((source, Path(source.name)))
    return found
