"""How much memory, and how many multiplications, a plan of the engine takes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .attender import blocks_bytes, reach
from .convolving import winograd_pays
from .engine import Concat, Engine, Plan, part_work
from .forms import FAST, at_a_time
from .layers import ConvBlock
from .windowed import size
from .winograd import LARGE

_SPARE = 32 << 20
"""Strips, tables and what else is small, of each stage."""
_UNEVEN = 64 << 20
"""What the C library's heap loses at most to bands of many heights, as antialiased sampling reads them."""
_HALO = 8  # rows that bands of a decoder have in common, about


def work_bytes(engine: Engine, plans: Sequence[Plan], shape: tuple[int, int], guide: tuple[int, int], *,
               batch: int = 1, element: int = 4, whole: bool = False) -> int:
    """Peak working memory of running ``plans`` with one encoding, beyond weights, inputs and results.

    shape: the step's input (rows, columns); guide: the encoded image's; whole: the plans are all steps on whole maps,
    one after the other. The larger of the encoder's and the decoder's need, plus the sampled maps that live through
    both.
    """
    requests = {r for plan in plans for r in plan.requests}
    finest: dict[int, tuple[int, int]] = {}
    for r in requests:
        area, width = r.y.length * r.x.length, engine.model.encoder.widths[r.source]
        finest[r.source] = max(finest.get(r.source, (0, 0)), (area, width))
    kept = batch * element * sum(area * width for area, width in finest.values())
    encoding = _encoder_bytes(engine, plans, guide, batch, element)
    peak = kept + encoding
    for i, plan in enumerate(plans):
        bands, returned = (engine.bands(plan.out), i == len(plans) - 1) if whole else (1, False)
        weighing, attending = _decoder_bytes(engine, plan, batch, element, bands, returned)
        # The engine lets go of the maps before the last attending, where it is apart.
        peak = max(peak, kept + weighing, attending + (0 if returned and bands > 1 else kept))
    uneven = engine.device.type == "cpu" and any(r.sampling == "bilinear" for r in requests)
    return int(peak) + _SPARE + uneven * min(_UNEVEN, int(peak) // 2)


def _filter_bytes(engine: Engine, part: nn.Module, pixels: int, element: int) -> int:
    """Transformed filters and strips of a Winograd convolution, where one would run."""
    if not (FAST.winograd and engine.device.type == "cpu" and element == 4 and isinstance(part, ConvBlock)):
        return 0
    total = 0
    for conv, _ in part.stages():
        o, c = conv.weight.shape[:2]
        if winograd_pays(o, c, pixels):
            total += LARGE.points**2 * o * c * element
    return total


def _widths(part: nn.Module | Concat, incoming: int) -> int:
    if isinstance(part, ConvBlock):
        return part.stages()[-1][0].weight.shape[0]
    weight = getattr(getattr(part, "up", part), "weight", None)
    if weight is None:
        return incoming
    return weight.shape[1] if hasattr(part, "up") else weight.shape[0]


def _encoder_bytes(engine: Engine, plans: Sequence[Plan], guide: tuple[int, int], batch: int, element: int) -> int:
    share_y = max(r.y.length / r.y.size for p in plans for r in p.requests)
    share_x = max(r.x.length / r.x.size for p in plans for r in p.requests)
    height, width = guide[0] * share_y, min(guide[1], guide[1] * share_x + 20)
    bands = max(1, -(-int(height * width) // at_a_time(FAST.band_pixels, engine.device)))
    rows = min(guide[0], height / bands + 20)
    channels, peak, filters = 3, 0.0, 0
    shrink = 1.0
    for part in engine.encoder:
        incoming, channels = channels, _widths(part, channels)
        shrink *= size(part, 1 << 10) / (1 << 10)
        pixels = rows * width * shrink**2
        copies = 4 if isinstance(part, ConvBlock) else 2
        peak = max(peak, batch * element * pixels * (2 * incoming + copies * channels))
        filters += _filter_bytes(engine, part, int(pixels), element)
    return int(peak) + filters + _SPARE


def _decoder_bytes(engine: Engine, plan: Plan, batch: int, element: int, bands: int,
                   returned: bool) -> tuple[int, int]:
    """Of decoder and refiner, and of the attender. bands: of the decoder's part; returned: what the attender or the
    refiner makes is the caller's."""
    attending = 0
    peak, channels = 0, engine.config.channels
    for chain, windows in ((engine.decoder, plan.decoder), (engine.refiner, plan.refiner)):
        if chain is engine.refiner:
            channels = engine.config.channels
        for part, (y, x) in zip(chain, windows[1:], strict=True):
            incoming, pixels = channels, min(y.length, y.length // bands + _HALO) * x.length
            if isinstance(part, Concat):
                channels += engine.model.encoder.widths[part.source] + part.noise_channels
                held = incoming + channels
            else:
                channels = _widths(part, channels)
                held = 2 * incoming + 4 * channels
            filters = 0 if isinstance(part, Concat) else _filter_bytes(engine, part, pixels, element)
            peak = max(peak, batch * element * pixels * held + filters)
        if chain is engine.decoder and engine.model.attender is not None:
            y, x = windows[-1]
            n, r = engine.model.attender.n, reach(engine.model.attender.n)
            near = (y.length // engine.config.step_factor + 2 * r) * (x.length // engine.config.step_factor + 2 * r)
            # Bags of a table are summed into the result; elsewhere it is put together, and the table padded.
            copies = 1 if engine.device.type == "cpu" else 2
            made = copies - (returned and not engine.refiner)
            pooled = y.length * x.length * (channels * (bands == 1) + 3 * n + made * engine.config.channels)
            table = batch * element * near * engine.config.channels
            attending = batch * element * pooled + copies * table + _SPARE
            if engine.device.type != "cpu" and engine.config.channels > 16:
                attending += blocks_bytes(engine.device, table)
    return peak + _SPARE, attending + _SPARE


def plan_work(engine: Engine, guide: tuple[int, int], plan: Plan, encodes: bool) -> float:
    """Roughly the multiplications of a plan, in the unit of the engine's ticks. guide: rows and columns."""
    work = 0.0
    for chain, windows in ((engine.decoder, plan.decoder), (engine.refiner, plan.refiner)):
        work += sum(part_work(part, y, x) for part, (y, x) in zip(chain, windows[1:], strict=True)
                    if not isinstance(part, Concat))
    if encodes:
        y = max(r.y.length / r.y.size for r in plan.requests) * guide[0]
        x = max(r.x.length / r.x.size for r in plan.requests) * guide[1]
        work += sum(float(p.numel()) for p in engine.model.encoder.parameters()) * y * x
    return max(work, 1.0)
