"""``uplift bench``: what each fast form brings on this machine; ``uplift bench features``: UPLiFT beside its peers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import typer
from rich.console import Console
from rich.table import Table

from .. import benchmark, feature_benchmark
from ..benchmark import Measurement
from ..errors import InputError
from ..upscaling import parse_tile

bench = typer.Typer(invoke_without_command=True)

SIZES = typer.Option("128,192,256", help="Sides of the guide image, in pixels.")
MEMORY = typer.Option(None, help="What windows are to fit, such as 400MB; sets --tile auto.")
THREADS = typer.Option(0, help="CPU threads; 0 leaves it to torch.")
ROUNDS = typer.Option(1, min=1, help="Processes for each case, in turns; the median counts.")
OUT = typer.Option(None, "-o", help="Folder for bench.json and bench.png.")


@bench.callback()
def compare_forms(context: typer.Context,
                  model: str = typer.Option("sd15-vae", help="A published model, the bundled one or a weights file: "
                                            "its sizes are what counts, the weights are random."),
                  sizes: str = SIZES,
                  scale: int = typer.Option(2, help="2, 4, 8 or 16."),
                  forms: str = typer.Option("plain,fast", help=f"Some of: {', '.join(benchmark.FORMS)}; or all."),
                  tile: str = typer.Option("off", help="off, auto or a side in pixels, for the fast forms."),
                  memory: Optional[str] = MEMORY,
                  device: str = typer.Option("auto"), dtype: str = typer.Option("auto"), threads: int = THREADS,
                  runs: int = typer.Option(1, min=1, help="Runs in each process; the median counts."),
                  rounds: int = ROUNDS,
                  against: list[str] = typer.Option([], metavar="NAME=COMMAND", help="Another program to measure "
                                                    "beside; {image} and {steps} are filled in; it prints JSON: "
                                                    "seconds, peak, base."),
                  out: Optional[Path] = OUT) -> None:
    """Time and peak memory of the plain and the fast form, each size in its own process."""
    if context.invoked_subcommand is not None:
        return
    chosen = list(benchmark.FORMS) if forms == "all" else _words(forms)
    side = parse_tile("auto" if memory else tile, 1)
    if scale < 2 or scale & (scale - 1):
        raise InputError(f"--scale is {scale}; expected 2, 4, 8 or 16")
    rows = benchmark.compare(model, chosen, _sides(sizes), scale.bit_length() - 1, tile=side,
                             memory=memory, device=device, dtype=dtype, threads=threads, runs=runs, rounds=rounds,
                             against=_named(against))
    expected = {id(row): f"{(row.base + row.estimate) / 2**20:.0f}" for row in rows if row.estimate}
    _show(rows, out, "form", {"expected": expected})


@bench.command("features")
def compare_methods(methods: str = typer.Option("all", help=f"Some of: {', '.join(feature_benchmark.METHODS)}; all: "
                                                "those that are on this machine."),
                    sizes: str = typer.Option("224,448", help="Sides of the picture, in pixels."),
                    channels: int = typer.Option(384, min=1), patch: int = typer.Option(16, min=2),
                    tile: str = typer.Option("auto", help="off, auto or a side in pixels."),
                    memory: Optional[str] = MEMORY,
                    stored: bool = typer.Option(False, "--stored", help="Windows go to a temporary file (TMPDIR), "
                                                "2 bytes a number, not to memory."),
                    use: bool = typer.Option(False, "--use", help="Also a PCA picture, a likeness and five segments."),
                    device: str = typer.Option("auto"), threads: int = THREADS, rounds: int = ROUNDS,
                    out: Optional[Path] = OUT) -> None:
    """One feature for every pixel: UPLiFT beside interpolation, joint bilateral and networks of others.

    Features and weights are random numbers; no backbone is in the figures.
    """
    chosen = feature_benchmark.available() if methods == "all" else _words(methods)
    rows = feature_benchmark.compare(chosen, _sides(sizes), rounds=rounds, channels=channels, patch=patch,
                                     tile=parse_tile("auto" if memory else tile, 1), memory=memory, device=device,
                                     threads=threads, stored=stored, use=use)
    more = {"use, seconds": {id(row): _short(row.use_seconds) for row in rows},
            "use, peak MB": {id(row): f"{row.use_peak / 2**20:.0f}" for row in rows}} if use else {}
    _show(rows, out, "method", more)


def _show(rows: Sequence[Measurement], out: Path | None, kind: str, more: dict[str, dict[int, str]]) -> None:
    """The table; bench.json and bench.png in ``out``. more: further columns, by row."""
    first = rows[0].form
    table = Table("image", "tokens", kind, "seconds", "from..to", "peak MB", "of it before", *more, f"vs {first}",
                  box=None, pad_edge=False)
    start = {row.image: row for row in rows if row.form == first}
    for row in rows:
        table.add_row(str(row.image), str(row.tokens), row.form, _short(row.seconds),
                      f"{_short(min(row.all_seconds))}..{_short(max(row.all_seconds))}", f"{row.peak / 2**20:.0f}",
                      f"{row.base / 2**20:.0f}", *(column.get(id(row), "") for column in more.values()),
                      f"{start[row.image].seconds / row.seconds:.2f}x")
    console = Console()
    console.print(table, highlight=False)
    for form in dict.fromkeys(row.form for row in rows):
        grows = benchmark.slope([row for row in rows if row.form == form])
        if grows is not None:
            console.print(f"{form}: seconds grow with tokens to the power of {grows:.2f}", highlight=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(json.dumps(benchmark.report(rows), indent=2) + "\n")
        benchmark.plot(rows, out / "bench.png")
        console.print(f"written to {out / 'bench.json'} and {out / 'bench.png'}", highlight=False, soft_wrap=True)


def _short(seconds: float) -> str:
    """Three digits, of a fraction of a second too: a graphics device's."""
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3g}"


def _words(words: str) -> list[str]:
    return [word.strip() for word in words.split(",")]


def _sides(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise InputError(f"--sizes is {words!r}; expected sides in pixels, such as 128,256") from None


def _named(words: list[str]) -> dict[str, str]:
    named = {}
    for word in words:
        name, sign, command = word.partition("=")
        if not sign or not name or not command:
            raise InputError(f"--against {word}: expected NAME=COMMAND")
        named[name] = command
    return named
