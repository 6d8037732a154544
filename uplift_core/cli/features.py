"""``uplift features``: pixel-dense features of pictures, and pictures, masks and segments made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..backbones import load_backbone
from ..baselines import BASELINES
from ..dense import DenseFeatures, dense_features, model_for
from ..errors import InputError, UpliftError
from ..feature_files import FeatureFile
from ..features import feature_mask, fit_pca, segment_picture, segments, similarity
from ..imageio import MAX_PIXELS, Picture, check_output, find_pictures, read_picture, write_picture
from ..measure import peak_memory
from ..memory import parse_bytes
from ..upscaling import parse_tile


def features(
    sources: list[Path] = typer.Argument(metavar="IMAGE|FOLDER...", help="Pictures, or folders of pictures."),
    backbone: str = typer.Option("dinov3-splus16", help="dinov2-s14, dinov3-splus16, a timm name, or a weights file or "
                                 "folder called like one."),
    model: str = typer.Option("auto", help=f"UPLiFT weights, by name or file, or one of: {', '.join(BASELINES)}."),
    scale: str = typer.Option("pixel", help="1, 2, 4, 8 times the backbone's grid, or pixel."),
    resolution: int = typer.Option(0, min=0, help="Longer side to bring the picture to first; 0 leaves it."),
    save: Optional[Path] = typer.Option(None, help="Features to this .npy or .safetensors file."),
    pca: Optional[Path] = typer.Option(None, help="PCA picture to this file, in the same colours for all pictures."),
    similar: list[str] = typer.Option([], metavar="X,Y", help="Mask of what is like this pixel; may be repeated."),
    unlike: list[str] = typer.Option([], metavar="X,Y", help="... and not like this one; may be repeated."),
    mask: Optional[Path] = typer.Option(None, help="Where the mask goes; default: IMAGE_mask.png."),
    threshold: float = typer.Option(0.5, min=-1, max=1, help="Likeness from which the mask is on."),
    softness: float = typer.Option(0.1, min=0, help="Width of the mask's ramp."),
    segment: int = typer.Option(0, "--segments", min=0, help="Number of segments, drawn to IMAGE_segments.png."),
    segments_out: Optional[Path] = typer.Option(None, help="Where the segments go."),
    clean: int = typer.Option(1, min=0, help="Radius of the vote that removes specks from segments."),
    seed: int = typer.Option(0, help="Of the segments."),
    tile: str = typer.Option("auto", help="auto, off, or a side in pixels."),
    memory: str = typer.Option("", help="Working memory, like 4GB; default: most of what is free."),
    dtype: str = typer.Option("fp16", help="fp16 or fp32, of the features kept."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1, xpu, mps."),
    random_weights: bool = typer.Option(False, hidden=True, help="No weights at all: for trying out and measuring."),
    overwrite: bool = typer.Option(False, help="Replace files that exist."),
    offline: bool = typer.Option(False, help="Never download."),
    max_pixels: int = typer.Option(MAX_PIXELS, help="Refuse larger pictures unread."),
) -> None:
    """Features for every pixel. With several pictures the name of each goes before the name of its files."""
    console = Console(stderr=True)
    parse_tile(tile, 1)
    budget = parse_bytes(memory or None)
    if not (save or pca or similar or segment):
        raise InputError("nothing to make: give --save, --pca, --similar or --segments")
    if unlike and not similar:
        raise InputError("--unlike takes something away from --similar; give that too")
    if scale != "pixel" and scale not in ("1", "2", "4", "8"):
        raise InputError(f"--scale {scale}: expected 1, 2, 4, 8 or pixel")
    if dtype not in ("fp16", "fp32"):
        raise InputError(f"--dtype {dtype}: expected fp16 or fp32")
    wanted, unwanted = [_point(p) for p in similar], [_point(p) for p in unlike]
    pictures = [source for source, _ in find_pictures(sources)]
    several = len(pictures) > 1
    jobs = []
    for source in pictures:
        made = {"save": _named(save, source, several), "pca": _named(pca, source, several),
                "mask": _named(mask or source.with_name("mask.png"), source, several or mask is None)
                if similar else None,
                "segments": _named(segments_out or source.with_name("segments.png"), source,
                                   several or segments_out is None) if segment else None}
        for kind, target in made.items():
            if target and kind == "save":
                FeatureFile.check(target, overwrite)
            elif target:
                check_output(target, 1, 1, overwrite=overwrite)
        jobs.append((source, made))
    targets = [t.resolve() for _, made in jobs for t in made.values() if t]
    if len(set(targets)) < len(targets) or set(targets) & {p.resolve() for p in pictures}:
        raise InputError("two results would go to the same file, or one over a picture; give other names")

    network = load_backbone(backbone, device=device, offline=offline or None, pretrained=not random_weights)
    net: Any = model
    if scale != "1" and model.lower() not in BASELINES:
        net = _random(network) if random_weights else model_for(network, model, offline or None)[0]
    done: list[tuple[Path, DenseFeatures]] = []
    failed: list[tuple[Path, str]] = []
    table = Table("picture", "features", "method", box=None, pad_edge=False)
    table.add_column("written to", overflow="fold")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        for source, made in jobs:
            task = bar.add_task(escape(source.name), total=None)

            def tick(n: float, total: int, task: Any = task) -> None:
                bar.update(task, completed=n, total=total)

            try:
                picture = read_picture(source, max_pixels)
                for note in picture.notes:
                    console.print(f"[yellow]{escape(source.name)}[/]: {escape(note)}")
                found = dense_features(picture.rgb, backbone=network, model=net,
                                       scale=scale if scale == "pixel" else int(scale), resolution=resolution or None,
                                       tile=tile, memory_budget=budget, storage=made["save"], overwrite=overwrite,
                                       dtype=torch.float16 if dtype == "fp16" else torch.float32, progress=tick,
                                       offline=offline or None)
                size = (picture.rgb.shape[1], picture.rgb.shape[2])
                factor = found.image_size[1] / size[1]
                if made["mask"]:
                    near = similarity(found, [(x * factor, y * factor) for x, y in wanted],
                                      [(x * factor, y * factor) for x, y in unwanted])
                    shown = feature_mask(near, size, threshold=threshold, softness=softness)
                    write_picture(Picture(shown.expand(3, -1, -1), gray=True), made["mask"], overwrite=overwrite)
                if made["segments"]:
                    labels = segments(found, segment, seed=seed, clean=clean)
                    write_picture(Picture(segment_picture(labels, size)), made["segments"], overwrite=overwrite)
                done.append((source, found))
                table.add_row(escape(source.name), "x".join(map(str, found.shape)), found.method,
                              escape(", ".join(str(t) for t in made.values() if t)))
            except UpliftError as error:
                failed.append((source, str(error)))
                table.add_row(escape(source.name), "[red]failed", "", f"[red]{escape(str(error))}")
            bar.remove_task(task)
    if pca and done:
        fitted = fit_pca([found for _, found in done])
        targets_by = {source: made["pca"] for source, made in jobs}
        for source, found in done:
            write_picture(Picture(fitted.picture(found)), targets_by[source], overwrite=overwrite)  # type: ignore
    out = Console()
    out.print(table, highlight=False)
    out.print(f"peak memory {peak_memory(network.device) / 2**20:.0f} MB on {network.device}", highlight=False)
    if failed:
        raise typer.Exit(1)


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(n) for n in text.split(","))
    except ValueError:
        raise InputError(f"{text!r} is no point; expected X,Y in pixels, like 120,80") from None
    return x, y


def _named(path: Path | None, source: Path, several: bool) -> Path | None:
    """The file of one picture: with several, the picture's name goes before it."""
    return path.with_name(f"{source.stem}_{path.name}") if path and several else path


def _random(network: Any) -> Any:
    from dataclasses import replace

    from ..config import PRESETS
    from ..model import UPLiFT

    torch.manual_seed(0)
    base = PRESETS["dinov2-s14" if network.patch == 14 else "dinov3-splus16"]
    net = UPLiFT(replace(base, channels=network.channels, patch=network.patch))
    return net.eval().requires_grad_(False).to(network.device)
