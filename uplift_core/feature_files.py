"""Feature maps in files: .npy or .safetensors, written window by window, whole or not at all, read as memory maps."""

from __future__ import annotations

import json
import math
import mmap
import os
import secrets
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

SUFFIXES = (".npy", ".safetensors")
NUMPY_DTYPES = {torch.float16: np.float16, torch.float32: np.float32}
_SAFETENSORS = {"F16": np.float16, "F32": np.float32}
_ROOM = 8192  # bytes of header of a .safetensors file, padded with blanks


class FeatureFile:
    """A file of ``c h w`` under a name of its own until :meth:`finish`; nothing is left of an unfinished one."""

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, int, int], dtype: torch.dtype, overwrite: bool):
        self.path = self.check(path, overwrite)
        self.overwrite, self.shape, self.kept, self.dtype = overwrite, shape, dtype, np.dtype(NUMPY_DTYPES[dtype])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished = self.path.with_name(f".uplift-{secrets.token_hex(8)}{self.path.suffix}")
        self.file: BinaryIO | None = None
        self.start = 0

    @staticmethod
    def check(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Raises InputError if features cannot be written there; call it before the work."""
        path = Path(path)
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"{path}: features are written to {' or '.join(SUFFIXES)} files")
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file")
        if os.path.lexists(path) and not overwrite:
            raise InputError(f"{path} exists already; use --overwrite to replace it")
        return path

    def __enter__(self) -> FeatureFile:
        try:
            self.file = self.unfinished.open("xb", buffering=0)
            if self.path.suffix.lower() == ".npy":
                np.lib.format.write_array_header_1_0(self.file, {  # type: ignore[arg-type]
                    "descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape})
                self.start = self.file.tell()
            else:
                self.start = _ROOM + 8
            self.file.truncate(self.start + self.length)
        except OSError as error:
            self.__exit__()
            raise InputError(f"{self.path}: cannot be written ({error.strerror or error})") from None
        return self

    @property
    def length(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def write(self, y: slice, x: slice, values: Tensor) -> None:
        """Row by row and not through a memory map, which may bring far more of a file into memory than is written."""
        assert self.file is not None
        _, h, w = self.shape
        try:
            for channel, plane in enumerate(values.to("cpu")):
                rows = plane.to(self.kept).contiguous().numpy()
                for i, part in enumerate(rows.reshape(1, -1) if rows.shape[1] == w else rows):
                    self.file.seek(self.start + ((channel * h + y.start + i) * w + x.start) * self.dtype.itemsize)
                    self._put(part.tobytes())
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror or error})") from None

    def _put(self, data: bytes) -> None:
        assert self.file is not None
        while data:  # an unbuffered file may take a part
            data = data[self.file.write(data):]

    def finish(self, metadata: dict[str, str]) -> None:
        assert self.file is not None
        side = self.path.with_name(self.path.name + ".json")
        if self.path.suffix.lower() == ".npy":
            unfinished = self.unfinished.with_suffix(".json")
            try:
                unfinished.write_text(json.dumps(metadata) + "\n")
                os.replace(unfinished, side)
            finally:
                unfinished.unlink(missing_ok=True)
        else:
            name = {np.dtype(v): k for k, v in _SAFETENSORS.items()}[self.dtype]
            header = json.dumps({"__metadata__": metadata, "features": {
                "dtype": name, "shape": list(self.shape), "data_offsets": [0, self.length]}}).encode()
            if len(header) > _ROOM:
                raise InputError(f"{self.path}: the names that go into the file are too long")
            self.file.seek(0)
            self._put(struct.pack("<Q", _ROOM) + header.ljust(_ROOM))
        os.fsync(self.file.fileno())
        self.file.close()
        if os.path.lexists(self.path) and not self.overwrite:
            raise InputError(f"{self.path} appeared meanwhile; use --overwrite to replace it")
        os.replace(self.unfinished, self.path)

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()
        self.unfinished.unlink(missing_ok=True)


def open_features(path: str | os.PathLike[str]) -> tuple[np.memmap, dict[str, str]]:
    """The values ``c h w`` as a memory map and the metadata. Raises InputError."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: expected a file of features, {' or '.join(SUFFIXES)}")
    try:
        if path.suffix.lower() == ".npy":
            side = path.with_name(path.name + ".json")
            meta = json.loads(side.read_text()) if side.is_file() else {}
            data: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > 1 << 20:
                    raise ValueError("the header is too long")
                header = json.loads(file.read(length))
            entry = header["features"]
            data = np.memmap(path, _SAFETENSORS[entry["dtype"]], "r", 8 + length, tuple(entry["shape"]))
            meta = header.get("__metadata__", {})
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"{path} holds no features that can be read ({error})") from None
    if data.ndim != 3 or data.dtype not in _SAFETENSORS.values():
        raise InputError(f"{path} holds {data.dtype} of shape {data.shape}; expected c h w in fp16 or fp32")
    return data, meta


def drop_pages(data: Any) -> None:
    """Let go of the pages of a memory map that were touched; they stay in the file. Without this they would count as
    memory of the process until the system is short of it."""
    mapped = getattr(data, "_mmap", None)
    if mapped is not None and hasattr(mapped, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
