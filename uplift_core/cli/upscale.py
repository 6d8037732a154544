"""``uplift upscale``: pictures and folders in, larger pictures out."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import InputError, UpliftError
from ..imageio import MAX_PIXELS, WRITABLE, check_output, find_pictures, output_format, read_picture
from ..imageio import write_picture as write
from ..loading import load
from ..measure import peak_memory, start_peak
from ..memory import parse_bytes
from ..pictures import upscale_picture
from ..registry import lookup
from ..upscaling import check_options, parse_tile, pins_pixels
from ..vae import load_vae
from ..version import __version__
from .pairs import check_spaces, choose_model, vae_for


@dataclass
class Row:
    """A line of the summary."""

    source: Path
    target: Path | None
    size: str = ""
    seconds: float = 0.0
    peak: int = 0
    error: str = ""


def upscale(
    sources: list[Path] = typer.Argument(metavar="PHOTO|FOLDER...", help="Pictures, or folders of pictures."),
    out: Optional[Path] = typer.Option(None, "-o", "--out", help="A file (for one picture) or a folder; default: "
                                       "beside the source, as NAME_2x.png."),
    scale: float = typer.Option(2, help="Factor, above 1, up to 8."),
    model: str = typer.Option("auto", help="Known name or weights file; auto: sd15-vae if it is on this machine, else "
                              "the small bundled one."),
    vae: str = typer.Option("", help="VAE file, folder or name; default: the one the model was made for."),
    seed: int = typer.Option(0, help="Same seed, same picture."),
    noise: float = typer.Option(1.0, min=0.0, max=2.0, help="Strength of the noise the model reads."),
    tile: str = typer.Option("auto", help="auto, off, or a side in pixels."),
    memory: str = typer.Option("", help="Working memory, like 4GB; default: most of what is free."),
    color_fix: str = typer.Option("mean", help="none, mean, adain or wavelet."),
    consistency: Optional[bool] = typer.Option(None, "--consistency/--no-consistency", help="Pin the result to the "
                                               "pixels given (back-projection); default: with the bundled model, "
                                               "and others of its VAE."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1, xpu, mps."),
    dtype: str = typer.Option("auto", help="auto, fp32, fp16, bf16."),
    quality: int = typer.Option(95, min=1, max=100, help="Of JPEG and WebP."),
    overwrite: bool = typer.Option(False, help="Replace files that exist."),
    offline: bool = typer.Option(False, help="Never download."),
    threads: int = typer.Option(0, min=0, help="CPU threads; 0 leaves it to torch."),
    max_pixels: int = typer.Option(MAX_PIXELS, help="Refuse larger pictures unread."),
) -> None:
    """Enlarge pictures. Existing files are kept unless --overwrite is given; the settings go into the new files."""
    console = Console(stderr=True)
    check_options(scale, color_fix)
    if threads:
        torch.set_num_threads(threads)
    budget = parse_bytes(memory or None)
    parse_tile(tile, 1)
    found = find_pictures(sources, out)
    again = 0
    if out is None:
        found, again = _without_results(found, sources)
    jobs = _targets(found, out, scale)
    named, reason = choose_model(model, vae, console)
    if again:
        console.print(f"[yellow]note:[/] left out {again} results of an earlier run (NAME_2x); name one to enlarge it "
                      "again", highlight=False)
    net = load(named, device=device, dtype=dtype, offline=offline or None)
    parameter = next(net.parameters())
    codec = load_vae(vae_for(net.config.latent_space, vae, reason), device=parameter.device, dtype=parameter.dtype,
                     offline=offline or None)
    check_spaces(net.config.latent_space, codec.latent_space, reason)
    if consistency is None:
        consistency = pins_pixels(net)
        if consistency and (lookup(named) is None or Path(named).is_file()):
            console.print("[yellow]note:[/] results are pinned to the pixels given, as for the bundled model; not so "
                          "with --no-consistency", highlight=False)
    settings = {"version": __version__, "model": named, "vae": vae or net.config.latent_space, "scale": scale,
                "seed": seed, "noise": noise, "color_fix": color_fix, "consistency": consistency,
                "dtype": str(parameter.dtype).removeprefix("torch.")}
    options = {"scale": scale, "seed": seed, "noise_strength": noise, "tile": tile, "memory_budget": budget,
               "color_fix": color_fix, "consistency": consistency}
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stopped = False
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            overall = bar.add_task("pictures", total=len(jobs), visible=len(jobs) > 1)
            tiles = bar.add_task("", total=None)
            for source, target, problem in jobs:
                bar.update(tiles, description=escape(source.name), completed=0, total=None)
                rows.append(Row(source, target, error=problem) if problem else
                            _one(source, target, net, codec, options, settings, quality, overwrite, max_pixels, bar,
                                 tiles))
                bar.advance(overall)
    except KeyboardInterrupt:
        stopped = True
    _summary(rows, parameter.device)
    if stopped:
        console.print(f"[yellow]stopped[/]: {sum(not r.error for r in rows)} of {len(jobs)} pictures are finished")
        raise typer.Exit(130)
    if any(row.error for row in rows):
        raise typer.Exit(1)


_RESULT = re.compile(r"(.+)_\d+(\.\d+)?x")


def _without_results(found: list[tuple[Path, Path]], named: list[Path]) -> tuple[list[tuple[Path, Path]], int]:
    """Without what an earlier run has put beside the pictures of a folder, and how many those are. ``named``: by the
    user."""
    stems = {source.parent / source.stem for source, _ in found}
    kept = []
    for source, name in found:
        match = _RESULT.fullmatch(source.stem)
        if source in named or match is None or source.parent / match[1] not in stems:
            kept.append((source, name))
    return kept, len(found) - len(kept)


def _targets(found: list[tuple[Path, Path]], out: Path | None, scale: float) -> list[tuple[Path, Path, str]]:
    """Where each picture goes, and why it cannot. A single picture may be given a file name; folders keep their names.

    A picture of a kind that is not written becomes a PNG; beside another picture of its name it is called NAME_tif.png.
    """
    if out is not None and out.suffix.lower() in WRITABLE and not out.is_dir():
        if len(found) > 1:
            raise InputError(f"{out} is one file, but there are {len(found)} pictures; give a folder")
        return [(found[0][0], out, "")]
    if out is not None and out.suffix and not out.exists() and len(found) == 1 and found[0][1].parent == Path():
        output_format(out)  # a file was meant, of a kind that cannot be written

    def target(source: Path, name: Path, more: str, suffix: str) -> Path:
        if out:
            return out / name.with_name(f"{name.stem}{more}{suffix}")
        return source.with_name(f"{source.stem}{more}_{scale:g}x{suffix}")

    own = {target(source, name, "", source.suffix) for source, name in found if source.suffix.lower() in WRITABLE}
    jobs, taken = [], dict[Path, Path]()
    for source, name in found:
        kept = source.suffix.lower() in WRITABLE
        place = target(source, name, "", source.suffix if kept else ".png")
        if not kept and (place in own or place in taken):
            place = target(source, name, f"_{source.suffix[1:]}", ".png")
        problem = ""
        if place in taken:
            problem = f"{taken[place]} is written to {place} already; run this one with another -o"
        taken.setdefault(place, source)
        jobs.append((source, place, problem))
    return jobs


def _one(source: Path, target: Path, net: Any, codec: Any, options: dict[str, Any], settings: dict[str, Any],
         quality: int, overwrite: bool, max_pixels: int, bar: Progress, tiles: TaskID) -> Row:
    row = Row(source, target)
    device = next(net.parameters()).device
    start_peak(device)
    begun = time.perf_counter()
    try:
        if target.resolve() == source.resolve():
            raise InputError(f"{source}: the result would replace the picture itself; choose another -o")
        picture = read_picture(source, max_pixels)
        size = [max(1, round(n * options["scale"])) for n in picture.rgb.shape[1:]]
        check_output(target, size[1], size[0], overwrite=overwrite)
        for note in picture.notes:
            bar.console.print(f"[yellow]{escape(source.name)}[/]: {escape(note)}")
        result = upscale_picture(net, codec, picture, **options,
                                 progress=lambda done, total: bar.update(tiles, completed=round(done, 1), total=total))
        write(result, target, settings=settings, quality=quality, overwrite=overwrite)
        row.size = f"{picture.rgb.shape[2]}x{picture.rgb.shape[1]} -> {size[1]}x{size[0]}"
    except UpliftError as error:
        row.error = str(error)
    except OSError as error:
        row.error = f"{target}: cannot be written ({error.strerror or error})"
    row.seconds, row.peak = time.perf_counter() - begun, peak_memory(device)
    return row


def _summary(rows: list[Row], device: torch.device) -> None:
    table = Table("picture", "size", "seconds", f"peak MB, {device.type}", box=None, pad_edge=False)
    table.add_column("written to", overflow="fold")  # a path is there to be copied
    for row in rows:
        if row.error:
            table.add_row(escape(row.source.name), "[red]failed", f"{row.seconds:.1f}", "", f"[red]{escape(row.error)}")
        else:
            table.add_row(escape(row.source.name), row.size, f"{row.seconds:.1f}", f"{row.peak / 2**20:.0f}",
                          escape(str(row.target)))
    Console().print(table, highlight=False)
