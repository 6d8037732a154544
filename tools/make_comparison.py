"""The picture in the README: part of a sample enlarged 4x by bicubic, by bicubic made consistent, and by the bundled
model.

    python tools/make_comparison.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from uplift_core import load, load_vae, upscale_image
from uplift_core.consistency import back_project
from uplift_core.imageio import read_picture

ROOT = Path(__file__).parents[1]
SCALE, TOP, LEFT, HEIGHT, WIDTH = 4, 285, 520, 460, 440  # the window, in enlarged pixels


def main() -> None:
    low = read_picture(ROOT / "uplift_core/assets/samples/chelsea.png").rgb[None]
    bicubic = F.interpolate(low, scale_factor=SCALE, mode="bicubic", align_corners=False).clamp(0, 1)
    ours = upscale_image(load("uplift-mini", device="cpu"), load_vae("tiny"), low[0], scale=SCALE, seed=0)[None]
    font = ImageFont.load_default(22)
    sheet = Image.new("RGB", (3 * WIDTH + 12, HEIGHT), "white")
    for place, (title, picture) in enumerate((("bicubic", bicubic), ("bicubic + back-projection",
                                              back_project(bicubic, low)), ("UPLiFT, bundled model", ours))):
        part = picture[0, :, TOP:TOP + HEIGHT, LEFT:LEFT + WIDTH].permute(1, 2, 0)
        panel = Image.fromarray(part.mul(255).round().to(torch.uint8).numpy())
        ImageDraw.Draw(panel).text((12, 10), title, "white", font, stroke_width=3, stroke_fill="black")
        sheet.paste(panel, (place * (WIDTH + 6), 0))
    sheet.save(ROOT / "docs/cat_4x.jpg", quality=93, subsampling=0)


if __name__ == "__main__":
    main()
