"""The ``uplift`` command."""

from __future__ import annotations

import logging
import os
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from ..errors import UpliftError
from ..version import __version__
from .bench import bench
from .evaluate import evaluation
from .features import features
from .models import models
from .train import train, train_vae
from .upscale import upscale

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
                  help="UPLiFT: sharp 2x, 4x and 8x enlargement of pictures, guided by the picture itself.")
app.command()(upscale)
app.command()(features)
app.add_typer(bench, name="bench")
app.command()(train)
app.command("train-vae")(train_vae)
app.add_typer(models, name="models")
app.add_typer(evaluation, name="eval")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"uplift {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True,
                                          help="Show the version and stop.")) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s",
                        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)])

    # huggingface_hub prints its own warnings, and every retry twice beside ours; what failed stands in our error. It
    # sets its logger's level when it is imported, which is later.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def main() -> None:
    """Entry point: our own errors are one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except UpliftError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(1)


if __name__ == "__main__":
    main()
