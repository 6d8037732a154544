"""Preview sheets: one row a picture, one column a method, with PSNR against the last column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_TITLE = 16


def psnr(image: Tensor, reference: Tensor) -> float:
    """Of ``... 3 H W`` in [0, 1], in dB."""
    return float(-10 * torch.log10((image.float() - reference.float()).pow(2).mean().clamp_min(1e-12)))


def sheet(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Write a PNG of batches ``b 3 H W`` side by side; the last one is the reference. Whole or not at all."""
    reference = list(columns.values())[-1].cpu()
    b, _, height, width = reference.shape
    page = Image.new("RGB", (width * len(columns), (height + _TITLE) * b), "white")
    for j, (name, batch) in enumerate(columns.items()):
        for i, image in enumerate(batch.cpu()):
            top = i * (height + _TITLE)
            pixels = image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            page.paste(Image.fromarray(pixels), (j * width, top + _TITLE))
            value = "" if j == len(columns) - 1 else f"  {psnr(image, reference[i]):.1f} dB"
            title = Image.new("RGB", (width, _TITLE), "white")  # of its own, so that no title runs into the next
            ImageDraw.Draw(title).text((2, 2), name + value, fill="black")
            page.paste(title, (j * width, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    page.save(part, "PNG")
    part.replace(path)
