"""The convolutions of a block on a window of its map, in their faster forms: with the batch norm folded into them, by
Winograd on the CPU, as one matrix product where they are 1x1."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import winograd
from .forms import FAST
from .kept import once
from .layers import channel_norm
from .maps import Map, as_format
from .resample import Span


def convolve(conv: Any, m: Map, y: Span, x: Span, stride: tuple[int, int] = (1, 1), exact: bool = True,
             relu: bool = False) -> Tensor:
    """The 3x3 convolution's output at positions ``i * stride`` for i in (y, x), zero padded at the picture's border.

    exact: to the last digits of fp32; relu: negative results become zero.
    """
    if stride == (1, 1) and takes_winograd(conv, m.data, y.length * x.length):
        return convolve_winograd(conv, m, y, x, exact, relu)
    top, bottom, y_in = _pads(y, stride[0], m.y.size)
    left, right, x_in = _pads(x, stride[1], m.x.size)
    data = as_format(m.cut(y_in, x_in))
    # The layer's own padding is on both sides: right where it is wanted there, or changes no result.
    padding = (top, left)
    if (data.shape[2] + 2 * top - 3) // stride[0] + 1 != y.length or bottom > top or (
            data.shape[3] + 2 * left - 3) // stride[1] + 1 != x.length or right > left:
        data, padding = F.pad(data, (left, right, top, bottom)), (0, 0)
    return relu_if(reshaped(conv, stride, padding)(data), relu)


def pointwise(conv: Any, x: Tensor) -> Tensor:
    """A 1x1 convolution as one matrix product: torch's own choice of kernel is often slower on the CPU, and on CUDA it
    adds the bias in a pass of its own."""
    weight = conv.weight
    if (not FAST.channels_last or x.device.type not in ("cpu", "cuda") or weight.device != x.device
            or weight.dtype != x.dtype or not as_written(conv, nn.Conv2d)):
        return conv(x)
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def norm_relu(conv: Any, norm: Any, kind: str, compute: Callable[[Any, bool], Tensor]) -> Tensor:
    """What ``compute`` makes of the convolution (and of whether it shall do the ReLU), its norm and ReLU."""
    if folds(kind, conv, norm):
        return compute(folded(conv, norm), True)
    data = compute(conv, False)
    if kind == "batch":
        return norm(data).relu_()
    if FAST.compiled and norm.weight.device == data.device and norm.weight.dtype == data.dtype:
        return _compiled_norm_relu()(data, norm.weight, norm.bias, norm.eps)
    return channel_norm(norm, data).relu_()


def folds(kind: str, conv: Any, norm: Any) -> bool:
    """Whether the norm is worked into the convolution."""
    # On a graphics device the nine small operations of folding take longer than the norm's pass over the map.
    return (kind == "batch" and FAST.fold_batch_norm and conv.weight.device.type == "cpu"
            and as_written(conv, nn.Conv2d) and as_written(norm, nn.BatchNorm2d))


def folded(conv: Any, norm: Any) -> Any:
    """:func:`fold`, once within :func:`~uplift_core.kept.keep_made`."""
    return once(conv, "folded", lambda: fold(conv, norm))


def fold(conv: Any, norm: Any) -> Any:
    """The convolution with the batch norm behind it worked into its weights; the originals stay as they are."""
    scale = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
    bias = 0 if conv.bias is None else conv.bias.float().to(norm.weight.device)
    folded = copy.copy(conv)
    folded._parameters = dict(conv._parameters)
    weight = conv.weight.float() * scale.to(conv.weight.device).view(-1, 1, 1, 1)
    shift = (bias - norm.running_mean.float()) * scale + norm.bias.float()
    folded._parameters["weight"] = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    folded._parameters["bias"] = nn.Parameter(shift.to(conv.weight), requires_grad=False)
    return folded


@functools.cache
def _compiled_norm_relu() -> Any:
    def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), weight, bias, eps)
        return torch.relu(y).permute(0, 3, 1, 2)

    return torch.compile(norm_relu, dynamic=True)


def as_written(layer: Any, plain: type[nn.Module]) -> bool:
    """Whether the layer computes what its weights say, as ``plain`` does, so that its weights may be used without it.

    Not with a host's own forward, hooks or parametrizations: those are called. ComfyUI's layers are, when no function
    waits for their weights."""
    if layer._forward_hooks or layer._forward_pre_hooks or is_parametrized(layer):
        return False
    if type(layer).forward is plain.forward:
        return True
    return hasattr(layer, "comfy_cast_weights") and not any(
        getattr(layer, f"{name}_function", ()) for name in ("weight", "bias", "weight_lowvram", "bias_lowvram"))


def reshaped(conv: Any, stride: tuple[int, int], padding: tuple[int, int]) -> Any:
    """The same convolution (its weights shared, its class a host's own perhaps) with another stride and padding."""
    if tuple(conv.stride) == stride and tuple(conv.padding) == padding:
        return conv
    if is_parametrized(conv):  # such a module cannot be copied
        return lambda data: F.conv2d(data, conv.weight, conv.bias, stride, padding)
    other = copy.copy(conv)
    other.stride, other.padding = stride, padding
    return other


def takes_winograd(conv: Any, data: Tensor, pixels: int) -> bool:
    weight = conv.weight
    return (FAST.winograd and data.device.type == "cpu" and weight.device == data.device
            and data.dtype == weight.dtype == torch.float32 and as_written(conv, nn.Conv2d)
            and winograd_pays(weight.shape[0], weight.shape[1], pixels))


def winograd_pays(out: int, channels: int, pixels: int) -> bool:
    """Whether a 3x3 convolution of so many channels and pixels is worth the transforms."""
    return out * channels >= FAST.winograd_gain * (out + channels) and pixels >= 3 * max(out, channels)


def convolve_winograd(conv: Any, m: Map, y: Span, x: Span, exact: bool, relu: bool,
                       closing: winograd.Closing | None = None) -> Tensor:
    top, bottom, y_in = _pads(y, 1, m.y.size)
    left, right, x_in = _pads(x, 1, m.x.size)
    sources = [Map(data, m.y, m.x).cut(y_in, x_in) for data in (m.data, *m.more)]
    form = winograd.form_for(y.length, x.length, exact)
    return winograd.convolve(sources, winograd.filters(conv.weight, form), (left, right, top, bottom), conv.bias,
                             form, relu, closing)


def relu_if(x: Tensor, wanted: bool) -> Tensor:
    return x.relu_() if wanted else x


def _pads(out: Span, stride: int, n: int) -> tuple[int, int, Span]:
    lo, hi = out.lo * stride - 1, (out.hi - 1) * stride + 2
    return max(0, -lo), max(0, hi - n), Span(max(0, lo), min(n, hi), n)
