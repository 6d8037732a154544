"""Every block of the model, computed on a window of its map with the same result as on the whole.

For each kind of block three functions: ``size`` (whole input axis to whole output axis), ``need`` (what part of the
input axis a part of the output reads) and ``run``. Zero padding happens at the picture's border only; inside, a
window reads its real neighbours.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import winograd
from .convolving import (
    as_written,
    convolve,
    convolve_winograd,
    folded,
    folds,
    norm_relu,
    pointwise,
    relu_if,
    reshaped,
    takes_winograd,
)
from .layers import ConvBlock, DownBlock, TransposeConv, UpBlock, odd_size
from .maps import Map, accumulate, as_format
from .resample import Span, reads, sample

# -- sizes and needs, one axis at a time ---------------------------------------------------------------------------

def size(module: nn.Module, n: int) -> int:
    """Length of the whole output axis for a whole input axis of n."""
    if isinstance(module, ConvBlock):
        shrunk = n // 2 if module.residual and module.stride == 2 else None
        for _ in module.stages():
            n = (n - 1) // module.stride + 1
        return _agreed(n, shrunk)
    if isinstance(module, DownBlock):
        config = module.config
        out = {"none": n, "max": n // 2}.get(config.op, (n - 1) // config.stride + 1)
        return _agreed(out, int(n * config.factor) if config.residual == "bilinear" else None)
    if isinstance(module, TransposeConv):
        return n * 2
    return n * module.config.scale if isinstance(module, UpBlock) else n


def _agreed(n: int, residual: int | None) -> int:
    if residual is not None and residual != n:
        raise odd_size((residual,), (n,))
    return n


def need(module: nn.Module, out: Span, n: int) -> Span:
    """What the block reads of an input axis of length n to produce ``out``."""
    if isinstance(module, ConvBlock):
        span = out
        for length in reversed(_stage_sizes(module, n)[:-1]):
            span = _conv_need(span, module.stride, length)
        if module.residual and module.stride == 2:
            span = span.union(reads("corners", out, n))
        return span
    if isinstance(module, DownBlock) and module.config.op != "none":
        config = module.config
        span = _conv_need(out, config.stride, n) if config.op == "conv" else Span(2 * out.lo, 2 * out.hi, n)
        return span.union(reads("corners", out, n)) if config.residual == "bilinear" else span
    if isinstance(module, (UpBlock, TransposeConv)):
        k = 2 if isinstance(module, TransposeConv) else module.config.scale
        span = Span(out.lo // k, -(-out.hi // k), n)
        if isinstance(module, UpBlock) and module.config.op == "tconv" and module.config.residual == "bilinear":
            span = span.union(reads("corners", out, n))
        return span
    return Span(out.lo, out.hi, n)


def _stage_sizes(block: ConvBlock, n: int) -> list[int]:
    sizes = [n]
    for _ in block.stages():
        sizes.append((sizes[-1] - 1) // block.stride + 1)
    return sizes


def _conv_need(out: Span, stride: int, n: int) -> Span:
    return Span(max(0, out.lo * stride - 1), min(n, (out.hi - 1) * stride + 2), n)


# -- running -------------------------------------------------------------------------------------------------------

def run(module: nn.Module, m: Map, y: Span, x: Span) -> Map:
    """The window (y, x) of the block's output; ``m`` holds at least what :func:`need` names."""
    if isinstance(module, ConvBlock):
        return _run_conv_block(module, m, y, x)
    if isinstance(module, DownBlock):
        return _run_down(module, m, y, x)
    if isinstance(module, (UpBlock, TransposeConv)):
        return _run_up(module, m, y, x)
    if getattr(module, "weight", None) is not None:  # a 1x1 convolution, of whatever class
        return Map(pointwise(module, m.cut(y, x)), y, x)
    return Map(m.cut(y, x), y, x)


def run_sampled(block: ConvBlock, m: Map, y: Span, x: Span, steps: tuple[int, int], out: tuple[Span, Span]) -> Map:
    """The block's output at every ``steps``-th position only: positions ``i * step`` for i in ``out``.

    y and x are the dense window of the block's output that holds these positions. Only the last 3x3 convolution and
    what follows it is thinned out: it becomes a strided one.
    """
    return _run_conv_block(block, m, y, x, steps, out)


def takes_around(first: nn.Module, last: nn.Module, steps: tuple[int, int], data: Tensor, pixels: int) -> bool:
    """Whether :func:`run_around` can compute the two blocks of a band of ``pixels``, and saves by it."""
    return (isinstance(first, ConvBlock) and isinstance(last, ConvBlock) and first.stride == last.stride == 1
            and len(first.stages()) == len(last.stages()) == 1 and steps[0] == steps[1] >= 4
            and takes_winograd(first.stages()[0][0], data, pixels))


def run_around(first: ConvBlock, last: ConvBlock, m: Map, step: int, out: tuple[Span, Span]) -> Map:
    """Two blocks, of the second only the positions ``i * step`` for i in ``out``: the first is computed there and at
    the eight neighbours, which then stand together, three by three, for a convolution of stride 3."""
    ys, xs = out
    y, x = ys.lo * step - m.y.lo, xs.lo * step - m.x.lo
    conv, norm = first.stages()[0]
    near = norm_relu(conv, norm, first.norm, lambda conv, relu: winograd.convolve_around(
        m.data, winograd.filters(conv.weight, winograd.AROUND), (y, x), (ys.length, xs.length), step, conv.bias, relu))
    if first.one_by is not None:
        near = pointwise(first.one_by, near)
    top, left = int(ys.lo == 0), int(xs.lo == 0)  # where the first neighbours are outside the picture
    if first.residual:
        for dy in range(3):
            for dx in range(3):
                i, j = top * (dy == 0), left * (dx == 0)
                own = m.data[:, :, y + step * i + dy - 1:, x + step * j + dx - 1:][:, :, ::step, ::step]
                accumulate(near[:, :, 3 * i + dy::3, 3 * j + dx::3], own[:, :, :ys.length - i, :xs.length - j])
    near[:, :, :top] = 0
    near[:, :, :, :left] = 0
    conv, norm = last.stages()[0]
    data = norm_relu(conv, norm, last.norm, lambda conv, relu: relu_if(reshaped(conv, (3, 3), (0, 0))(near), relu))
    if last.one_by is not None:
        data = pointwise(last.one_by, data)
    return Map(accumulate(data, near[:, :, 1::3, 1::3]) if last.residual else data, ys, xs)


def _run_conv_block(block: ConvBlock, m: Map, y: Span, x: Span, steps: tuple[int, int] = (1, 1),
                    sampled: tuple[Span, Span] | None = None) -> Map:
    sizes_y, sizes_x = _stage_sizes(block, m.y.size), _stage_sizes(block, m.x.size)
    stages = block.stages()
    spans = [(y, x)]
    for i in range(len(stages) - 1, 0, -1):
        last_y, last_x = spans[0]
        spans.insert(0, (_conv_need(last_y, block.stride, sizes_y[i]), _conv_need(last_x, block.stride, sizes_x[i])))
    current = m
    for i, (conv, norm) in enumerate(stages):
        out_y, out_x = spans[i]
        stride = (block.stride, block.stride)
        if i == len(stages) - 1 and sampled is None and _closes_in_cache(block, current, y, x):
            return Map(_run_closing(block, current, m, y, x), y, x)
        if sampled is not None and i == len(stages) - 1:
            stride = steps
            out_y, out_x = sampled
        data = _conv_norm_relu(conv, norm, block.norm, current, out_y, out_x, stride)
        current = Map(data, out_y, out_x)
    data = current.data
    if block.one_by is not None:
        data = pointwise(block.one_by, data)
    if block.residual:
        if sampled is not None:
            ys, xs = sampled
            data = accumulate(data, m.cut(Span(y.lo, y.hi, m.y.size), Span(x.lo, x.hi, m.x.size))[
                :, :, ys.lo * steps[0] - y.lo::steps[0], xs.lo * steps[1] - x.lo::steps[1]])
        elif block.stride == 1:
            data = accumulate(data, m.cut(Span(y.lo, y.hi, m.y.size), Span(x.lo, x.hi, m.x.size)))
        else:
            data = accumulate(data, _corners(m, y, x))
    return Map(data, current.y, current.x)


def _closes_in_cache(block: ConvBlock, m: Map, y: Span, x: Span) -> bool:
    """Whether the block's last convolution of ``m`` can have the 1x1 convolution and the residual behind it done part
    by part."""
    conv, norm = block.stages()[-1]
    one_by = block.one_by
    return (block.stride == 1 and one_by is not None and as_written(one_by, nn.Conv2d)
            and one_by.weight.dtype == conv.weight.dtype and one_by.weight.device == conv.weight.device
            and folds(block.norm, conv, norm) and takes_winograd(conv, m.data, y.length * x.length))


def _run_closing(block: ConvBlock, m: Map, own: Map, y: Span, x: Span) -> Tensor:
    """The block's last part, of ``m``; ``own``: the block's input."""
    conv, norm = block.stages()[-1]
    closing = winograd.Closing(block.one_by.weight.flatten(1), block.one_by.bias,
                               own.cut(y, x) if block.residual else None)
    return convolve_winograd(folded(conv, norm), m, y, x, exact=False, relu=True, closing=closing)


def _corners(m: Map, y: Span, x: Span) -> Tensor:
    return sample(m.data, "corners", m.y, m.x, y, x)


def _conv_norm_relu(conv: Any, norm: Any, kind: str, m: Map, y: Span, x: Span,
                    stride: tuple[int, int]) -> Tensor:
    # A layer norm makes small errors large where a pixel's values are nearly equal; a batch norm is a fixed factor.
    return norm_relu(conv, norm, kind, lambda conv, relu: convolve(conv, m, y, x, stride, kind != "batch", relu))


def joins(block: object, data: Tensor, y: Span, x: Span) -> bool:
    """Whether the block can read a map's channels from several tensors, the first of them ``data``.

    Its convolution then sums over them; nobody else may look at the others (:func:`accumulate` would, past the first).
    """
    if not isinstance(block, ConvBlock) or block.stride != 1:
        return False
    conv = block.stages()[0][0]
    return (data.shape[1] >= (conv.weight.shape[0] if block.residual else _FEW)
            and takes_winograd(conv, data, y.length * x.length))


_FEW = 16  # channels for which a matrix product of their own does not pay


def _run_down(block: DownBlock, m: Map, y: Span, x: Span) -> Map:
    config = block.config
    if config.op == "none":
        return Map(m.cut(y, x), y, x)
    if config.op == "conv":
        data = _conv_norm_relu(block.down[0], block.down[1], "batch", m, y, x, (config.stride, config.stride))
    else:
        data = F.max_pool2d(m.cut(Span(2 * y.lo, 2 * y.hi, m.y.size), Span(2 * x.lo, 2 * x.hi, m.x.size)), 2, 2)
    return Map(accumulate(data, _corners(m, y, x)) if config.residual == "bilinear" else data, y, x)


def _run_up(block: UpBlock | TransposeConv, m: Map, y: Span, x: Span) -> Map:
    k = 2 if isinstance(block, TransposeConv) else block.config.scale
    if isinstance(block, UpBlock) and block.config.op == "none":
        return Map(m.cut(y, x), y, x)
    y_in, x_in = Span(y.lo // k, -(-y.hi // k), m.y.size), Span(x.lo // k, -(-x.hi // k), m.x.size)
    data = block.up(as_format(m.cut(y_in, x_in)))
    held = Map(data, Span(y_in.lo * k, y_in.hi * k, y.size), Span(x_in.lo * k, x_in.hi * k, x.size))
    data = held.cut(y, x)
    if isinstance(block, UpBlock) and block.config.residual == "bilinear":
        data = accumulate(data, _corners(m, y, x))
    return Map(data, y, x)
