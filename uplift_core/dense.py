"""Pixel-dense features: picture -> backbone -> UPLiFT (or a baseline) -> a feature vector for every pixel.

The result is computed window by window and may go straight to a file, so that it can be larger than memory; what is
done with it (features.py) reads it in bands of rows.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backbones import Backbone, load_backbone
from .baselines import BASELINES, Upsampler, baseline
from .cascade import UpliftWindows
from .errors import Cancelled, InputError, OutOfMemory
from .feature_files import NUMPY_DTYPES, FeatureFile, drop_pages, open_features
from .kept import keep_made
from .loading import load
from .memory import SHARE_OF_FREE, free_memory, is_out_of_memory, parse_bytes
from .model import UPLiFT
from .resample import Span, antialias
from .upscaling import _to_tensor, pad_to, parse_tile

log = logging.getLogger(__name__)

SCALES = (1, 2, 4, 8, "pixel")
BAND_BYTES = 16 << 20
_LARGEST, _SMALL, _SMALLEST = 512, 64, 16
"""Sides of windows in features: the most and the least that a budget chooses, and the least after running out of
memory. Below 64 a window takes hardly less memory, but its halo several times the work."""

Write = Callable[[slice, slice, Tensor], None]


@dataclass
class DenseFeatures:
    """Features of one picture.

    data: ``c h w``, a tensor or a memory map of a file. image_size: rows and columns of the picture they cover.
    stride: picture pixels a feature; feature (i, j) covers the pixels from (i stride, j stride). method: uplift or
    the baseline. backbone, model: by which they were made. path: the file they are in, if any.
    """

    data: Any
    image_size: tuple[int, int]
    stride: float
    method: str = ""
    backbone: str = ""
    model: str = ""
    path: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        c, h, w = self.data.shape
        return int(c), int(h), int(w)

    def read(self, y: slice, x: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """A window ``c y x`` as float32, on the CPU; in ``out`` where that has room and a copy is needed."""
        part = self.data[:, y, x]
        if isinstance(part, Tensor):
            return part.float().cpu()
        size = math.prod(part.shape)
        values = (torch.empty(size) if out is None or len(out) < size else out[:size]).view(part.shape)
        for own, channel in zip(values, part, strict=True):  # torch converts halves several times as fast as numpy
            own.copy_(torch.from_numpy(np.array(channel)))
        drop_pages(self.data)
        return values

    def bands(self, limit: int = BAND_BYTES) -> Iterator[tuple[slice, Tensor]]:
        """All of it as ``(rows, c r w float32)``, in bands of whole rows of at most about ``limit`` bytes; what is read
        from a file holds until the next."""
        c, h, w = self.shape
        rows = min(h, max(1, limit // (4 * c * w)))
        kept = None if isinstance(self.data, Tensor) else torch.empty(c * rows * w)  # one, or memory is left in holes
        for lo in range(0, h, rows):
            part = slice(lo, min(h, lo + rows))
            yield part, self.read(part, out=kept)

    def at(self, points: Any) -> Tensor:
        """Features ``n c`` at picture points ``[(x, y), ...]`` in pixels. Raises InputError outside the picture."""
        return torch.stack([self.read(slice(i, i + 1), slice(j, j + 1)).flatten() for i, j in self.cells(points)])

    def cells(self, points: Any) -> list[tuple[int, int]]:
        """Rows and columns of the features under the picture points ``[(x, y), ...]``."""
        height, width = self.image_size
        found = []
        for point in points:
            try:
                x, y = (float(v) for v in point)
            except (TypeError, ValueError):
                raise InputError(f"{point!r} is no point; expected (x, y) in pixels") from None
            if not (0 <= x < width and 0 <= y < height):
                raise InputError(f"the point ({x:g}, {y:g}) is outside the picture of {width}x{height} pixels")
            found.append((min(int(y / self.stride), self.shape[1] - 1), min(int(x / self.stride), self.shape[2] - 1)))
        return found

    def metadata(self) -> dict[str, str]:
        return {"image_size": f"{self.image_size[0]},{self.image_size[1]}", "stride": repr(self.stride),
                "method": self.method, "backbone": self.backbone, "model": self.model}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False,
             dtype: torch.dtype = torch.float16) -> None:
        """Write .npy or .safetensors, whole or not at all, a band at a time."""
        with FeatureFile(path, self.shape, dtype, overwrite) as file:
            for rows, values in self.bands():
                file.write(rows, slice(0, self.shape[2]), values)
            file.finish(self.metadata())


def load_features(path: str | os.PathLike[str]) -> DenseFeatures:
    """What :meth:`DenseFeatures.save` or ``storage`` wrote, as a memory map. Raises InputError."""
    data, meta = open_features(path)
    try:
        rows, columns = (int(n) for n in meta["image_size"].split(","))
        return DenseFeatures(data, (rows, columns), float(meta["stride"]), meta.get("method", ""),
                             meta.get("backbone", ""), meta.get("model", ""), os.fspath(path))
    except (KeyError, ValueError):
        raise InputError(f"{os.fspath(path)} does not say which picture its features cover; expected a file that "
                         "was written by this program") from None


@torch.no_grad()
def dense_features(image: Any, *, backbone: str | Backbone = "dinov3-splus16", model: Any = "auto",
                   scale: int | str = "pixel", resolution: int | None = None, tile: str | int | None = "auto",
                   memory_budget: int | str | None = None, storage: str | os.PathLike[str] | None = None,
                   overwrite: bool = False, dtype: torch.dtype = torch.float16, device: str | torch.device = "auto",
                   offline: bool | None = None, progress: Callable[[float, int], None] | None = None,
                   should_stop: Callable[[], bool] | None = None) -> DenseFeatures:
    """Features of a picture at 1, 2, 4 or 8 times the backbone's grid, or for every pixel.

    image: PIL image, ``H W 3`` array or ``3 H W`` tensor in [0, 1], of any size: it is padded to the backbone's patch
    and the features are cropped back. resolution: longer side to bring the picture to first.
    backbone: see :func:`load_backbone`, or one that is loaded. model: "auto" (the UPLiFT of this backbone), a name, a
    file, an :class:`UPLiFT`, or a baseline: nearest, bilinear, jbu, lift, featup, loftup, jafar, anyup.
    tile: "auto", None (one window) or the side of a window in picture pixels; the numbers are the same.
    memory_budget: working memory beyond the picture, the backbone's own features and a result kept in memory.
    storage: a new .npy or .safetensors file to write to instead of memory. dtype: float16 or float32, of the result.
    progress: ``(done, total)`` in windows. should_stop: True ends with Cancelled and leaves no file.

    Raises InputError, CheckpointError, DownloadError, MissingExtra, OutOfMemory, Cancelled.
    """
    if scale not in SCALES or isinstance(scale, bool):
        raise InputError(f"scale is {scale!r}; expected one of {', '.join(map(str, SCALES))}")
    if dtype not in NUMPY_DTYPES:
        raise InputError(f"dtype is {dtype}; features are kept as float16 or float32")
    side, budget = parse_tile(tile, 1), parse_bytes(memory_budget)
    if storage is not None:
        FeatureFile.check(storage, overwrite)
    picture = _picture(image, resolution)
    if isinstance(backbone, str | os.PathLike):
        backbone = load_backbone(backbone, device=device, offline=offline)
    net, method = model_for(backbone, model, offline) if scale != 1 else (None, "backbone")
    _check_stop(should_stop)

    padded = pad_to(picture, backbone.patch)
    with _memory_for(f"{backbone.name or 'the backbone'}, which sees the whole picture at once,"):
        low = backbone.encode(padded)
    factor = backbone.patch if scale == "pixel" else int(scale)
    upsampler: Upsampler
    if isinstance(net, UPLiFT):
        upsampler = UpliftWindows(net, padded, low, factor, should_stop)
    else:
        with _memory_for(method):
            upsampler = baseline(method, padded, low.to(backbone.device), factor, patch=backbone.patch,
                                 backbone=backbone.name, offline=bool(offline))
    stride = backbone.patch / factor
    height, width = picture.shape[2:]
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    result = DenseFeatures(None, (height, width), stride, method, backbone.name, _name_of(model, method, backbone))
    shape = (low.shape[1], rows, columns)

    def fill(write: Write) -> None:
        enlarge(upsampler, (rows, columns), write, stride=stride, tile=side, budget=budget, progress=progress,
                should_stop=should_stop)

    if storage is None:
        amount = math.prod(shape) * dtype.itemsize / 2**20
        with _memory_for(f"the result of {amount:.0f} MB (a file as storage would hold it)"):
            result.data = torch.empty(shape, dtype=dtype)
        fill(into(result.data))
        return result
    with FeatureFile(storage, shape, dtype, overwrite) as file:
        fill(file.write)
        file.finish(result.metadata())
    return load_features(storage)


@contextmanager
def _memory_for(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
            raise
        raise OutOfMemory(f"out of memory: {what} does not fit ({str(error).splitlines()[0]}); choose a smaller "
                          "resolution, or close other programs") from error


def enlarge(upsampler: Upsampler, shape: tuple[int, int], write: Write, *, stride: float = 1.0,
            tile: str | int | None = "auto", budget: int | None = None,
            progress: Callable[[float, int], None] | None = None,
            should_stop: Callable[[], bool] | None = None) -> None:
    """Hand the first rows and columns (``shape``) of the enlarged features to ``write(rows, columns, c y x)``, window
    by window; tile and budget as of dense_features, stride: picture pixels a feature."""
    if budget is None:
        budget = int(free_memory(upsampler.low.device) * SHARE_OF_FREE)
    windows = _windows(*shape, _side(upsampler, tile, budget, stride, max(shape)))
    with keep_made():
        _fill(upsampler, windows, *shape, write, progress, should_stop, tile is not None)


def into(data: Tensor) -> Write:
    """Windows go to their places in ``data`` ``c h w``."""
    def write(y: slice, x: slice, values: Tensor) -> None:
        data[:, y, x] = values.to(data.dtype)
    return write


def _fill(upsampler: Upsampler, windows: list[tuple[int, int, int, int]], rows: int, columns: int,
          write: Write, progress: Callable[[float, int], None] | None,
          should_stop: Callable[[], bool] | None, adapt: bool) -> None:
    total, area, done = len(windows), rows * columns, 0
    whole_y, whole_x = upsampler.size
    waiting = windows[::-1]
    while waiting:
        _check_stop(should_stop)
        y0, y1, x0, x1 = waiting.pop()
        failed = ""
        try:
            values = upsampler.window(Span(y0, y1, whole_y), Span(x0, x1, whole_x))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
                raise
            failed = str(error).splitlines()[0]
        if failed:  # outside the except block, so that the failed run's tensors are gone
            if not adapt or max(y1 - y0, x1 - x0) <= _SMALLEST:
                raise OutOfMemory(f"out of memory in a window of {x1 - x0}x{y1 - y0} features ({failed}); choose "
                                  "tile 'auto', a smaller resolution or scale, or close other programs")
            log.warning("out of memory (%s); going on in smaller windows", failed)
            ym, xm = (y0 + y1 + 1) // 2, (x0 + x1 + 1) // 2
            parts = [(y0, ym, x0, xm), (y0, ym, xm, x1), (ym, y1, x0, xm), (ym, y1, xm, x1)]
            waiting += [p for p in parts if p[0] < p[1] and p[2] < p[3]][::-1]
            continue
        write(slice(y0, y1), slice(x0, x1), values)
        del values
        done += (y1 - y0) * (x1 - x0)
        if progress is not None:
            progress(total * done / area, total)


def _windows(rows: int, columns: int, side: int) -> list[tuple[int, int, int, int]]:
    return [(y, min(rows, y + side), x, min(columns, x + side)) for y in range(0, rows, side)
            for x in range(0, columns, side)]


def _side(upsampler: Upsampler, tile: str | int | None, budget: int, stride: float, longest: int) -> int:
    """Side of a window in features."""
    if tile is None:
        return longest
    if isinstance(tile, int):
        return max(1, int(tile / stride))
    side = min(longest, _LARGEST)
    while side > _SMALL and upsampler.bytes(side) > budget:
        side = max(_SMALL, side * 3 // 4)
    if upsampler.bytes(side) > budget:
        log.warning("a memory budget of %.0f MB is less than a window of %d needs (%.0f MB); going on with that",
                    budget / 2**20, side, upsampler.bytes(side) / 2**20)
    return side


def _picture(image: Any, resolution: int | None) -> Tensor:
    picture = _to_tensor(image)[0]
    if picture.shape[0] != 1:
        raise InputError(f"there are {picture.shape[0]} pictures; expected one at a time")
    if resolution is None:
        return picture
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1:
        raise InputError(f"resolution is {resolution!r}; expected the longer side in pixels")
    factor = resolution / max(picture.shape[2:])
    return antialias(picture, (max(1, round(picture.shape[2] * factor)), max(1, round(picture.shape[3] * factor))))


def model_for(backbone: Backbone, model: Any = "auto", offline: bool | None = None) -> tuple[UPLiFT | None, str]:
    """The UPLiFT of a backbone and "uplift", or None and the name of a baseline; errors as of dense_features."""
    if isinstance(model, str) and model.lower() in BASELINES:
        return None, model.lower()
    if not isinstance(model, UPLiFT):
        if model == "auto":
            if not backbone.latent_space:
                raise InputError(f"no published UPLiFT is made for {backbone.name}; name the file of one, or a "
                                 f"baseline: {', '.join(BASELINES)}")
            model = backbone.latent_space
        model = load(model, device=backbone.device, offline=offline)
    config = model.config
    if (config.channels, config.patch) != (backbone.channels, backbone.patch):
        raise InputError(f"{backbone.name} gives {backbone.channels} channels of patch {backbone.patch}, but the model "
                         f"enlarges {config.channels} channels of patch {config.patch}; choose the model that was "
                         "made for this backbone")
    if config.latent_space and config.latent_space not in (backbone.latent_space, backbone.name):
        log.warning("the model was trained on features of %s, not of %s", config.latent_space, backbone.name)
    return model, "uplift"


def _name_of(model: Any, method: str, backbone: Backbone) -> str:
    if method != "uplift":
        return ""
    if model == "auto":
        return backbone.latent_space
    return os.fspath(model) if isinstance(model, str | os.PathLike) else model.config.latent_space


def _check_stop(should_stop: Callable[[], bool] | None) -> None:
    if should_stop is not None and should_stop():
        raise Cancelled("stopped on request")
