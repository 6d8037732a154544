"""Pictures to files: whole or not at all, with colour profile, EXIF and the settings they were made with."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from .imageio import Picture

log = logging.getLogger(__name__)

WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LIMITS = {"JPEG": 65500, "WEBP": 16383}
"""Pixels a side. JPEG could hold 65535, libjpeg stops at 65500."""
SETTINGS_KEY = "uplift"
USER_COMMENT = 0x9286
_MAKER_NOTE = 0x927C
_SIZE_TAGS = (0xA002, 0xA003)  # PixelXDimension, PixelYDimension
_EXIF_LIMIT = 65533  # one segment of a JPEG


def output_format(path: Path) -> str:
    """PNG, JPEG or WEBP by the file's ending."""
    try:
        return WRITABLE[path.suffix.lower()]
    except KeyError:
        raise InputError(f"{path}: cannot write '{path.suffix}' files; use .png, .jpg or .webp") from None


def check_output(path: str | os.PathLike[str], width: int, height: int, *, overwrite: bool = False) -> None:
    """Raises InputError if a picture of that size cannot be written there; call it before the work, not after."""
    path = Path(path)
    limit = LIMITS.get(output_format(path))
    if limit and max(width, height) > limit:
        raise InputError(f"{path}: {width}x{height} pixels, but {output_format(path)} holds at most {limit} a side; "
                         "use .png")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{path} exists already; use --overwrite to replace it")


def write_picture(picture: Picture, path: str | os.PathLike[str], *, settings: Mapping[str, Any] | None = None,
                  quality: int = 95, overwrite: bool = False) -> None:
    """Write PNG, JPEG or WebP by the ending of ``path``, whole or not at all.

    settings: kept in the file as JSON (PNG text "uplift", else the EXIF user comment); see ``read_settings``.
    """
    path = Path(path)
    kind = output_format(path)
    height, width = picture.rgb.shape[1:]
    check_output(path, width, height, overwrite=overwrite)
    image = _to_pil(picture, kind)
    options = _save_options(picture, image, kind, dict(settings or {}), quality)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".uplift-{secrets.token_hex(8)}{path.suffix}")
    try:
        with unfinished.open("xb") as file:
            image.save(file, kind, **options)
            file.flush()
            os.fsync(file.fileno())
        if os.path.lexists(path) and not overwrite:
            raise InputError(f"{path} appeared meanwhile; use --overwrite to replace it")
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _to_pil(picture: Picture, kind: str) -> Image.Image:
    rgb = picture.rgb.detach().float().cpu().clamp(0, 1)
    alpha = None if picture.alpha is None else picture.alpha.detach().float().cpu().clamp(0, 1)
    if alpha is not None and kind == "JPEG":
        log.warning("JPEG has no transparency: the picture is laid over white")
        rgb, alpha = rgb * alpha + (1 - alpha), None
    if picture.gray and picture.bits == 16 and kind == "PNG":
        if alpha is not None:
            log.warning("16-bit gray with transparency is written with 8 bits")
        else:
            return Image.fromarray(np.rint(_gray(rgb) * 65535).astype(np.uint16))
    if picture.gray:
        image = Image.fromarray(np.rint(_gray(rgb) * 255).astype(np.uint8))
    else:  # the clamped copy is ours to change
        image = Image.fromarray(rgb.mul_(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    if alpha is not None:
        image.putalpha(Image.fromarray(np.rint(alpha[0].numpy() * 255).astype(np.uint8)))
    return image


def _gray(rgb: Tensor) -> np.ndarray:
    values: np.ndarray = rgb.double().mean(0).numpy()
    return values


def _save_options(picture: Picture, image: Image.Image, kind: str, settings: dict[str, Any],
                  quality: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if picture.icc and _fits(picture.icc, image, kind):
        options["icc_profile"] = picture.icc
    text = json.dumps(settings, ensure_ascii=True, default=str) if settings else ""
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        if text:
            info.add_text(SETTINGS_KEY, text)
        options |= {"pnginfo": info, "compress_level": 4}
    else:
        options |= {"quality": quality} | ({"subsampling": 0} if kind == "JPEG" else {})
    exif = _exif(picture.exif, image.size, "" if kind == "PNG" else text, kind == "JPEG")
    if exif:
        options["exif"] = exif
    return options


def _exif(kept: bytes | None, size: tuple[int, int], comment: str, limited: bool) -> bytes | None:
    """The EXIF of the source with the new size in it, and the comment; where there is a limit, what fits of that."""
    for without in ((), (_MAKER_NOTE,), None):
        exif = Image.Exif()
        if kept and without is not None:
            exif.load(kept)
        details = dict(exif.get_ifd(ExifTags.IFD.Exif)) if ExifTags.IFD.Exif in exif else {}
        if ExifTags.IFD.Interop in details:  # an offset into the old data
            details[ExifTags.IFD.Interop] = exif.get_ifd(ExifTags.IFD.Interop)
        for tag, pixels in zip(_SIZE_TAGS, size):
            if tag in details:
                details[tag] = pixels
        for tag in without or ():
            details.pop(tag, None)
        if comment:
            details[USER_COMMENT] = b"ASCII\0\0\0" + _with_own(comment, details.get(USER_COMMENT)).encode("ascii")
        if details:
            exif[ExifTags.IFD.Exif] = details
        if not len(exif):
            return None
        data = exif.tobytes()
        if not limited or len(data) <= _EXIF_LIMIT:
            return data
        log.warning("the EXIF data is more than a JPEG holds; it is written without %s",
                    "the maker's notes" if without == () else "the source's part")
    return None


def _with_own(settings: str, comment: bytes | str | None) -> str:
    """The settings with the comment the source had in them, unless that was settings too."""
    if isinstance(comment, bytes):
        wide = comment[:8] == b"UNICODE\0"
        comment = comment[8:].decode("utf-16" if wide else "utf-8", "replace")
    comment = (comment or "").strip("\0 ")
    if not comment or comment.startswith("{"):
        return settings
    return json.dumps({**json.loads(settings), "comment": comment}, ensure_ascii=True)


def _fits(icc: bytes, image: Image.Image, kind: str) -> bool:
    """Whether a colour profile describes the kind of picture it would be attached to."""
    space = icc[16:20]
    gray = image.mode in ("L", "LA", "I;16") and kind != "WEBP"  # WebP has no gray pictures
    if space == (b"GRAY" if gray else b"RGB "):
        return True
    log.warning("the colour profile (%s) does not fit a %s picture and was dropped",
                space.decode("ascii", "replace").strip(), "gray" if gray else "colour")
    return False
