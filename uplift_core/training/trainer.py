"""The training loop. Everything random follows from the seed and the step number, so that a run can be killed at any
time and goes on to the same result. Devices, precision and several processes are accelerate's."""

from __future__ import annotations

import logging
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..devices import DTYPES, choose_dtype
from ..errors import Cancelled, InputError, MissingExtra, UpliftError
from ..memory import parse_bytes
from ..version import __version__
from . import snapshots
from .log import Log, Mean, summary_writer
from .photos import Photos, Positions
from .recipe import Recipe
from .tasks import AutoencoderTask, CodecTask, UpliftTask, make_task

log = logging.getLogger(__name__)
_CURES = "lower optimizer.lr, set optimizer.clip, or use run.precision fp32 or bf16"


@dataclass(frozen=True)
class Progress:
    """What a listener hears after every step."""

    step: int
    steps: int
    loss: float
    images_per_second: float
    seconds_left: float


class Trainer:
    """One run: ``Trainer(recipe, data, out).run()``.

    out: gets ``log.csv``, ``previews/``, ``step-N/`` snapshots and at the end ``<recipe name>.safetensors``.
    teacher: a codec or backbone to use instead of the one the recipe names.
    """

    def __init__(self, recipe: Recipe, data: Path, out: Path, *, teacher: Any = None, cpu: bool = False,
                 tensorboard: bool = False):
        self.precision = _precision(recipe.run.precision, cpu)
        self.accelerator = _accelerator(self.precision, cpu)
        self.recipe, self.out = recipe, out
        self.device = self.accelerator.device
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        torch.manual_seed(recipe.run.seed)
        self.task: UpliftTask | CodecTask | AutoencoderTask = (
            make_task(recipe, self.device) if teacher is None else UpliftTask(recipe, self.device, teacher))
        self.photos = Photos(data, recipe.data, recipe.run.seed, parse_bytes(recipe.data.keep or None) or 0)
        self.tensorboard = tensorboard
        if tensorboard:
            summary_writer()
        self.broken: dict[str, None] = {}
        self._mean = Mean()
        self.ema: dict[str, Tensor] = {}

    @property
    def steps(self) -> int:
        run = self.recipe.run
        if run.steps:
            return run.steps
        return max(1, math.ceil(run.epochs * len(self.photos) / (self.recipe.data.batch * self.world)))

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self, *, resume: bool = False, progress: Callable[[Progress], None] | None = None,
            should_stop: Callable[[], bool] | None = None) -> Path:
        """Train to the end; returns the weights file. Raises InputError, CheckpointError, Cancelled.

        should_stop: asked before every step. Of several processes either all have it or none; one that says yes stops
        all of them. However it ends, pictures that could not be read are counted in the log.
        """
        try:
            return self._run(resume, progress, should_stop)
        finally:
            if self.broken and self.accelerator.is_main_process:
                log.warning("%d picture%s could not be read, skipped; the first: %s", len(self.broken),
                            "s" * (len(self.broken) > 1), next(iter(self.broken)))

    def _run(self, resume: bool, progress: Callable[[Progress], None] | None,
             should_stop: Callable[[], bool] | None) -> Path:
        last = self._last_snapshot(resume)
        first_step = 0
        notes: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        if last is not None:
            notes, tensors = snapshots.read(last)
            self._check_same_recipe(notes, last)
            first_step = int(notes["step"])
            if first_step > self.steps:
                raise InputError(f"{last} is at step {first_step} already and the run is to end at {self.steps}: raise "
                                 "run.steps (or run.epochs), or use another --out")
            if first_step == self.steps and self.accelerator.is_main_process:
                log.warning("%s is the last step already: raise run.steps to go on from there", last)
            if notes.get("pictures") == self._pictures():
                self.broken.update(dict.fromkeys(notes.get("broken", ())))
            self._mean = Mean(*notes.get("mean", ()))
            self.task.load(last / snapshots.WEIGHTS)
        else:
            self.task.prepare(self._first_images)
        network = self.task.network
        if last is not None:
            network.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("weight.")})
        self.ema = {name: tensors.get(f"ema.{name}", value.detach().cpu().clone()).to(self.device)
                    for name, value in network.named_parameters() if value.requires_grad}
        self.task.objective.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = self.make_optimizer()
        if last is not None:
            snapshots.unpack_optimizer(optimizer, tensors, notes["optimizer"])
        objective, optimizer = self.accelerator.prepare(self.task.objective, optimizer)
        if last is not None and self.accelerator.scaler is not None and notes.get("scaler"):
            self.accelerator.scaler.load_state_dict(notes["scaler"])
        self._loop(objective, optimizer, first_step, progress, should_stop)
        return self._finish()

    def _loop(self, objective: Any, optimizer: Any, first_step: int, progress: Callable[[Progress], None] | None,
              should_stop: Callable[[], bool] | None) -> None:
        run, network = self.recipe.run, self.task.network
        writer = Log(self.out, first_step, self.tensorboard) if self.accelerator.is_main_process else None
        positions = Positions(self.recipe.data.batch, first_step, self.steps, self.rank, self.world)
        workers = self.recipe.data.workers
        # A worker ends when its parent does, which in a fork server (Python 3.14's default) lives on after a kill.
        context = "fork" if workers and multiprocessing.get_start_method() == "forkserver" else None
        loader = DataLoader(self.photos, self.recipe.data.batch, sampler=positions, num_workers=workers,
                            drop_last=True, persistent_workers=False, pin_memory=self.device.type == "cuda",
                            multiprocessing_context=context)
        begun, counted = time.perf_counter(), 0
        try:
            for step, batch in enumerate(_batches(loader), first_step):
                if should_stop is not None and self._any(should_stop()):
                    self._save(optimizer, step)
                    raise Cancelled(f"stopped at step {step}; --resume goes on from here")
                self.broken.update(dict.fromkeys(line for text in batch["broken"] for line in text.splitlines()))
                rate = self._rate(step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                seed = (run.seed * 1_000_003 + step) * 4096 + self.rank
                loss = objective(*self.task.inputs(batch["image"], batch["key"], seed, self.device))
                optimizer.zero_grad()
                self.accelerator.backward(loss)
                norm = self._clip(network)
                optimizer.step()
                self._average(network, step)
                self._mean.add(loss.detach())
                counted += len(batch["image"]) * self.world
                done = step + 1
                speed = counted / (time.perf_counter() - begun)
                if progress is not None:
                    left = (self.steps - done) * (time.perf_counter() - begun) / (done - first_step)
                    progress(Progress(done, self.steps, float(loss.detach()), speed, left))
                if (run.log_every and done % run.log_every == 0) or done == self.steps:
                    mean = self._mean.take()
                    if not math.isfinite(mean):
                        raise InputError(f"the loss is {mean} at step {done}: {_CURES}")
                    if writer:
                        writer.row(done, mean, rate, norm, speed)
                if run.save_every and done % run.save_every == 0 and done < self.steps:
                    self._save(optimizer, done)
                if run.preview_every and done % run.preview_every == 0 and done < self.steps:
                    self._preview(done)
            self._save(optimizer, self.steps)
        finally:
            if writer:
                writer.close()

    def _finish(self) -> Path:
        path = self.out / f"{self.recipe.name}.safetensors"
        if self.accelerator.is_main_process:
            self.task.save(self._best_state(), path, self._metadata(self.steps))
            if self.recipe.run.preview_every:
                self._preview(self.steps)
        self.accelerator.wait_for_everyone()
        return path

    # -- parts -----------------------------------------------------------------------------------------------------

    def _last_snapshot(self, resume: bool) -> Path | None:
        there = snapshots.found(self.out)
        if there and not resume:
            raise InputError(f"{self.out} holds a run already (at {there[-1].name}); go on with --resume, or choose "
                             "another --out")
        if self.accelerator.is_main_process:
            if resume and not there:
                log.warning("%s holds no snapshot; starting from the beginning", self.out)
            if self.out.is_dir():
                snapshots.sweep(self.out)
        return there[-1] if there else None

    def _check_same_recipe(self, notes: dict[str, Any], snapshot: Path) -> None:
        theirs, ours = notes["recipe"], self.recipe.to_dict()
        for recipe, precision in ((theirs, notes.get("precision")), (ours, self.precision)):
            # of the run, what changes the numbers; its length may be changed
            recipe["run"] = {"seed": recipe["run"].get("seed"), "precision": precision or recipe["run"]["precision"]}
        for part in ("model", "teacher", "codec", "autoencoder", "data", "latents", "optimizer", "run", "loss",
                     "loss_floor"):
            if changed := _changed(_plain(theirs.get(part)), _plain(ours.get(part)), part):
                raise InputError(f"{snapshot} was made with another recipe: {changed}. Use the same recipe, with the "
                                 "same --set options, or another --out")
        if not self.accelerator.is_main_process:
            return
        if notes.get("processes", self.world) != self.world:
            log.warning("%s was made by %d processes, now there are %d: from here on other crops are seen", snapshot,
                        notes["processes"], self.world)
        theirs, ours = notes.get("pictures"), self._pictures()
        if theirs and theirs != ours:
            log.warning("%s was made with other pictures (%d, now %d in %s): from here on other crops are seen",
                        snapshot, theirs["count"], ours["count"], self.photos.folder)

    def _pictures(self) -> dict[str, Any]:
        return {"count": len(self.photos), "digest": self.photos.digest}

    def _any(self, asked: bool) -> bool:
        """Whether any process asks; each hears the same, or the others would wait for it for ever."""
        if self.world > 1:
            from accelerate.utils import gather_object

            return any(gather_object([asked]))
        return asked

    def _first_images(self) -> Iterator[Tensor]:
        batch = min(self.recipe.data.batch, 16)
        for start in range(0, self.task.measured_crops, batch):
            yield torch.stack([self.photos[i]["image"] for i in range(start, start + batch)])

    def make_optimizer(self) -> torch.optim.Optimizer:
        part = self.recipe.optimizer
        kind = torch.optim.AdamW if part.name == "adamw" else torch.optim.Adam
        trained = [p for p in self.task.objective.parameters() if p.requires_grad]
        return kind(trained, lr=part.lr, weight_decay=part.weight_decay)

    def _rate(self, step: int) -> float:
        part, steps = self.recipe.optimizer, self.steps
        rate = part.lr * min(1.0, (step + 1) / part.warmup) if part.warmup else part.lr
        falling = part.decay * steps
        return rate * min(1.0, (steps - step) / falling) if falling else rate

    def _clip(self, network: Any) -> float:
        clip = self.recipe.optimizer.clip
        if not clip:
            return 0.0
        norm = self.accelerator.clip_grad_norm_(network.parameters(), clip)
        return float(norm) if norm is not None else 0.0

    @torch.no_grad()
    def _average(self, network: Any, step: int) -> None:
        decay = min(self.recipe.optimizer.ema, (1 + step) / (10 + step))  # a short memory at the start
        if not self.recipe.optimizer.ema:
            return
        for name, value in network.named_parameters():
            if name in self.ema:
                self.ema[name].lerp_(value, 1 - decay)

    def _best_state(self) -> dict[str, Tensor]:
        """The averaged weights where there is an average, else the weights."""
        state = {name: value.detach().clone() for name, value in self.task.network.state_dict().items()}
        if self.recipe.optimizer.ema:
            state.update(self.ema)
        return state

    def _metadata(self, step: int) -> dict[str, str]:
        return {"trained_with": f"uplift {__version__}", "recipe": self.recipe.name, "step": str(step)}

    def _save(self, optimizer: Any, step: int) -> None:
        if self.world > 1:
            from accelerate.utils import gather_object

            self.broken = dict.fromkeys(gather_object(list(self.broken)))
        if self.accelerator.is_main_process:
            tensors, plain = snapshots.pack_optimizer(getattr(optimizer, "optimizer", optimizer))
            tensors |= {f"weight.{name}": value for name, value in self.task.network.state_dict().items()}
            tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
            if bad := next((name for name, value in tensors.items() if not value.isfinite().all()), ""):
                raise InputError(f"{bad} is not finite at step {step}, which is not saved: {_CURES}; --resume goes on "
                                 "from the last snapshot")
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
            notes = {"recipe": self.recipe.to_dict(), "optimizer": plain, "scaler": scaler, "precision": self.precision,
                     "processes": self.world, "pictures": self._pictures(), "broken": list(self.broken),
                     "mean": self._mean.state()}
            snapshots.write(self.out, step, lambda path: self.task.save(self._best_state(), path, self._metadata(step)),
                            tensors, notes, self.recipe.run.save_keep)
        self.accelerator.wait_for_everyone()

    def _preview(self, step: int) -> None:
        if not self.accelerator.is_main_process or not self.recipe.run.preview_photos:
            return
        images = torch.stack([self.photos[i]["image"] for i in range(self.recipe.run.preview_photos)])
        network = self.task.network
        own = {name: value.detach().clone() for name, value in network.state_dict().items()}
        try:
            network.load_state_dict(self._best_state())
            self.task.preview(network, images, self.out / "previews" / f"step-{step:08d}.png")
        except UpliftError as error:
            log.warning("no preview at step %d: %s", step, error)
        finally:
            network.load_state_dict(own)
            self.task.objective.train()


def _precision(asked: str, cpu: bool) -> str:
    """What "auto" means on the device of the run: bf16 or fp16 where it is quick, else fp32."""
    try:
        from accelerate import PartialState
    except ImportError:
        raise MissingExtra("accelerate", "train", "Training") from None
    device = PartialState(cpu=cpu).device
    if asked == "fp16" and device.type == "cpu":
        # Some versions of accelerate would go on in fp32 and say nothing.
        raise InputError("run.precision fp16 needs a GPU; use auto, fp32 or bf16")
    if asked != "auto":
        return asked
    return next(name for name in ("fp32", "fp16", "bf16") if DTYPES[name] == choose_dtype("auto", device))


def _accelerator(precision: str, cpu: bool) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    wanted = "no" if precision == "fp32" else precision
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()  # of a run before in this process; accelerate refuses another precision
    # The last step's noise and unused encoder maps may leave parameters without gradient.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    return Accelerator(mixed_precision=wanted, cpu=cpu, kwargs_handlers=handlers)


def _batches(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """An error out of a worker has the worker's traceback for a text; its last line is what we wrote."""
    try:
        yield from loader
    except UpliftError as error:
        if not loader.num_workers:
            raise
        raise type(error)(str(error).rstrip().rpartition("\n")[2].partition(": ")[2]) from None


def _changed(theirs: Any, ours: Any, where: str) -> str:
    """The first entry that differs, and both its values; empty if none does."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        entries = ((theirs.get(key), ours.get(key), f"{where}.{key}") for key in dict.fromkeys((*theirs, *ours)))
        return next(filter(None, (_changed(*entry) for entry in entries)), "")
    return f"{where} was {theirs!r} and is {ours!r}" if theirs != ours else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items() if key not in ("folder", "workers", "keep", "cache")}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
