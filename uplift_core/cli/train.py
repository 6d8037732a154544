"""``uplift train`` and ``uplift train-vae``."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import Cancelled, ConfigError, InputError, MissingExtra
from ..memory import free_memory

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
    uplift_core.cli train CONFIG ...; for two processes on a CPU: torchrun --nproc-per-node 2 -m uplift_core.cli train
    CONFIG --cpu ..."""
    _run(config, data, out, resume, dry_run, changes, cpu, threads, tensorboard, codec=False)


def train_vae(config: str = typer.Argument("tiny-vae", metavar="[CONFIG]", help="A recipe file or name."),
              data: Optional[Path] = _DATA, out: Optional[Path] = _OUT, resume: bool = _RESUME, dry_run: bool = _DRY,
              changes: list[str] = _SET, cpu: bool = _CPU, threads: int = _THREADS, tensorboard: bool = _BOARD) -> None:
    """Train a codec of pictures to latents: the tiny one, or diffusers' AutoencoderTiny (autoencoder-tiny)."""
    _run(config, data, out, resume, dry_run, changes, cpu, threads, tensorboard, codec=True)


def _run(config: str, data: Path | None, out: Path | None, resume: bool, dry_run: bool, changes: list[str], cpu: bool,
         threads: int, tensorboard: bool, codec: bool) -> None:
    import torch

    from ..training import Trainer, load_recipe, snapshots
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
        _show(trainer)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left {task.fields[left]}"))
    first = recipe.name
    if trainer.task.looks_first and not resume:
        first += f"  looking at {trainer.task.measured_crops:,} crops first"
    path: Path | None = None
    try:
        with (_first_ctrl_c(console, trainer.world) as asked,
              Progress(*columns, console=console, disable=not trainer.accelerator.is_main_process) as bar):
            task = bar.add_task(first, total=trainer.steps, left="?")
            path = trainer.run(resume=resume, should_stop=asked, progress=lambda p: bar.update(
                task, completed=p.step, left=_time(p.seconds_left),
                description=f"{recipe.name}  loss {p.loss:.4g}  {p.images_per_second:.1f} images/s"))
    except (KeyboardInterrupt, Cancelled):
        words = ["uplift", "train-vae" if codec else "train", config, "--data", str(data), "--out", str(folder)]
        words += [word for change in changes for word in ("--set", change)]
        words += ["--cpu"] * cpu + ["--threads", str(threads)] * bool(threads) + ["--tensorboard"] * tensorboard
        saved = snapshots.found(folder)
        said = (f"the last snapshot is {saved[-1].name}; go on with: {shlex.join([*words, '--resume'])}" if saved else
                f"before there was a snapshot; begin anew with: {shlex.join(words)}")
        if trainer.accelerator.is_main_process:
            console.print(f"[yellow]stopped[/]: {escape(said)}", soft_wrap=True, highlight=False)
        raise typer.Exit(130) from None
    if trainer.accelerator.is_main_process:
        Console().print(f"written to {escape(str(path))}", highlight=False, soft_wrap=True)


@contextmanager
def _first_ctrl_c(console: Console, processes: int) -> Iterator[Callable[[], bool] | None]:
    """Within, the first Ctrl-C asks the run to save and stop after its step, as the function that comes says; the
    second stops at once. Of several processes, which all would have to hear of it, every one does."""
    if processes > 1:
        yield None
        return
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        console.print("stopping after this step; Ctrl-C again stops at once", highlight=False)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


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


def _show(trainer: Any) -> None:
    """The plan, line by line as it gets known: what is counted before what is tried."""
    from ..training.plan import look, make_plan, try_steps

    console, device = Console(), trainer.device

    def tell(name: str, value: str) -> None:
        console.print(f"{name:<19} {escape(value)}", highlight=False, soft_wrap=True)

    plan = make_plan(trainer)
    for name, value in plan.description.items():
        tell(name, value)
    tell("trained parameters", f"{plan.parameters:,}")
    seen = look(trainer)
    of = "all" if seen.read == plan.pictures else f"{seen.read:,}"
    wrong = f"{len(seen.broken)} cannot be; the first: {seen.broken[0]}" if seen.broken else "all can be"
    tell("pictures", f"{plan.pictures:,} (of {of} read now, {wrong})")
    if len(seen.broken) == seen.read == plan.pictures:
        raise InputError(f"{trainer.photos.folder}: no picture in this folder can be read")
    first = f", after a look at {trainer.task.measured_crops:,} crops" if trainer.task.looks_first else ""
    tell("steps", f"{plan.steps:,}{first}")
    free = free_memory(device)
    tell("memory", f"about {_gb(plan.memory_bytes)} (estimated); {_gb(free)} free on {device}")
    if plan.more_bytes > free:
        tell("time per step", "not tried: it would not fit; lower data.batch or data.size")
        return
    trial = try_steps(trainer)
    tell("", f"{_gb(trial.memory_bytes)} (measured peak)")
    tell("time per step", f"{trial.seconds_per_step:.2f} s on {device} (measured), in all "
         f"{_time(plan.steps * trial.seconds_per_step)}")


def _gb(size: int) -> str:
    return f"{size / 2**30:.2f} GB"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
