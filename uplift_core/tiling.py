"""Any size of picture in a bounded amount of memory: windows that together give the numbers of the whole.

Each step is cut into tiles of its output; every tile reads its real neighbours (see windowed.py) and the one global
noise field (see noise.py), so that there are no seams to hide. How large the tiles are follows from an estimate of
the memory a tile takes; if memory runs out all the same, the tile is cut into four and the work goes on. What a tile
reads beyond itself is computed again for its neighbour: the encoding of a 512 pixel picture in four tiles of 256, for
the SD1.5 model, is 1.7 times that of the whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .engine import Engine, Plan
from .errors import Cancelled, InputError, OutOfMemory
from .estimate import plan_work, work_bytes
from .guide import Guide
from .heap import give_back
from .memory import SHARE_OF_FREE, free_memory, is_out_of_memory
from .model import UPLiFT
from .noise import Noise
from .resample import Span

log = logging.getLogger(__name__)

SMALLEST_TILE = 64
Progress = Callable[[float, int], None]
"""``(done, total)``: tiles done, with fractions, of the tiles of all steps."""

DTYPE_BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2, torch.float64: 8}


def estimate_memory(model: UPLiFT, height: int, width: int, scale: int, tile: int | None = None,
                    dtype: torch.dtype = torch.float32, batch: int = 1) -> int:
    """Bytes of working memory to enlarge the latent of a ``height x width`` guide image ``scale`` times.

    Beyond the weights, the picture and the latents themselves. tile: side in guide-image pixels, None for none.
    """
    engine = Engine(model)
    patch = model.config.patch
    if height < 1 or width < 1 or not (tile is None or isinstance(tile, int) and tile >= patch):
        raise InputError(f"a guide of {height} x {width} pixels in tiles of {tile!r}: expected sides of at least 1, "
                         f"and None or a tile of at least {patch} pixels")
    shape = (-(-height // patch), -(-width // patch))
    return _estimate(engine, shape, (height, width), steps_for(model, scale), tile, DTYPE_BYTES.get(dtype, 4), batch)


def steps_for(model: UPLiFT, scale: int) -> int:
    """How many steps make ``scale``. Raises InputError when none do."""
    factor, steps, reached = model.config.step_factor, 0, 1
    if not isinstance(scale, (int, float, np.integer)):
        raise InputError(f"scale is {scale!r}; expected {factor}, {factor**2}, {factor**3}, ...")
    while reached < scale and factor > 1:
        reached, steps = reached * factor, steps + 1
    if reached != scale or steps == 0:
        raise InputError(f"scale is {scale!r}; this model enlarges {factor} times a step: use {factor}, "
                         f"{factor**2}, {factor**3}, ...")
    return steps


def _estimate(engine: Engine, shape: tuple[int, int], image: tuple[int, int], steps: int, tile: int | None,
              element: int, batch: int) -> int:
    grown = [engine.grown(shape, i) for i in range(steps)]
    if tile is None:
        plans = [engine.plan(*g) for g in grown]
        if not engine.config.share_encoder:
            k = engine.config.up_factor ** (steps - 1)
            return work_bytes(engine, plans[-1:], grown[-1][0], (image[0] * k, image[1] * k), batch=batch,
                              element=element, whole=True)
        return work_bytes(engine, plans, shape, image, batch=batch, element=element, whole=True)
    worst = 0
    for i, (size, _) in enumerate(grown):
        k = 1 if engine.config.share_encoder else engine.config.up_factor**i
        windows = list(tiles(engine, shape, i, tile))
        middle = windows[len(windows) // 2]
        worst = max(worst, work_bytes(engine, [engine.plan(size, middle)], size, (image[0] * k, image[1] * k),
                                      batch=batch, element=element))
    return worst


def tiles(engine: Engine, shape: tuple[int, int], step: int, side: int | None) -> Iterator[tuple[Span, Span]]:
    """The windows of a step's output, row by row, about equal, at most ``side`` guide-image pixels a side.

    shape: rows and columns of the first step's input.
    """
    unit = engine.config.step_factor ** (step + 1)
    each = max(1, side // engine.config.patch) if side else max(shape)
    rows, columns = (-(-n // each) for n in shape)
    for r in range(rows):
        for c in range(columns):
            yield (Span(shape[0] * r // rows * unit, shape[0] * (r + 1) // rows * unit, shape[0] * unit),
                   Span(shape[1] * c // columns * unit, shape[1] * (c + 1) // columns * unit, shape[1] * unit))


@dataclass
class Job:
    """One latent to enlarge, and who wants to hear of it. ``image`` and ``latent`` as the model reads them; ``into``:
    where the result goes, if not into a tensor of its own."""

    model: UPLiFT
    image: Tensor
    latent: Tensor
    steps: int
    noise: Noise
    progress: Progress | None = None
    should_stop: Callable[[], bool] | None = None
    into: Tensor | None = None

    @property
    def result_shape(self) -> tuple[int, ...]:
        k = self.model.config.step_factor**self.steps
        b, c, h, w = self.latent.shape
        return b, c, h * k, w * k


def choose_tile(job: Job, budget: int | None) -> int | None:
    """The largest tile whose estimate fits the budget (default: most of what is free); None for no tiles."""
    engine = Engine(job.model)
    if budget is None:
        budget = int(free_memory(engine.device) * SHARE_OF_FREE)
    shape = (job.latent.shape[2], job.latent.shape[3])
    image = (job.image.shape[2], job.image.shape[3])
    batch = job.latent.shape[0]
    element = DTYPE_BYTES.get(engine.dtype, 4)

    def fits(tile: int | None) -> bool:
        twice = 0 if tile is not None or job.into is None else math.prod(job.result_shape) * element
        return _estimate(engine, shape, image, job.steps, tile, element, batch) + twice <= budget

    if fits(None):
        return None
    patch = job.model.config.patch
    side = max(image)
    while side > SMALLEST_TILE and not fits(side):
        side = max(SMALLEST_TILE, (side * 3 // 4) // patch * patch)
    if not fits(side):
        log.warning("a memory budget of %.0f MB is less than the smallest tile needs (%.0f MB); going on with that",
                    budget / 2**20, _estimate(engine, shape, image, job.steps, side, element, batch) / 2**20)
    return side


def run(job: Job, tile: int | None, *, adapt: bool = True) -> Tensor:
    """All steps of a job, ``b c h w`` to ``b c 2^steps h 2^steps w``. With ``adapt``, tiles shrink when memory ends."""
    meter = _Meter(job, tile)
    if tile is None:
        try:
            with torch.no_grad():
                result = Engine(job.model, meter.tick).run(job.image, job.latent, job.steps, job.noise)[-1]
            meter.complete()
            return result if job.into is None else job.into.copy_(result)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        _free_cache(job.model)
        if not adapt:
            raise OutOfMemory(f"out of memory without tiles ({reason}); choose tile 'auto' or a tile of 512")
        tile = max(SMALLEST_TILE, max(job.image.shape[2:]) // 2)
        log.warning("out of memory (%s); going on in tiles of %d", reason, tile)
        meter = _Meter(job, tile)
    return _tiled(job, tile, meter)


def _tiled(job: Job, tile: int, meter: _Meter) -> Tensor:
    engine = Engine(job.model, meter.tick)
    side = tile
    shape = (job.latent.shape[2], job.latent.shape[3])
    with torch.no_grad():
        x = job.model.normalise(job.latent.to(engine.device, engine.dtype))
        for i in range(job.steps):
            (h, w), (whole_y, whole_x) = engine.grown(shape, i)
            guide = job.model.guide(job.image, i)
            last = i == job.steps - 1
            if last and job.into is not None:
                out = job.into
            else:
                out = (job.latent if last else x).new_empty(*x.shape[:2], whole_y.size, whole_x.size)
            waiting = list(tiles(engine, shape, i, side))[::-1]
            while waiting:
                y, x_span = waiting.pop()
                meter.start(engine, guide, plan := engine.plan((h, w), (y, x_span)))
                failed, maps, made = "", None, None
                try:
                    noise = engine.drawn_ahead(job.noise, [plan], x.shape[0], i)
                    maps = engine.encode(guide, plan.requests)
                    made = engine.decode(x, plan, maps, noise, i).data
                    out[:, :, y.lo:y.hi, x_span.lo:x_span.hi] = job.model.denormalise(made) if last else made
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failed = str(error).splitlines()[0]
                maps = made = None  # before the next tile's are made
                give_back()
                if failed:  # outside the except block, so that the failed run's tensors are gone
                    _free_cache(job.model)
                    unit = engine.config.step_factor ** (i + 1)
                    smaller = max(y.length, x_span.length) // unit * engine.config.patch // 2
                    if smaller < SMALLEST_TILE:
                        raise OutOfMemory(f"out of memory even in tiles of {smaller * 2} pixels ({failed}); close "
                                          "other programs or use a smaller picture")
                    log.warning("out of memory (%s); going on in tiles of %d", failed, smaller)
                    side = min(side, smaller)
                    waiting += [q for window in [(y, x_span)] for q in _quarters(window, unit)][::-1]
                    continue
                meter.finish(y.length * x_span.length / (whole_y.size * whole_x.size))
            x = out
    meter.complete()
    return x


def _quarters(window: tuple[Span, Span], unit: int) -> list[tuple[Span, Span]]:
    halves = []
    for s in window:
        middle = (s.lo + s.hi) // 2 // unit * unit
        parts = [Span(s.lo, middle, s.size), Span(middle, s.hi, s.size)]
        halves.append([p for p in parts if p.length > 0])
    return [(y, x) for y in halves[0] for x in halves[1]]


def _free_cache(model: UPLiFT) -> None:
    device = (model.run_device or next(model.parameters()).device).type
    backend = getattr(torch, device, None)
    if device != "cpu" and backend is not None and hasattr(backend, "empty_cache"):
        backend.empty_cache()


class _Meter:
    """Turns pieces of work into progress, and a wish to stop into an exception."""

    def __init__(self, job: Job, tile: int | None):
        self.job = job
        engine = Engine(job.model)
        shape = (job.latent.shape[2], job.latent.shape[3])
        per_step = [sum(1 for _ in tiles(engine, shape, i, tile)) for i in range(job.steps)]
        self.total = job.steps if tile is None else sum(per_step)
        self.share = self.total / job.steps
        self.done = 0.0
        self.here, self.expected = 0.0, 1.0
        self.weight = float(self.total)
        if tile is None:
            plans = [engine.plan(*engine.grown(shape, i)) for i in range(job.steps)]
            self.expected = sum(plan_work(engine, job.model.guide(job.image, i).size, p,
                                          i == 0 or not engine.config.share_encoder)
                                for i, p in enumerate(plans))

    def start(self, engine: Engine, guide: Guide, plan: Plan) -> None:
        self.here, self.expected = 0.0, plan_work(engine, guide.size, plan, True)
        y, x = plan.out
        self.weight = self.share * y.length * x.length / (y.size * x.size)

    def tick(self, work: float) -> None:
        if self.job.should_stop is not None and self.job.should_stop():
            raise Cancelled("stopped on request")
        self.here += work
        if self.job.progress is not None:
            self.job.progress(self.done + min(1.0, self.here / self.expected) * self.weight, self.total)

    def complete(self) -> None:
        if self.job.progress is not None:
            self.job.progress(float(self.total), self.total)

    def finish(self, share: float) -> None:
        self.done += share * self.share
        if self.job.progress is not None:
            self.job.progress(min(self.done, float(self.total)), self.total)
