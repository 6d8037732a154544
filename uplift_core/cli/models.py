"""``uplift models``: what there is, what a file holds, and fetching the published weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from .. import registry
from ..devices import choose_device
from ..errors import InputError

models = typer.Typer(no_args_is_help=True, help="List, inspect and download models.")


@models.command("list")
def list_models() -> None:
    """Known models, the files found on this machine, and where files are looked for."""
    out = Console()
    table = Table("name", "latent space", "size", box=None, pad_edge=False)
    table.add_column("where", overflow="fold")
    for entry in registry.installed():
        size = entry.path.stat().st_size if entry.path else (entry.known.size_bytes if entry.known else 0)
        table.add_row(entry.name, entry.known.latent_space if entry.known else "", f"{size / 1e6:.0f} MB",
                      entry.state if entry.path else "[dim]not downloaded: uplift models download " + entry.name)
    out.print(table)
    out.print("\nFolders searched:", *(f"  {folder}" for folder in registry.model_folders()), sep="\n",
              highlight=False, soft_wrap=True)
    out.print(f"Device chosen by default: {choose_device('auto')}", highlight=False)


@models.command()
def info(path: str = typer.Argument(help="A weights file or a known name."),
         as_json: bool = typer.Option(False, "--json", help="All of it, as JSON.")) -> None:
    """What a weights file holds."""
    found = registry.find(path)
    if found is None and path in registry.KNOWN and not Path(path).exists():
        raise InputError(f"{path} is not on this machine yet: uplift models download {path}")
    facts = registry.describe(found if found is not None else Path(path))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if name not in ("config", "metadata"):
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    Console(soft_wrap=True).print(table, highlight=False)


@models.command()
def download(name: str = typer.Argument(help="sd15-vae, dinov2-s14 or dinov3-splus16."),
             folder: Optional[Path] = typer.Option(None, help="Put the file there instead of the shared cache."),
             ) -> None:
    """Fetch published weights from the Hugging Face hub, resuming what was begun."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        path = registry.download(name, folder=folder,
                                 progress=lambda done, total: bar.update(task, completed=done, total=total))
    typer.echo(str(path))
