"""The noise an UPLiFT reads, as one field that exists everywhere at once and is only drawn where it is looked at.

Every value depends on the seed, the step, the place in the model ("site"), the channel and the position alone, never
on tiles, batch size or device. It is drawn on the CPU with Philox counters in blocks of 64 x 64, so that any window
costs only the blocks it touches.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .resample import Span

BLOCK = 64
_MASK = (1 << 64) - 1

NoiseCall = Callable[[tuple[int, ...], int, str], Tensor]
"""``(shape, step, site) -> standard normal tensor of that shape``; sites: decoder0, decoder1, ..., refiner."""


class Noise(Protocol):
    """Where a model gets its noise from."""

    def window(self, step: int, site: str, channels: int, batch: int, y: Span, x: Span) -> Tensor | None:
        """``b channels y x`` standard normal values in fp32 on the CPU, or None for zeros."""


class NoNoise:
    def window(self, step: int, site: str, channels: int, batch: int, y: Span, x: Span) -> None:
        return None


_NUMBER = (int, float, np.integer, np.floating)


class SeededNoise:
    """The field of a seed; item i of a batch has the field of ``seed + i``. ``strength`` scales it (0: none)."""

    def __init__(self, seed: int, strength: float = 1.0):
        if not isinstance(strength, _NUMBER) or not np.isfinite(strength) or strength < 0:
            raise InputError(f"noise_strength is {strength}; expected a number of at least 0 (1 is the trained one)")
        if not isinstance(seed, _NUMBER) or not np.isfinite(seed) or seed != int(seed):
            raise InputError(f"seed is {seed!r}; expected a whole number")
        self.seed, self.strength = int(seed), float(strength)

    def window(self, step: int, site: str, channels: int, batch: int, y: Span, x: Span) -> Tensor | None:
        if self.strength == 0:
            return None
        fields = [field_window(self.seed + i, step, site, channels, y, x) for i in range(batch)]
        return torch.from_numpy(np.stack(fields)) * self.strength


NoiseWindow = tuple[int, str, int, int, Span, Span]
"""The arguments of :meth:`Noise.window`."""


class DrawnAhead:
    """The same noise; the ``wanted`` windows are drawn from now on in a thread, while a graphics device is busy."""

    def __init__(self, noise: SeededNoise, wanted: Iterable[NoiseWindow]):
        self.noise = noise
        drawer = ThreadPoolExecutor(1, "noise")
        self.coming: dict[NoiseWindow, Future[Tensor | None]] = {
            window: drawer.submit(noise.window, *window) for window in wanted}
        drawer.shutdown(wait=False)  # ends when it has drawn them

    def window(self, step: int, site: str, channels: int, batch: int, y: Span, x: Span) -> Tensor | None:
        window = step, site, channels, batch, y, x
        return self.coming.pop(window).result() if window in self.coming else self.noise.window(*window)


class CalledNoise:
    """Noise from a function that draws whole maps, in the order decoder0, decoder1, refiner of each step."""

    def __init__(self, call: NoiseCall):
        self.call = call

    def window(self, step: int, site: str, channels: int, batch: int, y: Span, x: Span) -> Tensor:
        if not (y.whole and x.whole):
            raise InputError("a noise function draws whole maps and cannot be used with tiles; give a seed instead")
        shape = (batch, channels, y.size, x.size)
        drawn = self.call(shape, step, site)
        if tuple(drawn.shape) != shape:
            raise InputError(f"the noise function returned {tuple(drawn.shape)} for {site}; expected {shape}")
        return drawn


def as_noise(noise: int | NoiseCall | Noise | None, strength: float = 1.0) -> Noise:
    """A seed, a function, None (zeros) or a source of noise, as a source of noise."""
    if noise is None:
        return NoNoise()
    if isinstance(noise, (int, np.integer)) and not isinstance(noise, bool):
        return SeededNoise(int(noise), strength)
    if hasattr(noise, "window"):
        return noise  # type: ignore[return-value]
    if callable(noise):
        return CalledNoise(noise)
    raise InputError(f"noise is {noise!r}; expected a whole number (seed), a function or None")


def field_window(seed: int, step: int, site: str, channels: int, y: Span, x: Span) -> np.ndarray:
    """A window of the field of one seed: ``channels y x`` standard normal float32."""
    out = np.empty((channels, y.length, x.length), np.float32)
    key = np.array([seed & _MASK, (zlib.crc32(site.encode()) << 32) | (step & 0xFFFFFFFF)], np.uint64)
    for by in range(y.lo // BLOCK, -(-y.hi // BLOCK)):
        for bx in range(x.lo // BLOCK, -(-x.hi // BLOCK)):
            block = _block(key, by, bx, channels)
            top, left = by * BLOCK, bx * BLOCK
            y0, y1 = max(y.lo, top), min(y.hi, top + BLOCK)
            x0, x1 = max(x.lo, left), min(x.hi, left + BLOCK)
            out[:, y0 - y.lo:y1 - y.lo, x0 - x.lo:x1 - x.lo] = block[:, y0 - top:y1 - top, x0 - left:x1 - left]
    return out


def _block(key: np.ndarray, by: int, bx: int, channels: int) -> np.ndarray:
    """One block by Box-Muller from raw counter bits: a stream NumPy promises never to change, unlike its normals."""
    raw = np.random.Philox(counter=np.array([0, by, bx, 0], np.uint64), key=key).random_raw(
        channels * BLOCK * BLOCK // 2)
    radius = np.sqrt(-2.0 * np.log(((raw >> np.uint64(32)).astype(np.float64) + 1.0) * 2.0**-32))
    angle = (raw & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return normal.reshape(channels, BLOCK, BLOCK).astype(np.float32)
