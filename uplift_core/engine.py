"""The fast form of UPLiFT: the same numbers as the plain form, for any window of the output, in bounded memory.

From the wanted window of the output it walks back to what every layer must hold (:func:`plan`), encodes the image
in bands of rows, keeping only the positions that a decoder will sample, then decodes, attends and refines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .attender import attend, pool, pool_reference, reach
from .convolving import pointwise
from .errors import InputError
from .forms import FAST, at_a_time
from .guide import Guide
from .heap import keep_freed_memory
from .kept import keep_made
from .layers import ConvBlock
from .maps import Map, accumulate, as_format, empty, whole
from .model import UPLiFT
from .noise import DrawnAhead, Noise, NoiseWindow, SeededNoise
from .resample import Span
from .sampled import Request, Samples, Window, band_of, finest, source_of, union
from .windowed import joins, need, run, run_around, run_sampled, size, takes_around

Tick = Callable[[float], None]
"""Called after each piece of work with its size; may raise to stop."""


class Concat(NamedTuple):
    """Where an encoder map and noise join the map: ``source`` indexes f0..f4."""

    site: str
    source: int
    sampling: str
    noise_channels: int
    noise_scale: float


@dataclass
class Plan:
    """What one step computes for one window of its output: a window for the input and output of every part."""

    out: Window
    decoder: list[Window]
    refiner: list[Window]
    attended: Window
    requests: list[Request] = field(default_factory=list)


class Engine:
    """Runs a model. Holds no tensors between calls."""

    def __init__(self, model: UPLiFT, tick: Tick | None = None):
        self.model, self.config = model, model.config
        self.tick = tick or (lambda work: None)
        parameter = next(model.parameters())
        self.device, self.dtype = model.run_device or parameter.device, parameter.dtype
        if self.device.type == "cpu":
            keep_freed_memory()
        self.encoder, self.taps = self._encoder_chain()
        self.decoder = self._decoder_chain()
        self.refiner = self._refiner_chain()

    # -- the model as chains of parts ------------------------------------------------------------------------------

    def _encoder_chain(self) -> tuple[list[nn.Module], list[int]]:
        chain: list[nn.Module] = []
        taps: list[int] = []  # taps[g]: how many parts f_g is behind
        for g in range(len(self.config.encoder)):
            if g:
                chain.append(self.model.encoder.get_submodule(f"down_{g}"))
            chain += self.model.encoder.get_submodule(f"block_{g}").parts()  # type: ignore[operator]
            taps.append(len(chain))
        return chain, taps

    def _decoder_chain(self) -> list[Concat | nn.Module]:
        chain: list[Concat | nn.Module] = []
        for s in range(len(self.config.decoder)):
            if s:
                chain.append(self.model.decoder.get_submodule(f"up_{s}"))
            chain.append(Concat(f"decoder{s}", len(self.taps) - 1 - s, self.config.sampling,
                                self.config.noise_channels, self.config.noise_scale))
            chain += self.model.decoder.get_submodule(f"block_{s}").parts()  # type: ignore[operator]
        return chain

    def _refiner_chain(self) -> list[Concat | nn.Module]:
        ref = self.config.refiner
        if ref is None or self.model.refiner is None:
            return []
        source = ref.source % len(self.taps)
        return [Concat("refiner", source, ref.sampling, ref.noise_channels, ref.noise_scale),
                *self.model.refiner.parts(), self.model.ref_outc]

    # -- the whole -------------------------------------------------------------------------------------------------

    def run(self, image: Tensor, latent: Tensor, steps: int, noise: Noise, keep: bool = False) -> list[Tensor]:
        """All steps on the whole map; the results of all steps with ``keep``, else only the last."""
        results: list[Tensor] = []
        with torch.no_grad():
            x = self.model.normalise(latent.to(self.device, self.dtype))
            plans = [self.plan(*self.grown(x.shape[2:], i)) for i in range(steps)]
            noise = self.drawn_ahead(noise, plans, x.shape[0])
            maps: Samples | None = None
            for i, plan in enumerate(plans):
                if maps is None or not self.config.share_encoder:
                    wanted = plans if self.config.share_encoder else [plan]
                    maps = self.encode(self.model.guide(image, i), [r for p in wanted for r in p.requests])
                x = self._decode_whole(x, plan, maps, noise, i, last=i == steps - 1)
                if keep or i == steps - 1:
                    results.append(self.model.denormalise(x).to(latent.dtype))
        return results

    def bands(self, out: Window) -> int:
        """In how many bands the decoder's part of a whole step is computed."""
        if self.refiner or self.config.takes_noise:
            return 1
        y, x = out
        pixels = at_a_time(FAST.decode_pixels, self.device)
        return max(1, min(y.size // self.config.step_factor, y.size * x.size // pixels))

    def _decode_whole(self, x: Tensor, plan: Plan, maps: Samples, noise: Noise, step: int, last: bool) -> Tensor:
        """A whole step; without a refiner, whose reach would be computed twice, the decoder's part in bands of rows.

        last: nobody reads the encoder's maps after this step.
        """
        y, columns = plan.out
        bands = self.bands(plan.out)
        if bands == 1:
            return self.decode(x, plan, maps, noise, step).data
        value = whole(x)
        weighed: Tensor | None = None
        rows = y.size // self.config.step_factor
        with keep_made():
            for k in range(bands):
                part = Span(rows * k // bands * self.config.step_factor,
                            rows * (k + 1) // bands * self.config.step_factor, y.size)
                band = self._weigh(value, self.plan((x.shape[2], x.shape[3]), (part, columns)), maps, noise, step)
                if weighed is None:
                    weighed = empty(band.data, band.data.shape[1], y.size, columns.size)
                weighed[:, :, part.lo:part.hi] = band.cut(part, columns)
        assert weighed is not None
        if last:
            maps.maps.clear()  # room for the result
        return self._attend(Map(weighed, y, columns), value).data

    def grown(self, shape: Sequence[int], step: int) -> tuple[tuple[int, int], Window]:
        """The size of a step's input, and its whole output as a window."""
        k = self.config.step_factor**step
        h, w = shape[0] * k, shape[1] * k
        f = self.config.step_factor
        return (h, w), (Span.all(h * f), Span.all(w * f))

    # -- planning --------------------------------------------------------------------------------------------------

    def plan(self, shape: tuple[int, int], out: Window) -> Plan:
        """What a step from a map of ``shape`` (rows, columns) has to compute for the window ``out`` of its result."""
        scale = self.config.step_factor
        refiner = [(_backward(self.refiner, [o.size] * (len(self.refiner) + 1), o)) for o in out]
        attended = tuple(spans[0] for spans in refiner)
        guide = attended
        if self.model.attender is not None:
            guide = tuple(Span(a.lo // scale * scale, -(-a.hi // scale) * scale, a.size) for a in attended)
        decoder = []
        for n, g in zip(shape, guide, strict=True):
            decoder.append(_backward(self.decoder, _sizes(self.decoder, n), g))
        plan = Plan(out, list(zip(*decoder, strict=True)), list(zip(*refiner, strict=True)), (attended[0], attended[1]))
        for chain, windows in ((self.decoder, plan.decoder), (self.refiner, plan.refiner)):
            for part, (y, x) in zip(chain, windows, strict=False):
                if isinstance(part, Concat):
                    plan.requests.append(Request(part.source, part.sampling, y, x))
        return plan

    def drawn_ahead(self, noise: Noise, plans: Sequence[Plan], batch: int, first: int = 0) -> Noise:
        """``noise``, of which a graphics device need not wait for what ``plans`` (of step ``first`` and on) read."""
        if self.device.type == "cpu" or not isinstance(noise, SeededNoise):
            return noise
        wanted: list[NoiseWindow] = []
        for step, plan in enumerate(plans, first):
            for chain, windows in ((self.decoder, plan.decoder), (self.refiner, plan.refiner)):
                wanted += [(step, part.site, part.noise_channels, batch, *window)
                           for part, window in zip(chain, windows, strict=False)
                           if isinstance(part, Concat) and part.noise_channels]
        return DrawnAhead(noise, wanted) if wanted else noise

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(self, guide: Guide, requests: list[Request]) -> Samples:
        """The requested samples of the encoder's maps."""
        ys, xs = _sizes(self.encoder, guide.size[0]), _sizes(self.encoder, guide.size[1])
        if not (ys[-1] and xs[-1]):
            raise InputError(f"the guide of {guide.size[1]} x {guide.size[0]} pixels is too small for this model, "
                             "whose encoder makes it smaller; give a larger picture")
        stored = finest(requests, [(ys[t], xs[t]) for t in self.taps])
        lattice = self._lattice(stored, ys[-1], xs[-1])
        area = max(r.y.length / r.y.size * r.x.length / r.x.size for r in stored) * guide.size[0] * guide.size[1]
        bands = max(1, min(math.ceil(area / at_a_time(FAST.band_pixels, self.device)), max(r.y.length for r in stored)))
        samples = Samples([])
        with keep_made():
            for band in range(bands):
                self._encode_band(guide, band_of(stored, band, bands), ys, xs, lattice, samples, stored)
        return samples

    def _lattice(self, requests: list[Request], height: int, width: int) -> tuple[int, int]:
        """Every how many positions (rows, columns) the last encoder map is looked at; 1 when it must be dense."""
        last = self.encoder[-1] if self.encoder else None
        mine = [r for r in requests if r.source == len(self.taps) - 1]
        if not (FAST.sampled_encoder and isinstance(last, ConvBlock) and last.stride == 1 and mine):
            return 1, 1
        if len(self.taps) > 1 and self.taps[-2] == self.taps[-1]:
            return 1, 1
        if any(r.sampling != "nearest" or height % r.y.size or width % r.x.size for r in mine):
            return 1, 1
        return (math.gcd(*[height // r.y.size for r in mine]), math.gcd(*[width // r.x.size for r in mine]))

    def _encode_band(self, guide: Guide, requests: list[Request | None], ys: list[int], xs: list[int],
                     lattice: tuple[int, int], samples: Samples, stored: list[Request]) -> None:
        count = len(self.encoder)
        wanted: list[Window | None] = [None] * (count + 1)
        thin: Window | None = None
        for r in requests:
            if r is None:
                continue
            at = self.taps[r.source]
            window = source_of(r, ys[at], xs[at])
            if at == count and lattice != (1, 1):
                mine = tuple(Span(w.lo // k, (w.hi - 1) // k + 1, w.size // k)
                             for w, k in zip(window, lattice, strict=True))
                thin = union(thin, (mine[0], mine[1]))
            wanted[at] = union(wanted[at], window)
        if all(w is None for w in wanted):
            return
        if thin is not None:
            wanted[count] = (Span(thin[0].lo * lattice[0], (thin[0].hi - 1) * lattice[0] + 1, ys[count]),
                             Span(thin[1].lo * lattice[1], (thin[1].hi - 1) * lattice[1] + 1, xs[count]))
        top = max(p for p in range(count + 1) if wanted[p] is not None)
        for p in range(top, 0, -1):
            y, x = wanted[p]  # type: ignore[misc]
            part = self.encoder[p - 1]
            wanted[p - 1] = union(wanted[p - 1], (need(part, y, ys[p - 1]), need(part, x, xs[p - 1])))
        y, x = wanted[0]  # type: ignore[misc]
        m = Map(as_format(guide.window(y, x).to(self.device, self.dtype)), y, x)
        around = False
        for p in range(top + 1):
            if p:
                y, x = wanted[p]  # type: ignore[misc]
                part = self.encoder[p - 1]
                if p == count - 1 and thin is not None and p not in self.taps and takes_around(
                        part, self.encoder[p], lattice, m.data, y.length * x.length):
                    around = True  # with the next
                    self.tick(part_work(part, y, x))
                    continue
                if around:
                    m = run_around(self.encoder[p - 2], part, m, lattice[0], thin)  # type: ignore[arg-type]
                elif p == count and thin is not None:
                    m = run_sampled(part, m, y, x, lattice, thin)  # type: ignore[arg-type]
                else:
                    m = run(part, m, y, x)
                self.tick(part_work(part, y, x))
            for i, r in enumerate(requests):
                if r is not None and self.taps[r.source] == p:
                    samples.fill(stored[i], r, m)

    # -- decoding --------------------------------------------------------------------------------------------------

    def decode(self, latent: Tensor | Map, plan: Plan, maps: Samples, noise: Noise, step: int) -> Map:
        """One step on a window: ``latent`` is the (normalised) input, the result covers ``plan.out``. A tensor is the
        whole input; a map holds at least what the window reads of it."""
        value = latent if isinstance(latent, Map) else whole(latent)
        m = self._attend(self._weigh(value, plan, maps, noise, step), value)
        if not self.refiner:
            return Map(m.cut(*plan.out), *plan.out)
        m = Map(m.cut(*plan.attended), *plan.attended)
        refined = self._walk(self.refiner, plan.refiner, m, maps, noise, step)
        if self.config.refiner is not None and self.config.refiner.residual:
            return Map(refined.data + m.cut(*plan.out), *plan.out)
        return refined

    def _weigh(self, value: Map, plan: Plan, maps: Samples, noise: Noise, step: int) -> Map:
        """The attender map for the window; without an attender the decoder's result."""
        m = self._walk(self.decoder, plan.decoder, value, maps, noise, step)
        attender = self.model.attender
        if attender is not None:
            weights = attend(accumulate(pointwise(attender.conv1, m.data), m.data)).to(self.dtype)
            self.tick(part_work(attender.conv1, m.y, m.x))
            return Map(weights, m.y, m.x)
        data = self.model.decoder.outc(m.data)
        if self.config.residual_outc:
            c = min(data.shape[1], m.data.shape[1])
            data[:, :c] += m.data[:, :c]
        return Map(data, m.y, m.x)

    def _walk(self, chain: Sequence[Concat | nn.Module], windows: list[Window], m: Map, maps: Samples, noise: Noise,
              step: int) -> Map:
        for i, (part, window) in enumerate(zip(chain, windows[1:], strict=True)):
            if isinstance(part, Concat):
                reader = (chain[i + 1], windows[i + 2]) if i + 1 < len(chain) else None
                m = self._combine(part, m, window, maps, noise, step, reader)
            else:
                m = run(part, m, *window)
                self.tick(part_work(part, *window))
        return m

    def _combine(self, part: Concat, m: Map, window: Window, maps: Samples, noise: Noise, step: int,
                 reader: tuple[Concat | nn.Module, Window] | None) -> Map:
        """The map, the encoder's and noise as the channels of one map; ``reader``: the block that comes next."""
        y, x = window
        f = maps.get(Request(part.source, part.sampling, y, x))
        own = m.cut(y, x)
        if reader and not part.noise_channels and joins(reader[0], own, *reader[1]):
            return Map(own, y, x, (f,))
        b, c, wide = own.shape[0], own.shape[1], f.shape[1]
        data = empty(own, c + wide + part.noise_channels, y.length, x.length)
        data[:, :c] = own
        data[:, c:c + wide] = f
        if part.noise_channels:
            drawn = noise.window(step, part.site, part.noise_channels, b, y, x)
            data[:, c + wide:] = 0 if drawn is None else drawn.to(data) * part.noise_scale
        return Map(data, y, x)

    def _attend(self, weighed: Map, value: Map) -> Map:
        """What :meth:`_weigh` made for a window, brought to the step's input."""
        attender = self.model.attender
        if attender is None:
            return weighed
        weights, y, x = weighed.data, weighed.y, weighed.x
        if not FAST.block_attender and y.whole and x.whole:
            return Map(pool_reference(weights, value.data), y, x)
        scale, r = self.config.step_factor, reach(attender.n)
        spans = [Span(max(0, g.lo // scale - r), min(v.size, g.hi // scale + r), v.size)
                 for g, v in ((y, value.y), (x, value.x))]
        first = (y.lo // scale - spans[0].lo, x.lo // scale - spans[1].lo)
        return Map(pool(weights, as_format(value.cut(spans[0], spans[1])), scale, first), y, x)


def _sizes(chain: Sequence[Concat | nn.Module], n: int) -> list[int]:
    sizes = [n]
    for part in chain:
        sizes.append(sizes[-1] if isinstance(part, Concat) else size(part, sizes[-1]))
    return sizes


def _backward(chain: Sequence[Concat | nn.Module], sizes: list[int], out: Span) -> list[Span]:
    spans = [out]
    for part, n in zip(reversed(chain), reversed(sizes[:-1]), strict=True):
        spans.insert(0, Span(spans[0].lo, spans[0].hi, n) if isinstance(part, Concat) else need(part, spans[0], n))
    return spans


def part_work(part: nn.Module, y: Span, x: Span) -> float:
    """Roughly the multiplications of a part on a window."""
    if part not in _numbers:
        _numbers[part] = sum(p.numel() for p in part.parameters())
    return float(_numbers[part]) * y.length * x.length


_numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # counting takes as long as a small part's launches
