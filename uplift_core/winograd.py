"""3x3 convolutions on the CPU with a quarter of the multiplications (Winograd, F(4x4, 3x3)), in fp32.

Lavin and Gray 2016 use the interpolation points 0, +-1, +-2, inf. The points here, 0, +-3/4, +-3/2, inf, keep the
transforms as short and lose about three times less precision: over 512 channels the error is that of a plain fp32
convolution. Inference only; other devices and dtypes have their own kernels for this.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 4
_A, _B = 3 / 4, 3 / 2
_AA, _BB = _A * _A, _B * _B
_CHUNK_BYTES = 8 << 20

_POINTS = [0.0, _A, -_A, _B, -_B]
_NORMS = [_AA * _BB] + [2 * _AA * (_AA - _BB)] * 2 + [2 * _BB * (_BB - _AA)] * 2
_G = torch.tensor([[1 / n, p / n, p * p / n] for p, n in zip(_POINTS, _NORMS, strict=True)] + [[0.0, 0.0, 1.0]],
                  dtype=torch.float64)


def transform_weight(weight: Tensor) -> Tensor:
    """``o c 3 3 -> 36 c o``: the filters in the transformed domain."""
    o, c = weight.shape[:2]
    both = torch.kron(_G, _G).to(weight.dtype)
    return (both @ weight.permute(2, 3, 1, 0).reshape(9, c * o)).view(36, c, o)


def convolve(x: Tensor, transformed: Tensor, pads: tuple[int, int, int, int], bias: Tensor | None = None) -> Tensor:
    """Stride-1 3x3 convolution of ``b c h w`` (channels last) with zero pads (left, right, top, bottom).

    Returns ``b o h+top+bottom-2 w+left+right-2``, channels last.
    """
    left, right, top, bottom = pads
    b, c, h, w = x.shape
    o = transformed.shape[2]
    height, width = h + top + bottom - 2, w + left + right - 2
    down, across = -(-height // TILE), -(-width // TILE)
    rows = max(1, _CHUNK_BYTES // (36 * max(c, o) * 4 * across))
    source = x.permute(0, 2, 3, 1)
    out = x.new_empty(b, height, width, o)
    for i in range(b):
        for first in range(0, down, rows):
            k = min(rows, down - first)
            padded = x.new_zeros(TILE * k + 2, TILE * across + 2, c)
            above = TILE * first - top  # the source row that the strip's first row shows
            y0, y1 = max(above, 0), min(above + TILE * k + 2, h)
            padded[y0 - above:y1 - above, left:left + w] = source[i, y0:y1]
            strip = _strip(padded, transformed, k, across)
            keep = min(TILE * k, height - TILE * first)
            out[i, TILE * first:TILE * first + keep] = strip[:keep, :width]
    if bias is not None:
        out += bias
    return out.permute(0, 3, 1, 2)


def _strip(padded: Tensor, transformed: Tensor, k: int, across: int) -> Tensor:
    c, o = transformed.shape[1:]
    rows = padded.new_empty(6, k, padded.shape[1], c)
    _into([padded[i:i + TILE * k - 3:TILE] for i in range(6)], list(rows))
    data = padded.new_empty(6, 6, k, across, c)
    _into([rows[:, :, i:i + TILE * across - 3:TILE] for i in range(6)], [data[:, i] for i in range(6)])
    flat = data.view(36, k * across, c)
    product = padded.new_empty(36, k * across, o)
    for i in range(36):
        torch.mm(flat[i], transformed[i], out=product[i])
    product = product.view(6, 6, k, across, o)
    out = padded.new_empty(k, TILE, across, TILE, o)
    for j, column in enumerate(_back([product[:, i] for i in range(6)])):
        for i, row in enumerate(_back(list(column))):
            out[:, i, :, j] = row
    return out.view(k * TILE, across * TILE, o)


def _into(d: list[Tensor], out: list[Tensor]) -> None:
    """Six samples to the values of their polynomial filters at the six points, into ``out``."""
    torch.add(d[4], d[2], alpha=-(_AA + _BB), out=out[0]).add_(d[0], alpha=_AA * _BB)
    even, odd = torch.add(d[4], d[2], alpha=-_BB), torch.add(d[3], d[1], alpha=-_BB)
    torch.add(even, odd, alpha=_A, out=out[1])
    torch.add(even, odd, alpha=-_A, out=out[2])
    torch.add(d[4], d[2], alpha=-_AA, out=even)
    torch.add(d[3], d[1], alpha=-_AA, out=odd)
    torch.add(even, odd, alpha=_B, out=out[3])
    torch.add(even, odd, alpha=-_B, out=out[4])
    torch.add(d[5], d[3], alpha=-(_AA + _BB), out=out[5]).add_(d[1], alpha=_AA * _BB)


def _back(m: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products at the six points to four neighbouring outputs."""
    sum_a, dif_a, sum_b, dif_b = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    first = m[0] + sum_a
    first += sum_b
    third = (sum_a * _AA).add_(sum_b, alpha=_BB)
    second = (dif_a * _A).add_(dif_b, alpha=_B)
    fourth = dif_a.mul_(_A * _AA).add_(dif_b, alpha=_B * _BB).add_(m[5])
    return first, second, third, fourth
