"""What the Dense features tab does, without the page: features in files of the temporary folder, pictures of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import catalogue
from .context import App
from .jobs import Job
from .limits import open_picture

if TYPE_CHECKING:
    from torch import Tensor

    from uplift_core.dense import DenseFeatures

SCALES = (1, 2, 4, 8, "pixel")
MIN_SIDE, MAX_SIDE, MAX_SEGMENTS = 56, 672, 16
LARGE = 640
"""About the longer side of what marks are drawn into."""
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999",
           "#7a5200", "#14587d", "#00523b", "#8a811b", "#003a5e", "#7a3500", "#6e3a58", "#4d4d4d")
"""Of Okabe and Ito, to be told apart by everybody, and the same darker."""


@dataclass
class Walk:
    """One picture's way from tokens to pixels. ``shown``: the picture at the size that was computed with; ``large``:
    the same ``factor`` times as large, to be clicked into."""

    shown: Path
    large: Path
    tokens: Path
    pixels: Path
    backbone: str
    model: str
    side: int
    factor: int = 1
    steps: list[Path] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def walk(app: App, source: str | None, backbone: str, model: str, side: float, job: Job, *, steps: bool = True) -> Walk:
    """Features at every scale, those of tokens and pixels kept in files, and PCA pictures of all in one palette.

    steps: False leaves out the scales between and the pictures. Raises as the core does.
    """
    from PIL import Image

    from uplift_core.dense import dense_features
    from uplift_core.errors import CheckpointError, InputError
    from uplift_core.features import pca_pictures
    from uplift_core.imageio import Picture, write_picture
    from uplift_core.measure import peak_memory, start_peak
    from uplift_core.resample import antialias

    if isinstance(side, bool) or not isinstance(side, (int, float)) or not MIN_SIDE <= side <= MAX_SIDE:
        raise InputError(f"the longer side is {side!r}; expected {MIN_SIDE} to {MAX_SIDE} pixels")
    rgb = open_picture(source, app.settings).rgb
    known = {one.name for one in catalogue.OTHERS if one.kind == "backbone"}
    if backbone in known and (lacking := catalogue.missing(backbone, model == "auto")):
        raise CheckpointError(lacking)
    network = app.shelf.backbone(backbone, job)
    net = app.shelf.features_model(backbone if model == "auto" else model, job)
    height, width = (max(1, round(n * side / max(rgb.shape[1:]))) for n in rgb.shape[1:])
    small = antialias(rgb[None], (height, width))[0].clamp(0, 1)
    folder = app.storage.new("picture.png").parent
    shown, large, tokens, pixels = (folder / n for n in ("picture.png", "large.png", "tokens.npy", "pixels.npy"))
    found = Walk(shown, large, tokens, pixels, backbone, model, int(side))
    write_picture(Picture(small), found.shown)
    with Image.open(found.shown) as image:
        enlarged, found.factor = _large(image, Image.Resampling.BICUBIC)
        enlarged.save(found.large, compress_level=1)
    start_peak(network.device)
    begun, maps, sizes = time.perf_counter(), [], []
    for scale in SCALES if steps else (1, "pixel"):
        job.say(f"Features, {'every pixel' if scale == 'pixel' else f'{scale}x the tokens'}")
        target = {1: found.tokens, "pixel": found.pixels}.get(scale)
        maps.append(dense_features(small, backbone=network, model=net, scale=scale, storage=target,
                                   progress=job.report, should_stop=job.should_stop))
        sizes.append([maps[-1].shape[2], maps[-1].shape[1]])
    found.facts = {"picture": [width, height], "channels": maps[0].shape[0], "sizes": sizes, "backbone": backbone,
                   "seconds": round(time.perf_counter() - begun, 2),
                   "peak_memory_mb": round(peak_memory(network.device) / 2**20)}
    if steps:
        job.say("Pictures of the features")
        for number, colours in enumerate(pca_pictures(maps)):
            path = folder / f"step_{number}.png"
            write_picture(Picture(_grown(colours, maps[number], (height, width))), path)
            found.steps.append(path)
    return found


def _grown(values: Tensor, features: DenseFeatures, size: tuple[int, int]) -> Tensor:
    """``c h w`` of features as ``c H W`` of their picture: each feature the square of pixels it covers."""
    import torch

    rows, columns = (((torch.arange(n) + 0.5) / features.stride).long().clamp_max(m - 1)
                     for n, m in zip(size, values.shape[-2:]))
    return values[..., rows, :][..., columns]


def similar(found: Walk, point: tuple[float, float]) -> tuple[Path, Path]:
    """Heat maps of what is like the point (x, y), by the backbone's features and by UPLiFT's."""
    from uplift_core.dense import load_features
    from uplift_core.features import similarity

    results = []
    for name, file in (("tokens", found.tokens), ("pixels", found.pixels)):
        features = load_features(file)
        likeness = _grown(similarity(features, [point], centre=True), features, features.image_size)
        results.append(_overlay(found, likeness, point, f"similar_{name}"))
    return results[0], results[1]


def _overlay(found: Walk, likeness: Tensor, point: tuple[float, float], name: str) -> Path:
    """Red where it is like the point, the gray picture elsewhere, and a ring at the point."""
    import numpy as np
    from PIL import Image

    with Image.open(found.shown) as image:
        gray = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * 0.55
    heat = likeness.clamp(0, 1).numpy()[..., None]
    ramp = np.array([[30, 30, 70], [150, 40, 110], [235, 90, 60], [250, 190, 60], [255, 250, 200]], np.float32)
    place = heat[..., 0] * (len(ramp) - 1)
    low = place.astype(int).clip(0, len(ramp) - 2)
    colour = ramp[low] + (ramp[low + 1] - ramp[low]) * (place - low)[..., None]
    mixed = gray + (colour - gray) * np.sqrt(heat) * 0.9
    drawn, factor = _large(Image.fromarray(mixed.clip(0, 255).astype(np.uint8)))
    _ring(drawn, (point[0] * factor, point[1] * factor), "#ffffff")
    path = found.shown.with_name(f"{name}_{point[0]:.0f}_{point[1]:.0f}.png")
    drawn.save(path, compress_level=1)
    return path


def _large(image: Any, method: int = 0) -> tuple[Any, int]:
    """The picture some whole times as large, enough to draw marks into; by squares unless told otherwise."""
    factor = max(1, round(LARGE / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), method), factor


def _ring(image: Any, point: tuple[float, float], colour: str, text: str = "") -> None:
    from PIL import ImageDraw, ImageFont

    r = 9
    draw, (x, y) = ImageDraw.Draw(image), point
    draw.ellipse([x - r - 2, y - r - 2, x + r + 2, y + r + 2], outline="#000000", width=2)
    draw.ellipse([x - r, y - r, x + r, y + r], outline=colour, width=3)
    if text:
        draw.text((x + r + 3, y - r - 2), text, fill="#ffffff", font=ImageFont.load_default(18), stroke_width=2,
                  stroke_fill="#000000")


def parts(found: Walk, count: float, seed: int = 0) -> list[tuple[Any, str]]:
    """k-means of the pixels' features as masks ``H W`` (0 or 1, NumPy) with their names, the largest first."""
    from uplift_core.dense import load_features
    from uplift_core.errors import InputError
    from uplift_core.features import segment_masks, segments

    if isinstance(count, bool) or not 2 <= count <= MAX_SEGMENTS:
        raise InputError(f"K is {count!r}; expected 2 to {MAX_SEGMENTS}")
    features = load_features(found.pixels)
    masks = segment_masks(segments(features, int(count), seed=seed, clean=1), features.image_size)
    return [(mask.numpy(), f"{i + 1}: {100 * float(mask.mean()):.0f} %") for i, mask in enumerate(masks)]


def match(first: Walk, second: Walk, points: list[tuple[float, float]]) -> tuple[Path, list[list[Any]]]:
    """Both pictures side by side with the points and where they are found again; a line on each match."""
    from PIL import Image, ImageDraw

    from uplift_core.dense import load_features
    from uplift_core.features import correspondences

    matches = correspondences(load_features(first.pixels), load_features(second.pixels), points)
    with Image.open(first.shown) as image:
        a, by_a = _large(image)
    with Image.open(second.shown) as image:
        b, by_b = _large(image)
    shift = a.width + 16
    sheet = Image.new("RGB", (shift + b.width, max(a.height, b.height)), "#808080")
    sheet.paste(a, (0, 0))
    sheet.paste(b, (shift, 0))
    draw, rows = ImageDraw.Draw(sheet), []
    for i, (here, there) in enumerate(zip(points, matches.points)):
        colour = COLOURS[i % len(COLOURS)]
        ends = (here[0] * by_a, here[1] * by_a), (there[0] * by_b + shift, there[1] * by_b)
        draw.line([*ends[0], *ends[1]], fill=colour, width=2)
        for point in ends:
            _ring(sheet, point, colour, str(i + 1))
        rows.append([i + 1, f"{here[0]:.0f}, {here[1]:.0f}", f"{there[0]:.0f}, {there[1]:.0f}",
                     f"{float(matches.likeness[i]):.2f}", "yes" if bool(matches.mutual[i]) else "no"])
    path = second.shown.with_name("matches.png")
    sheet.save(path, compress_level=1)
    return path, rows


def grid(found: Walk, across: int = 4) -> list[tuple[float, float]]:
    """Points spread over the picture."""
    width, height = found.facts["picture"]
    return [((i + 0.5) * width / across, (j + 0.5) * height / 3) for j in range(3) for i in range(across)]
