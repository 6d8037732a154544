"""All steps of UPLiFT for one window of the last result: no step's whole map is ever held."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .attender import reach
from .engine import Engine, Plan, Window
from .errors import Cancelled, InputError
from .estimate import work_bytes
from .maps import whole
from .model import UPLiFT, imagenet_normalise
from .noise import NoNoise
from .resample import Span, reads, sample

_KEPT_BY_TORCH = 112 << 20
"""About what torch's cache of convolutions on a CPU grows to, as windows at borders have shapes of their own."""


class UpliftWindows:
    """Windows of the features ``1 c h w`` enlarged ``factor`` times, guided by ``image`` ``1 3 H W`` in [0, 1].

    A factor that is no power of the step's (14, of patch 14) is reached by the next power and an antialiased resize.
    """

    def __init__(self, model: UPLiFT, image: Tensor, low: Tensor, factor: int,
                 should_stop: Callable[[], bool] | None = None):
        config = model.config
        if config.step_factor < 2 or config.refiner is not None or config.takes_noise or not config.share_encoder:
            raise InputError("dense features need an UPLiFT made for features: one that enlarges, without refiner and "
                             "noise, with a shared encoder")

        def tick(work: float) -> None:
            if should_stop is not None and should_stop():
                raise Cancelled("stopped on request")

        self.engine = Engine(model, tick)
        if config.image_norm == "imagenet":
            image = imagenet_normalise(image)
        self.guide = model.guide(image, 0)
        self.low = model.normalise(low.to(self.engine.device, self.engine.dtype))
        self.steps, reached = 0, 1
        while reached < factor:
            self.steps, reached = self.steps + 1, reached * config.step_factor
        self.reached = reached
        self.size = (low.shape[2] * factor, low.shape[3] * factor)

    def window(self, y: Span, x: Span) -> Tensor:
        """``c y x`` float32."""
        full = (self.low.shape[2] * self.reached, self.low.shape[3] * self.reached)
        exact = full == (y.size, x.size)
        read = (y, x) if exact else (reads("antialias", y, full[0]), reads("antialias", x, full[1]))
        plans = self._plans(read)
        maps = self.engine.encode(self.guide, [r for plan in plans for r in plan.requests])
        m = whole(self.low)
        for i, plan in enumerate(plans):
            m = self.engine.decode(m, plan, maps, NoNoise(), i)
        data = m.data if exact else sample(m.data, "antialias", m.y, m.x, y, x)
        return self.engine.model.denormalise(data)[0].float().cpu()

    def _plans(self, window: Window) -> list[Plan]:
        """A plan for each step, walked back from the window of the last one's result."""
        plans: list[Plan] = []
        out = window
        for i in reversed(range(self.steps)):
            shape, _ = self.engine.grown(self.low.shape[2:], i)
            plans.insert(0, plan := self.engine.plan(shape, out))
            out = self._read(plan)
        return plans

    def _read(self, plan: Plan) -> Window:
        """What a step reads of its input: for the decoder's guide and for the attender's neighbours."""
        spans = list(plan.decoder[0])
        attender, scale = self.engine.model.attender, self.engine.config.step_factor
        if attender is not None:
            r = reach(attender.n)
            near = [Span(g.lo // scale, -(-g.hi // scale), s.size).grow(r)
                    for g, s in zip(plan.decoder[-1], spans, strict=True)]
            spans = [s.union(n) for s, n in zip(spans, near, strict=True)]
        return spans[0], spans[1]

    def bytes(self, side: int) -> int:
        """About what a window of ``side`` features a side takes."""
        spans = []
        for n in self.size:
            lo = max(0, n // 2 - side // 2)
            spans.append(Span(lo, min(n, lo + side), n))
        full = (self.low.shape[2] * self.reached, self.low.shape[3] * self.reached)
        if full != self.size:
            spans = [reads("antialias", s, n) for s, n in zip(spans, full, strict=True)]
        plans = self._plans((spans[0], spans[1]))
        area = spans[0].length * spans[1].length
        element = torch.finfo(self.engine.dtype).bits // 8
        work = work_bytes(self.engine, plans, tuple(self.low.shape[2:]), self.guide.size,  # type: ignore
                          element=element)
        engine = self.engine
        copied = engine.device.type != "cpu" or engine.dtype != torch.float32 or bool(engine.config.latent_mean)
        written = area * self.low.shape[1] * (4 * copied + 2)  # fp32 for the reader, half for a file
        return work + int(written) + (_KEPT_BY_TORCH if engine.device.type == "cpu" else 0)
