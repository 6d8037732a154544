"""Latents on disk, one small file each, so that a frozen VAE runs once per crop."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import InputError

_ABANDONED = 3600.0  # seconds after which an unfinished file is nobody's


class LatentCache:
    """A folder of latents under keys. Files appear whole or not at all, so that several processes may share it and
    one may die at any time; a damaged file counts as missing."""

    def __init__(self, folder: Path, owner: str):
        self.folder, self.owner = folder, owner
        if folder.exists() and not folder.is_dir():
            raise InputError(f"the latent cache {folder} is not a folder; choose another in data.cache")
        for part in folder.glob("??/.*.part"):  # of a process that died while it wrote
            try:
                if time.time() - part.stat().st_mtime > _ABANDONED:
                    part.unlink()
            except OSError:
                continue  # another process was quicker

    def path(self, key: str) -> Path:
        name = hashlib.sha256(f"{self.owner}:{key}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:34]}.safetensors"

    def read(self, key: str) -> Tensor | None:
        path = self.path(key)
        try:
            return safetensors.torch.load(path.read_bytes())["latent"]
        except (OSError, KeyError, safetensors.SafetensorError, ValueError):
            return None

    def write(self, key: str, latent: Tensor) -> None:
        path = self.path(key)
        part = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(safetensors.torch.save({"latent": latent.detach().cpu().contiguous()}))
            os.replace(part, path)
        except OSError as error:
            raise InputError(f"the latent cache {self.folder} cannot be written ({error.strerror})") from None
        finally:
            part.unlink(missing_ok=True)


def fingerprint(module: nn.Module) -> str:
    """A short hash of a network's weights: latents of another VAE are other latents."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
