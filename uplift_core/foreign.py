"""Telling by its first bytes and its key names what a file is, so that a wrong one gets a helpful answer.

Nothing here loads a tensor: a seven-gigabyte checkpoint of another kind is refused after reading its header.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import CheckpointError

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
MAX_HEADER = 100_000_000  # the limit of the safetensors format

OWN_KEY = re.compile(r"((?:module\.|_orig_mod\.|model\.|uplift\.)*)(?:encoder|decoder)\.block_\d+\.")
_HARMLESS = re.compile(r"collections\.OrderedDict|_codecs\.encode|torch\.\w+|torch\._utils\.\w+|torch\.storage\.\w+")
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError)  # of a damaged archive

_STARTS = (
    (b"version https://git-lfs",
     "a git-lfs pointer, the small text in place of a file; run 'git lfs pull' or download the file itself"),
    (b"GGUF", "a GGUF file, a quantised model for other programs; UPLiFT needs .safetensors or .pth"),
    (b"\x89PNG", "a PNG picture, not weights"),
    (b"\xff\xd8\xff", "a JPEG picture, not weights"),
    (b"RIFF", "a WebP picture or a sound, not weights"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"%PDF", "a PDF document, not weights"),
)

# Key families of other models: the first pattern that any key matches names the file.
_FAMILIES = tuple((re.compile(pattern), name) for pattern, name in (
    (r"lora_up|lora_down|lora_[AB]\b|lora_te|\.lora\.|hada_w1|lokr_w|dora_scale",
     "a LoRA, an add-on for a diffusion model"),
    (r"^conditioner\.", "a full SDXL checkpoint"),
    (r"^cond_stage_model\.", "a full Stable Diffusion checkpoint"),
    (r"control_model\.|^controlnet_|input_hint_block", "a ControlNet"),
    (r"double_blocks\.\d|joint_blocks\.\d|single_transformer_blocks", "a diffusion transformer (such as Flux or SD3)"),
    (r"^(model\.diffusion_model\.)?label_emb\.|^add_embedding\.linear_1", "an SDXL UNet"),
    (r"^model\.diffusion_model\.|^input_blocks\.\d|^down_blocks\.\d+\.(resnets|attentions)|^time_embedding\.linear",
     "a Stable Diffusion UNet"),
    (r"^first_stage_model\.|^(vae\.)?(encoder|decoder)\.(down\.\d|up\.\d|mid\.|down_blocks|up_blocks|mid_block|conv_in)",
     "a Stable Diffusion VAE; it belongs in the VAE's place, not in the model's"),
    (r"^taesd_|^(encoder|decoder)\.layers\.\d+\.(conv|weight)|^(encoder|decoder)\.\d+\.(conv\.|weight|bias)",
     "a tiny autoencoder (TAESD); it belongs in the VAE's place, not in the model's"),
    (r"text_model\.|^transformer\.resblocks|token_embedding", "a text encoder"),
    (r"RDB\d\.conv|\.rdb\d\.conv|^model\.1\.sub\.|^conv_first\.weight|residual_group|^conv_body\.",
     "a picture upscaler of another kind (ESRGAN, SwinIR or the like)"),
    (r"cls_token|^blocks\.\d+\.attn|\.attn\.qkv\.",
     "a vision transformer backbone (DINO or the like), which makes features but is no UPLiFT"),
    (r"^emb_params$|string_to_param|^clip_[lg]$", "a textual inversion embedding"),
))


def looks_like(keys: Iterable[str]) -> str | None:
    """What kind of model of others has weights of these names; None when no family is known."""
    names = list(keys)
    for pattern, family in _FAMILIES:
        if any(pattern.search(name) for name in names):
            return family
    return None


def has_uplift_keys(keys: Iterable[str]) -> bool:
    """Whether at least one name belongs to an UPLiFT, whatever wrapper's prefix it carries."""
    return any(OWN_KEY.match(key) for key in keys)


def not_uplift(path: Path, keys: Iterable[str]) -> CheckpointError:
    """The error for readable weights that belong to something else."""
    names = list(keys)
    family = looks_like(names)
    first = f"its first entry, of {len(names)}, is '{names[0]}'" if names else "it has no entries"
    what = f"looks like {family}" if family else "holds the weights of another model"
    return CheckpointError(f"{path} is not an UPLiFT: it {what} ({first}). "
                           "Choose a file made for UPLiFT, such as uplift_sd1.5vae.safetensors")


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as cut:
        if cut.start < len(head) - 3:
            return False
        text = head[:cut.start].decode("utf-8")
    return all(c.isprintable() or c in "\t\r\n\f\ufeff" for c in text)


def _what_else(head: bytes) -> str | None:
    """What a file that starts like this is, if it is surely not weights."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--", b"<body")):
        return ("a web page, not weights: the download fetched a page (a log-in, an error or the file's description) "
                "instead of the file. Download it again, from the 'resolve' address or with 'uplift models download'")
    for magic, what in _STARTS:
        if head.startswith(magic):
            return what
    if _is_text(head):
        shown = head[:60].decode("utf-8", "replace").strip().splitlines()
        return f"a text file, not weights; it begins with {(shown or [''])[0]!r}"
    return None


def kind_of(path: Path) -> str:
    """``safetensors``, ``zip`` (torch) or ``pickle`` (torch before 1.6), told by content and not by suffix.

    Raises CheckpointError when the path is missing, a folder, unreadable, empty, cut short or something else.
    """
    if path.is_dir():
        listed = path.iterdir() if os.access(path, os.R_OK) else ()
        inside = sorted(p.name for p in listed if p.suffix.lower() in SUFFIXES)
        hint = f"; it holds {', '.join(inside[:3])}: name one of them" if inside else ", and this one holds none"
        raise CheckpointError(f"{path} is a folder; expected one weights file{hint}")
    try:
        with path.open("rb") as file:
            head = file.read(512)
        size = path.stat().st_size
    except FileNotFoundError:
        hint = " (a link to a file that is gone)" if path.is_symlink() else ""
        raise CheckpointError(f"{path} does not exist{hint}. Check the path; 'uplift models list' shows what is "
                              "there") from None
    except PermissionError:
        raise CheckpointError(f"{path} cannot be read: permission denied. Allow this user to read it") from None
    except OSError as broken:
        raise CheckpointError(f"{path} cannot be read: {broken.strerror or broken}") from None
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes). Delete it and download it again")
    if what := _what_else(head):
        raise CheckpointError(f"{path} is {what}")
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    # Before the pickles: a header's length may begin with their first byte, too.
    if len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if head[:1] == b"\x80" and len(head) > 8:
        return "pickle"
    if path.suffix.lower() == ".safetensors":
        raise CheckpointError(f"{path} is not a safetensors file ({size} bytes that do not begin with a header): it is "
                              "damaged or was renamed. Download it again")
    raise CheckpointError(f"{path} is no weights file that is known here; expected {', '.join(SUFFIXES)}")


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except _ZIP_ERRORS:
        raise CheckpointError(f"{path} is cut short or damaged (a torch file without its end). "
                              "Delete it and copy or download it again") from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path} is a TorchScript program and holds code; it is not loaded. Save the model's "
                              "state dict instead")
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        first = f", its first entry is '{names[0]}'" if names else " and empty"
        raise CheckpointError(f"{path} is a zip archive without torch weights{first}. If it is a packed download, "
                              "unpack it first")
    return "zip"


def called_in(path: Path) -> list[str]:
    """What a torch file would import and call beside tensors, read off its pickles without running them."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
        file.seek(0)
        raw = file.read(0 if zipped else 64_000_000)
    if zipped:
        try:
            with zipfile.ZipFile(path) as archive:
                raw = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        except _ZIP_ERRORS:
            return []
    found: list[str] = []
    strings: list[str] = []
    stream = io.BytesIO(raw)
    try:
        for _ in range(5):  # an old torch file is a row of pickles: magic, protocol, system, object, keys
            for code, value, _position in pickletools.genops(stream):
                if "UNICODE" in code.name or "STRING" in code.name:
                    strings.append(str(value))
                elif code.name in ("GLOBAL", "INST"):
                    found.append(str(value).replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    found.append(".".join(strings[-2:]))
    except (ValueError, LookupError, UnicodeError, AttributeError, TypeError, OverflowError):
        pass  # the end of the pickles, or a damaged one: what was seen so far counts
    return [name for name in found if not _HARMLESS.fullmatch(name)]


def safetensors_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries and the metadata of a safetensors file, checked against the file's length.

    Raises CheckpointError when the header cannot be read or promises more than the file holds.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise CheckpointError(f"{path} is cut short: its header alone needs {8 + length} bytes and the file has "
                                  f"{size}. Delete it and download it again")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        metadata = {str(key): str(value) for key, value in metadata.items()}
        ok = isinstance(end, int)
    except (ValueError, TypeError, KeyError, AttributeError, LookupError, RecursionError):
        ok = False
    if not ok:
        raise CheckpointError(f"{path} has a damaged safetensors header. Delete it and download it again")
    if 8 + length + end > size:
        raise CheckpointError(f"{path} is cut short: it has {size} of {8 + length + end} bytes. "
                              "Delete it and download it again")
    return entries, metadata
