"""``uplift bench``: what each fast form brings on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

import typer
from rich.console import Console
from rich.table import Table

from .. import benchmark
from ..errors import InputError
from ..upscaling import parse_tile


def bench(model: str = typer.Option("sd15-vae", help="A published model, the bundled one or a weights file: its "
                                    "sizes are what counts, the weights are random."),
          sizes: str = typer.Option("128,192,256", help="Sides of the guide image, in pixels."),
          scale: int = typer.Option(2, help="2, 4, 8 or 16."),
          forms: str = typer.Option("plain,fast", help=f"Some of: {', '.join(benchmark.FORMS)}; or all."),
          tile: str = typer.Option("off", help="off, auto or a side in pixels, for the fast forms."),
          memory: Optional[str] = typer.Option(None, help="What tiles are to fit, such as 400MB; sets --tile auto."),
          device: str = typer.Option("auto"), dtype: str = typer.Option("auto"),
          threads: int = typer.Option(0, help="CPU threads; 0 leaves it to torch."),
          runs: int = typer.Option(1, min=1, help="Runs in each process; the median counts."),
          rounds: int = typer.Option(1, min=1, help="Processes for each case, the forms in turn; the median counts."),
          against: list[str] = typer.Option([], metavar="NAME=COMMAND", help="Another program to measure beside; "
                                            "{image} and {steps} are filled in; it prints JSON: seconds, peak, base."),
          out: Optional[Path] = typer.Option(None, "-o", help="Folder for bench.json and bench.png."),
          ) -> None:
    """Time and peak memory of the plain and the fast form, each size in its own process."""
    chosen = list(benchmark.FORMS) if forms == "all" else [f.strip() for f in forms.split(",")]
    side = parse_tile("auto" if memory else tile, 1)
    if scale < 2 or scale & (scale - 1):
        raise InputError(f"--scale is {scale}; expected 2, 4, 8 or 16")
    rows = benchmark.compare(model, chosen, _sides(sizes), scale.bit_length() - 1, tile=side,
                             memory=memory, device=device, dtype=dtype, threads=threads, runs=runs, rounds=rounds,
                             against=_named(against))
    first = rows[0].form
    table = Table("image", "tokens", "form", "seconds", "from..to", "peak MB", "of it before", "expected",
                  f"vs {first}", box=None, pad_edge=False)
    start = {row.image: row for row in rows if row.form == first}
    for row in rows:
        table.add_row(str(row.image), str(row.tokens), row.form, f"{row.seconds:.2f}",
                      f"{min(row.all_seconds):.2f}..{max(row.all_seconds):.2f}", f"{row.peak / 2**20:.0f}",
                      f"{row.base / 2**20:.0f}",
                      f"{(row.base + row.estimate) / 2**20:.0f}" if row.estimate else "",
                      f"{start[row.image].seconds / row.seconds:.2f}x")
    console = Console()
    console.print(table, highlight=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(json.dumps(benchmark.report(rows), indent=2) + "\n")
        benchmark.plot(rows, out / "bench.png")
        console.print(f"written to {out / 'bench.json'} and {out / 'bench.png'}", highlight=False, soft_wrap=True)


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
