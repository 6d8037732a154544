"""The Local Attender (paper section 3.2): every new pixel is a weighted mean of a few neighbours below it.

Two forms of the same sum. The reference is the definition, one shifted copy per offset. The fast form never builds
those copies: for few channels it adds the offsets up in place. For many, a pixel is a bag of n entries of a table, the
value map, which torch sums up well on the CPU; elsewhere, and where gradients are wanted, small dense blocks of weights
are multiplied with small blocks of the value map.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .devices import no_autocast

OFFSETS: dict[int, tuple[tuple[int, int], ...]] = {
    5: tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if abs(dy) + abs(dx) <= 1),
    9: tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)),
    13: tuple((dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)
              if abs(dy) + abs(dx) <= 2 or (abs(dy) == 1 and abs(dx) == 1)),
    17: tuple((dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)
              if max(abs(dy), abs(dx)) < 2 or (dy % 2 == 0 and dx % 2 == 0)),
    25: tuple((dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)),
}
"""Neighbours ``(dy, dx)`` by their number n, row-major as in the published checkpoints."""


def replicate(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """``x`` with its edges repeated (left, right, top, bottom)."""
    if x.dtype in (torch.bfloat16, torch.float16):  # torch 2.1 has no such kernel for them, on CUDA or on a CPU
        x = x.permute(0, 2, 3, 1)  # as whole pixels
        for axis, (before, behind) in ((2, pads[:2]), (1, pads[2:])):
            n = x.shape[axis]
            x = x.index_select(axis, torch.arange(-before, n + behind, device=x.device).clamp_(0, n - 1))
        return x.permute(0, 3, 1, 2)
    return F.pad(x, pads, mode="replicate")


def reach(n: int) -> int:
    """How many value pixels away an attender of n neighbours looks: 1 or 2."""
    return max(dy for dy, _ in OFFSETS[n])


class LocalAttender(nn.Module):
    """Guide ``b g H W`` and value ``b c h w`` (H = s h, W = s w) to ``b c H W``, each pixel within its neighbours'
    min..max. In training mode the fast form, whose backward pass takes a tenth of the time."""

    def __init__(self, channels: int, n: int = 17, operations: Any = nn):
        super().__init__()
        self.n = n
        self.conv1 = operations.Conv2d(channels, n, 1)

    def weights(self, guide: Tensor) -> Tensor:
        """The attender map ``b n H W``: positive, summing to 1 over n. Softmax in fp32 whatever the guide's dtype."""
        logits = self.conv1(guide)
        c = min(self.n, guide.shape[1])
        return attend(torch.cat([logits[:, :c] + guide[:, :c], logits[:, c:]], 1))

    def forward(self, guide: Tensor, value: Tensor) -> Tensor:
        weights = self.weights(guide).to(value.dtype)
        if not self.training:
            return pool_reference(weights, value)
        with no_autocast(value.device.type):  # a mean of latents is as exact as they are
            return pool(weights, value, weights.shape[2] // value.shape[2])


def attend(logits: Tensor) -> Tensor:
    """Logits ``b n H W`` to shares that sum to 1 over n, in fp32 at least."""
    return logits.softmax(1, dtype=torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else None)


def pool_reference(weights: Tensor, value: Tensor) -> Tensor:
    """The definition: ``out[y, x] = sum_k weights[k, y, x] * value[y // s + dy_k, x // s + dx_k]``, edges repeated."""
    b, n, height, width = weights.shape
    h, w = value.shape[-2:]
    r = reach(n)
    padded = replicate(value, (r, r, r, r))
    shifted = torch.stack([padded[..., r + dy:r + dy + h, r + dx:r + dx + w] for dy, dx in OFFSETS[n]], 2)
    s = height // h
    pooled = shifted[:, :, :, :, None, :, None] * weights.view(b, 1, n, h, s, w, s)
    return pooled.sum(2).reshape(b, -1, height, width)


def pool(weights: Tensor, value: Tensor, scale: int, first: tuple[int, int] = (0, 0)) -> Tensor:
    """The same sum, fast.

    weights: ``b n sh sw``; value: ``b c`` and at least what ``h w`` pixels and their neighbours are, so that a window
    of a larger map can bring its real ones; beyond its edges they are repeated. first: row and column of the first of
    those pixels in it. Returns ``b c sh sw``.
    """
    learns = torch.is_grad_enabled() and (weights.requires_grad or value.requires_grad)
    if value.device.type == "cpu" and value.shape[1] > 16 and not learns:
        return _pool_bags(weights, value, scale, first)
    r = reach(weights.shape[1])
    ends = [(n // scale + r, size) for n, size in zip(weights.shape[2:], value.shape[2:], strict=True)]
    spans = [(max(0, f - r), min(size, f + end), max(0, r - f), max(0, f + end - size))
             for f, (end, size) in zip(first, ends, strict=True)]
    (top, bottom, above, below), (left, right, before, behind) = spans
    padded = value[:, :, top:bottom, left:right]
    if above or below or before or behind:
        padded = replicate(padded, (before, behind, above, below))
    return (_pool_in_place if value.shape[1] <= 16 else _pool_blocks)(weights, padded, scale)


def _pool_in_place(weights: Tensor, padded: Tensor, s: int) -> Tensor:
    b, n, height, width = weights.shape
    h, w, r = height // s, width // s, reach(n)
    exact = padded.to(torch.promote_types(padded.dtype, torch.float32))  # a sum of n terms loses much in half
    maps = weights.to(exact.dtype).reshape(b, n, 1, h, s, w, s)
    out = exact.new_zeros(b, padded.shape[1], h, s, w, s)
    for k, (dy, dx) in enumerate(OFFSETS[n]):
        out.addcmul_(exact[:, :, r + dy:r + dy + h, None, r + dx:r + dx + w, None], maps[:, k])
    return out.view(b, -1, height, width).to(padded.dtype)


_EXACT_ROWS = 4  # rows of a value map in half precision that are summed in fp32 at a time


def _pool_bags(weights: Tensor, value: Tensor, s: int, first: tuple[int, int]) -> Tensor:
    b, n, height, width = weights.shape
    c, h, w = value.shape[1:]
    exact = torch.promote_types(value.dtype, torch.float32)
    if value.dtype != exact:
        out = torch.empty(b, height, width, c, dtype=value.dtype).permute(0, 3, 1, 2)
        r = reach(n)
        for top in range(0, height // s, _EXACT_ROWS):
            strip = slice(top * s, (top + _EXACT_ROWS) * s)
            own = max(0, first[0] + top - r)
            near = value[:, :, own:first[0] + top + _EXACT_ROWS + r].to(exact)
            out[:, :, strip] = _pool_bags(weights[:, :, strip], near, s, (first[0] + top - own, first[1]))
        return out
    # One table and one sum: what torch returns is the result, of which nothing is copied.
    dy, dx = torch.tensor(OFFSETS[n], dtype=torch.int32).unbind(1)
    item, row, column = (torch.arange(k, dtype=torch.int32).unsqueeze(1) for k in (b, height, width))
    rows = (row // s + first[0] + dy).clamp_(0, h - 1) * w
    columns = (column // s + first[1] + dx).clamp_(0, w - 1)
    entries = (item * (h * w)).view(b, 1, 1, 1) + rows.unsqueeze(1) + columns
    sums = F.embedding_bag(entries.view(-1, n), value.permute(0, 2, 3, 1).reshape(-1, c), mode="sum",
                           per_sample_weights=weights.permute(0, 2, 3, 1).reshape(-1, n).to(exact))
    return sums.view(b, height, width, c).permute(0, 3, 1, 2)


_BLOCK = 4  # value pixels per side of a block: 64 outputs from an 8x8 neighbourhood at scale 2
_CHUNK_BYTES = 4 << 20
_LARGE_CHUNKS = 8  # times as much on a graphics device, where each costs a dozen launches


def blocks_bytes(device: torch.device, near: int) -> int:
    """What the blocks of a value map of ``near`` bytes take at a time, beside the result: each value is in four."""
    return 3 * min(_chunk_bytes(device), 4 * near)


def _chunk_bytes(device: torch.device) -> int:
    return _CHUNK_BYTES * (1 if device.type == "cpu" else _LARGE_CHUNKS)


def _pool_blocks(weights: Tensor, padded: Tensor, s: int) -> Tensor:
    """Blocks of 4x4 value pixels: a dense ``(16 s^2) x (4+2r)^2`` matrix of weights times the neighbourhood's values.

    The matrix is mostly zeros, but a matrix product over all channels at once is many times faster than n passes
    over the map. Works through the map in rows of blocks, so that beside the output only little memory is needed.
    """
    b, n, height, width = weights.shape
    c, r = padded.shape[1], reach(n)
    h, w, size = height // s, width // s, _BLOCK + 2 * r
    out = padded.new_empty(b, height, width, c)
    value = padded.permute(0, 2, 3, 1)
    columns = torch.tensor([[[(y + r + dy) * size + x + r + dx for dy, dx in OFFSETS[n]] for x in range(_BLOCK)]
                            for y in range(_BLOCK)], device=padded.device)
    columns = columns.view(_BLOCK, 1, _BLOCK, 1, n).expand(_BLOCK, s, _BLOCK, s, n).reshape(-1, n)

    across = -(-w // _BLOCK)
    rows = max(1, _chunk_bytes(padded.device) // (across * size * size * c * padded.element_size()))
    for i in range(b):
        for top in range(0, h, rows * _BLOCK):
            bottom = min(h, top + rows * _BLOCK)
            down = -(-(bottom - top) // _BLOCK)
            spare_y, spare_x = down * _BLOCK - (bottom - top), across * _BLOCK - w
            strip = weights[i, :, top * s:bottom * s]
            near = value[i, top:bottom + 2 * r]
            if spare_y or spare_x:
                strip = F.pad(strip, (0, spare_x * s, 0, spare_y * s))
                near = F.pad(near, (0, 0, 0, spare_x, 0, spare_y))
            near = near.unfold(0, size, _BLOCK).unfold(1, size, _BLOCK)  # down across c size size
            near = near.permute(0, 1, 3, 4, 2).reshape(down * across, size * size, c)
            side = _BLOCK * s
            strip = strip.reshape(n, down, side, across, side).permute(1, 3, 2, 4, 0)
            strip = strip.reshape(down * across, side * side, n).to(padded.dtype)
            matrix = strip.new_zeros(down * across, side * side, size * size)
            matrix.scatter_(2, columns.expand(down * across, -1, -1), strip)
            block = torch.bmm(matrix, near).view(down, across, side, side, c).transpose(1, 2)
            target = out[i, top * s:bottom * s]
            if spare_y or spare_x:
                target[:] = block.reshape(down * side, across * side, c)[:(bottom - top) * s, :width]
            else:
                target.view(down, side, across, side, c)[:] = block
    return out.permute(0, 3, 1, 2)
