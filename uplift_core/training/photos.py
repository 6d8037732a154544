"""Folders of pictures as an endless, numbered row of crops: crop number n is the same on every machine and run."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..errors import InputError, UpliftError
from ..imageio import READABLE, read_picture
from .recipe import DataPart

log = logging.getLogger(__name__)
_TRIES = 100


@dataclass(frozen=True)
class Crop:
    """Which part of a picture: after a resize to ``size``, the window at (top, left), mirrored, turned."""

    size: tuple[int, int]
    top: int
    left: int
    mirror: bool
    turns: int


class Photos(Dataset):
    """All pictures below a folder. ``photos[n]`` is crop number n: ``{"image": 3 S S, "key": str, "broken": str}``.

    The order is a new permutation each time all pictures were shown; the crop depends on the seed and n alone. A
    picture that cannot be read is replaced by the next, and named in "broken".
    """

    def __init__(self, folder: Path, part: DataPart, seed: int, keep_bytes: int = 0):
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; expected one with pictures")
        self.files = sorted(_pictures(folder))
        if not self.files:
            raise InputError(f"{folder}: no pictures in this folder")
        self.folder, self.part, self.seed = folder, part, seed
        self.keep_bytes, self._kept_bytes = keep_bytes, 0
        self._kept: OrderedDict[int, tuple[np.ndarray, str]] = OrderedDict()
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.files)

    @functools.cached_property
    def digest(self) -> str:
        """Of the names of the pictures and the sizes of their files: another means other crops."""
        names = (f"{path.relative_to(self.folder).as_posix()}:{path.stat().st_size}" for path in self.files)
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]

    def _index(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, len(self.files))
        if epoch not in self._orders:
            self._orders = {epoch: np.random.default_rng((self.seed, epoch)).permutation(len(self.files))}
        return epoch, int(self._orders[epoch][place])

    def unreadable(self, position: int) -> str:
        """What is wrong with the picture at this place of the order; empty if nothing is."""
        try:
            self._pixels(self._index(position)[1])
        except UpliftError as error:
            return str(error)
        return ""

    def __getitem__(self, position: int) -> dict[str, Any]:
        broken: list[str] = []
        epoch, index = self._index(position)
        for attempt in range(min(_TRIES, len(self.files))):
            chosen = (index + attempt) % len(self.files)
            try:
                pixels, content = self._pixels(chosen)
            except UpliftError as error:
                broken.append(str(error))
                continue
            repeat = epoch % self.part.crops_per_photo if self.part.crops_per_photo else epoch
            instead = (index + 1,) if attempt else ()  # or the neighbour's own crop would come twice in an epoch
            rng = np.random.default_rng((self.seed, chosen, repeat, *instead))
            crop = self._crop(pixels.shape[0], pixels.shape[1], rng)
            key = f"{content}:{self.part.size}:{self.part.zoom:g}:{crop}"
            return {"image": _cut(pixels, crop, self.part.size), "key": key, "broken": "\n".join(broken)}
        raise InputError(f"{self.folder}: {len(broken)} pictures in a row cannot be read; the first: {broken[0]}")

    def _pixels(self, index: int) -> tuple[np.ndarray, str]:
        """The picture as ``H W 3`` bytes, shrunk as far as no crop can want more of it, and a hash of the file."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        path = self.files[index]
        rgb = read_picture(path).rgb
        content = hashlib.sha256(path.read_bytes()).hexdigest()[:32] if self.part.cache else path.name
        pixels = rgb.permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()
        largest = round(self.part.size * self.part.zoom)
        if min(pixels.shape[:2]) > largest:
            factor = largest / min(pixels.shape[:2])
            size = (max(largest, round(pixels.shape[1] * factor)), max(largest, round(pixels.shape[0] * factor)))
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0))
        if pixels.nbytes <= self.keep_bytes:
            while self._kept_bytes + pixels.nbytes > self.keep_bytes:
                self._kept_bytes -= self._kept.popitem(last=False)[1][0].nbytes
            self._kept[index] = (pixels, content)
            self._kept_bytes += pixels.nbytes
        return pixels, content

    def _crop(self, height: int, width: int, rng: np.random.Generator) -> Crop:
        side, part = self.part.size, self.part
        shorter = min(height, width)
        target = side
        if part.zoom > 1 and shorter > side:
            target = round(side * (min(part.zoom, shorter / side) ** rng.random()))
        size = (max(side, round(height * target / shorter)), max(side, round(width * target / shorter)))
        spare = (size[0] - side, size[1] - side)
        if part.crop == "center":
            top, left = spare[0] // 2, spare[1] // 2
        else:
            top, left = int(rng.integers(spare[0] + 1)), int(rng.integers(spare[1] + 1))
        mirror = bool(part.flips and rng.integers(2))
        return Crop(size, top, left, mirror, int(rng.integers(4)) if part.turns else 0)


def _pictures(folder: Path) -> Iterator[Path]:
    """Below the folder and what is linked into it; a folder that is linked twice, or into itself, counts once."""
    walked = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in walked else sorted(name for name in folders if not name.startswith("."))
        if real not in walked:
            found = (Path(place, name) for name in names if not name.startswith("."))
            yield from (path for path in found if path.suffix.lower() in READABLE and path.is_file())
        walked.add(real)


def _cut(pixels: np.ndarray, crop: Crop, side: int) -> Tensor:
    image = Image.fromarray(pixels)
    across, down = pixels.shape[1] / crop.size[1], pixels.shape[0] / crop.size[0]
    box = (crop.left * across, crop.top * down, (crop.left + side) * across, (crop.top + side) * down)
    image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    window = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if crop.mirror:
        window = window.flip(2)
    return torch.rot90(window, crop.turns, (1, 2)).float().div_(255).contiguous()


class Positions(Sampler):
    """The crop numbers of one process, from a step on: process r of n takes its share of every global batch."""

    def __init__(self, batch: int, first_step: int, last_step: int, rank: int = 0, world: int = 1):
        self.batch, self.first, self.last, self.rank, self.world = batch, first_step, last_step, rank, world

    def __len__(self) -> int:
        return (self.last - self.first) * self.batch

    def __iter__(self) -> Iterator[int]:
        for step in range(self.first, self.last):
            start = (step * self.world + self.rank) * self.batch
            yield from range(start, start + self.batch)
