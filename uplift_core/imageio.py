"""Pictures from files and back: what a person's folder really holds, without losing alpha, colour profile or name."""

from __future__ import annotations

import io
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import InputError, OutOfMemory
from .imagewrite import LIMITS, SETTINGS_KEY, USER_COMMENT, WRITABLE, check_output, output_format, write_picture
from .memory import is_out_of_memory

__all__ = ["LIMITS", "MAX_PIXELS", "READABLE", "SETTINGS_KEY", "WRITABLE", "Picture", "check_output",
           "fill_transparent", "find_pictures", "output_format", "read_picture", "read_settings", "write_picture"]

READABLE = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
MAX_PIXELS = 200_000_000
_DROPPED_EXIF = frozenset((
    0x0112, 0x02BC,  # orientation, and the XMP of a TIFF, which may repeat it
    0x0100, 0x0101, 0x0102, 0x0103, 0x0106, 0x010A, 0x0111, 0x0115, 0x0116, 0x0117, 0x011C, 0x013D, 0x0140, 0x0142,
    0x0143, 0x0144, 0x0145, 0x014A, 0x0152, 0x0153, 0x015B, 0x0201, 0x0202, 0x0211, 0x0212, 0x0213, 0x0214, 0x8773,
))  # how the pixels of the old file are stored
_DEEP = re.compile(r"'(LA|RGB|RGBA|RGBX|RGBa|CMYK);16[BLN]")
_REFUSED = frozenset(("EPS",))  # a program: reading it would run it in Ghostscript
_pillow_limit = threading.Lock()


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


def read_picture(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Picture:
    """Read any picture Pillow knows (but no EPS, which is a program), turned upright.

    Raises InputError naming the file and what is wrong with it, OutOfMemory if it does not fit.
    """
    with _open(Path(path), max_pixels) as image:
        return _read(image)


@contextmanager
def _open(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The opened file; whatever Pillow raises inside becomes an error that names the file."""
    try:
        if not path.exists():
            raise InputError(f"{path}: there is no such file")
        if path.is_dir():
            raise InputError(f"{path}: no pictures in this folder")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty (0 bytes)")
        with _limit(max_pixels), Image.open(path, formats=_formats()) as image:
            if image.width * image.height > max_pixels:
                raise InputError(f"{path}: {image.width}x{image.height} pixels is more than the limit of "
                                 f"{max_pixels:,}; raise the limit (--max-pixels) if you trust the file")
            if image.width < 1 or image.height < 1:
                raise InputError(f"{path}: the picture is {image.width}x{image.height} pixels: it is empty")
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{path}: far more pixels than the limit of {max_pixels:,}; raise the limit (--max-pixels) "
                         "if you trust the file") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a picture that can be read (PNG, JPEG, WebP, TIFF, BMP, GIF)") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read the file") from None
    except MemoryError:
        raise OutOfMemory(f"{path}: the picture does not fit in memory") from None
    except Exception as error:  # Pillow's readers let through whatever damaged bytes make them trip over
        if is_out_of_memory(error):
            raise OutOfMemory(f"{path}: the picture does not fit in memory") from None
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{path}: the file cannot be read ({error.strerror})") from None
        raise InputError(f"{path}: the picture is damaged or cut short ({error})") from error


def _formats() -> list[str]:
    """What Pillow may try, the common ones first."""
    Image.preinit()
    Image.init()
    return [name for name in Image.ID if name not in _REFUSED]


@contextmanager
def _limit(max_pixels: int) -> Iterator[None]:
    """Pillow with our limit in place of its own, which is a global: it refuses only what is far above, unread."""
    with _pillow_limit, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max(1, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _read(image: Image.Image) -> Picture:
    notes: list[str] = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"animated or many pages: only the first of {frames} is used")
    ycbcr = _plain_ycbcr(image)
    layout = str([tile[3] for tile in getattr(image, "tile", [])])
    image.load()
    if _DEEP.search(layout):
        notes.append("16 bits a channel are read as 8: only gray pictures keep 16")
        if image.info.pop("transparency", None) is not None:
            notes.append("the transparent colour, which needs all 16 bits, was dropped")
    icc, exif = image.info.get("icc_profile"), _exif(image, notes)
    if image.format != "TIFF":  # Pillow turns these itself, and some versions then still name the turn
        image = _upright(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values, transparent = np.asarray(image), image.info.get("transparency")
        alpha = None if transparent is None else torch.from_numpy((values != transparent).astype(np.float32))[None]
        rgb = _deep_gray(values, notes).expand(3, -1, -1).contiguous()
        rgb = rgb if alpha is None else fill_transparent(rgb, alpha)
        return Picture(rgb, alpha, icc, exif, 16, True, notes)
    if image.mode == "CMYK":
        image, icc = _from_cmyk(image, icc, notes)
    if ycbcr:
        image = Image.merge("YCbCr", image.split())
    if image.mode in ("LAB", "YCbCr", "HSV"):
        image, icc = image.convert("RGB"), None
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    gray = image.mode in ("L", "LA", "1") or "'LA;16" in layout  # the last is read as RGBA
    channels = torch.from_numpy(np.array(image.convert("RGBA" if has_alpha else "RGB"))).permute(2, 0, 1)
    rgb = channels[:3].contiguous().float().div_(255)
    if not has_alpha:
        return Picture(rgb, None, icc, exif, 8, gray, notes)
    alpha = channels[3:].contiguous().float().div_(255)
    return Picture(fill_transparent(rgb, alpha), alpha, icc, exif, 8, gray, notes)


def _plain_ycbcr(image: Any) -> bool:
    """Whether this is uncompressed YCbCr of TIFF, which Pillow takes for RGB of four bytes a pixel and so finds cut
    short; three are read after this, which the caller takes for what they are."""
    if image.format != "TIFF" or image.mode != "RGB":
        return False
    tags = image.tag_v2  # 262: the colour space, 259: the compression, 530: how coarse the colours are
    if (tags.get(262), tags.get(259, 1), tuple(tags.get(530, (2, 2)))) != (6, 1, (1, 1)):
        return False
    image.tile = [(*tile[:3], ("RGB", *tile[3][1:])) for tile in image.tile]
    return True


def _exif(image: Image.Image, notes: list[str]) -> bytes | None:
    """The EXIF data that is still true of an upright copy."""
    try:
        exif = image.getexif()
        turn = exif.get(0x0112)
        for tag in _DROPPED_EXIF.intersection(exif):
            del exif[tag]
        kept = exif.tobytes() if len(exif) else None
        if turn is not None:
            exif[0x0112] = turn  # this is the picture's own object, which the turning reads
        return kept
    except Exception:  # damaged EXIF is common, and no reason to refuse the picture
        notes.append("the EXIF data is damaged and was dropped")
        return None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as above
        return image


def _deep_gray(values: np.ndarray, notes: list[str]) -> Tensor:
    """``H W`` in [0, 1] from 16-bit or 32-bit whole numbers or floats."""
    if values.dtype.kind != "f":
        top = 65535.0
        if values.max() > top:
            top = float(values.max())
            notes.append(f"32 bits a pixel: the brightest value, {top:.0f}, was taken as white")
    else:
        finite = np.isfinite(values)
        if not finite.all():
            notes.append("pixels that are no numbers were taken as black")
            values = np.where(finite, values, 0)
        top = max(1.0, float(values.max()))
        if top > 1:
            notes.append(f"the brightest value, {top:.4g}, was taken as white")
    if values.min() < 0:
        notes.append("negative values were taken as black")
    return torch.from_numpy(np.clip(values.astype(np.float64) / top, 0, 1).astype(np.float32))


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
    """``color`` is 0 where ``weight`` is 0; the weights are 0 or 1, and one is 1."""
    if bool((weight > 0).all()):
        return color
    window = [min(2, n) for n in color.shape[2:]]
    shares = F.avg_pool2d(weight, window, window, ceil_mode=True)
    means = F.avg_pool2d(color, window, window, ceil_mode=True) / shares.clamp_min(0.125)  # a share is 0 or >= 1/4
    small = _push_pull(means, (shares > 0).float())
    below = F.interpolate(small, size=tuple(color.shape[2:]), mode="bilinear", align_corners=False)
    return torch.where(weight > 0, color, below)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings a file was written with, or None. Raises InputError for a file that is no picture."""
    with _open(Path(path), 1 << 40) as image:
        text = image.info.get(SETTINGS_KEY)
        if text is None and (image.format != "PNG" or "exif" in image.info):  # else a PNG is read to its end
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(USER_COMMENT)
            text = comment[8:].decode("ascii", "replace") if isinstance(comment, bytes) else comment
    try:
        found = json.loads(text) if text else None
    except (TypeError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def find_pictures(sources: list[Path], out: Path | None = None) -> list[tuple[Path, Path]]:
    """``(file, name below the output folder)`` for files and, recursively, folders; sorted, hidden files skipped.

    out: a folder for results; where it lies inside a source folder, what is in it is skipped. A folder without
    pictures stands for itself: reading it is the error, so that the other sources are not lost.
    """
    results = out.resolve() if out is not None else None
    found: list[tuple[Path, Path]] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(p for p in source.rglob("*") if p.suffix.lower() in READABLE and p.is_file()
                            and not any(part.startswith(".") for part in p.relative_to(source).parts))
            if results is not None and source.resolve() in results.parents:
                inside = [p for p in inside if results not in p.resolve().parents]
            found += [(p, p.relative_to(source)) for p in inside] or [(source, Path(source.name))]
        else:
            found.append((source, Path(source.name)))
    return found
