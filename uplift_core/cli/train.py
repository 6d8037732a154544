"""``uplift train`` and ``uplift train-vae``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import Cancelled, ConfigError, InputError, MissingExtra

_RECIPE = typer.Argument(metavar="CONFIG", help="A recipe file (YAML) or the name of one that comes with uplift.")
_DATA = typer.Option(None, "--data", help="Folder of pictures, searched recursively; default: the recipe's "
                     "data.folder.")
_OUT = typer.Option(None, "-o", "--out", help="Folder of the run; default: runs/NAME.")
_RESUME = typer.Option(False, "--resume", help="Go on from the last snapshot in the folder of the run.")
_DRY = typer.Option(False, "--dry-run", help="Show parameters, memory, steps and time; write nothing.")
_SET = typer.Option([], "--set", metavar="ENTRY=VALUE", help="Change an entry of the recipe, like run.steps=500. Again "
                    "for more.")
_CPU = typer.Option(False, "--cpu", help="Train on the CPU even if there is a GPU.")
_THREADS = typer.Option(0, "--threads", help="CPU threads; 0 leaves it to torch.")
_BOARD = typer.Option(False, "--tensorboard", help="Write TensorBoard logs beside log.csv.")


def train(config: str = _RECIPE, data: Optional[Path] = _DATA, out: Optional[Path] = _OUT, resume: bool = _RESUME,
          dry_run: bool = _DRY, changes: list[str] = _SET, cpu: bool = _CPU, threads: int = _THREADS,
          tensorboard: bool = _BOARD) -> None:
    """Train an UPLiFT for a VAE's latents or a backbone's features. For several GPUs: accelerate launch -m
    uplift_core.cli train CONFIG ..."""
    _run(config, data, out, resume, dry_run, changes, cpu, threads, tensorboard, codec=False)


def train_vae(config: str = typer.Argument("tiny-vae", metavar="[CONFIG]", help="A recipe file or name."),
              data: Optional[Path] = _DATA, out: Optional[Path] = _OUT, resume: bool = _RESUME, dry_run: bool = _DRY,
              changes: list[str] = _SET, cpu: bool = _CPU, threads: int = _THREADS, tensorboard: bool = _BOARD) -> None:
    """Train a codec of pictures to latents: the tiny one, or diffusers' AutoencoderTiny (autoencoder-tiny)."""
    _run(config, data, out, resume, dry_run, changes, cpu, threads, tensorboard, codec=True)


def _run(config: str, data: Path | None, out: Path | None, resume: bool, dry_run: bool, changes: list[str], cpu: bool,
         threads: int, tensorboard: bool, codec: bool) -> None:
    import torch

    from ..training import Trainer, load_recipe
    from ..training.plan import make_plan

    recipe = load_recipe(config, _changes(changes))
    if recipe.is_codec != codec:
        kind, command = ("a codec", "train-vae") if recipe.is_codec else ("an UPLiFT", "train")
        raise ConfigError(f"{config} is a recipe for {kind}; use uplift {command}")
    if data is None and not recipe.data.folder:
        raise InputError("name a folder of pictures with --data, or in the recipe as data.folder")
    if threads:
        torch.set_num_threads(threads)
    folder = out or Path("runs") / recipe.name
    data = data or Path(recipe.data.folder).expanduser()
    trainer = Trainer(recipe, data, folder, cpu=cpu, tensorboard=tensorboard)
    console = Console(stderr=True)
    if dry_run:
        _show(make_plan(trainer), trainer.device)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left {task.fields[left]}"))
    try:
        with Progress(*columns, console=console, disable=not trainer.accelerator.is_main_process) as bar:
            task = bar.add_task(recipe.name, total=trainer.steps, left="?")
            path = trainer.run(resume=resume, progress=lambda p: bar.update(
                task, completed=p.step, left=_time(p.seconds_left),
                description=f"{recipe.name}  loss {p.loss:.4g}  {p.images_per_second:.1f} images/s"))
    except KeyboardInterrupt:
        console.print(f"[yellow]stopped[/]; go on with: uplift {'train-vae' if codec else 'train'} {escape(config)} "
                      f"--data {escape(str(data))} --out {escape(str(folder))} --resume")
        raise typer.Exit(130) from None
    except Cancelled as stop:
        console.print(str(stop))
        raise typer.Exit(130) from None
    if trainer.accelerator.is_main_process:
        Console().print(f"written to {escape(str(path))}", highlight=False)


def _changes(words: list[str]) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise MissingExtra("pyyaml", "train", "Training") from None
    changes = {}
    for word in words:
        entry, sign, value = word.partition("=")
        if not sign:
            raise InputError(f"--set {word}: expected ENTRY=VALUE, such as run.steps=500")
        try:
            changes[entry] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {word}: the value is not readable as YAML") from None
    return changes


def _show(plan: Any, device: Any) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in plan.description.items():
        table.add_row(name, escape(value))
    table.add_row("trained parameters", f"{plan.parameters:,}")
    table.add_row("pictures", f"{plan.pictures:,}")
    table.add_row("steps", f"{plan.steps:,}")
    table.add_row("time per step", f"{plan.seconds_per_step:.2f} s on {device} (measured), in all "
                  f"{_time(plan.seconds)}")
    table.add_row("memory", f"{plan.memory_bytes / 2**30:.2f} GB (measured peak)")
    Console().print(table, highlight=False)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
