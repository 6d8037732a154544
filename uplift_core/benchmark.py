"""Time and peak memory of the plain and the fast form, over sizes, each measurement in a process of its own."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .config import PRESETS, ModelConfig
from .devices import choose_device, choose_dtype
from .errors import InputError
from .forms import fast_forms
from .loading import load
from .measure import peak_memory
from .memory import parse_bytes
from .model import UPLiFT
from .noise import SeededNoise
from .tiling import Job, choose_tile, estimate_memory, run

FORMS: dict[str, dict[str, bool]] = {
    "plain": {},
    "fast": {},
    "no channels_last": {"channels_last": False, "winograd": False},
    "no winograd": {"winograd": False},
    "no sampled encoder": {"sampled_encoder": False},
    "no folded norm": {"fold_batch_norm": False},
    "no block attender": {"block_attender": False},
    "compiled": {"compiled": True},
}
"""What can be measured: the definition, all shortcuts, all but one, and all with torch.compile."""


@dataclass
class Measurement:
    """One row: a model run in fresh processes, medians over the rounds. ``base``: bytes before the run (program and
    weights); ``estimate``: what the plan expected beyond it (0 for other forms and programs); ``all_seconds``: of each
    round."""

    model: str
    form: str
    image: int
    steps: int
    tokens: int
    seconds: float
    peak: int
    base: int
    estimate: int = 0
    all_seconds: list[float] = field(default_factory=list)


def measure(model: str, form: str, image: int, steps: int, *, device: str = "auto", dtype: str = "auto",
            threads: int = 0, tile: str | int | None = None, memory: str | None = None, runs: int = 1) -> Measurement:
    """Run one case in this process, with random weights (time and memory do not depend on them).

    tile: None, a side in pixels, or "auto" to fit ``memory``.
    """
    if threads:
        torch.set_num_threads(threads)
    where = choose_device(device)
    config = _config(model)
    torch.manual_seed(0)
    with torch.no_grad():
        net = UPLiFT(config).eval().requires_grad_(False).to(where, choose_dtype(dtype, where))
        side = image // config.patch
        picture = torch.rand(1, 3, side * config.patch, side * config.patch)
        latent = torch.randn(1, config.channels, side, side)
        base = peak_memory(where)
        times: list[float] = []
        job = Job(net, picture.to(where), latent.to(where), steps, SeededNoise(0))
        with fast_forms(**FORMS[form]):
            chosen: int | None = choose_tile(job, parse_bytes(memory)) if tile == "auto" else tile  # type: ignore
            if where.type != "cpu":  # the first run loads and chooses kernels
                _seconds(job, form, chosen, where)
            times += [_seconds(job, form, chosen, where) for _ in range(runs)]
            estimate = 0 if form == "plain" else _estimate(job, chosen)
    return Measurement(model, form, image, steps, side * side, statistics.median(times), peak_memory(where), base,
                       estimate)


def _config(model: str) -> ModelConfig:
    return PRESETS[model] if model in PRESETS else load(model, device="cpu").config


def _seconds(job: Job, form: str, tile: int | None, where: torch.device) -> float:
    """Of one run, until its result is there."""
    begun = time.perf_counter()
    if form == "plain":
        dtype = next(job.model.parameters()).dtype
        result = job.model(job.image.to(dtype), job.latent.to(dtype), job.steps, form="plain")
    else:
        result = run(job, tile)
    if where.type != "cpu":
        getattr(torch, where.type).synchronize()
    seconds = time.perf_counter() - begun
    del result
    return seconds


def _estimate(job: Job, tile: int | None) -> int:
    """What the plan of the run expects to need, with its result."""
    net, factor = job.model, job.model.config.step_factor**job.steps
    result = job.latent.numel() * factor**2 * job.latent.element_size()
    return result + estimate_memory(net, job.image.shape[2], job.image.shape[3], factor, tile,
                                    next(net.parameters()).dtype)


def compare(model: str, forms: list[str], sizes: list[int], steps: int, *, rounds: int = 1,
            against: dict[str, str] | None = None, **options: Any) -> list[Measurement]:
    """All forms at all sizes, each measurement in a process of its own; the forms take turns in every round.

    against: other programs by name, as command lines in which ``{image}`` and ``{steps}`` are filled in; each ends by
    printing one line of JSON with ``seconds``, ``peak`` and ``base``.
    """
    against = against or {}
    unknown = [f for f in forms if f not in FORMS]
    if unknown:
        raise InputError(f"unknown form {unknown[0]}; choose of {', '.join(FORMS)}")
    choose_dtype(options.get("dtype", "auto"), choose_device(options.get("device", "auto")))  # said before any process
    patch = _config(model).patch
    if small := [image for image in sizes if image < patch]:
        raise InputError(f"a guide image of {small[0]} pixels is smaller than the model's patch of {patch}")
    rows = []
    for image in sizes:
        commands = {name: shlex.split(line.format(image=image, steps=steps)) for name, line in against.items()}
        for form in forms:
            request = json.dumps({"model": model, "form": form, "image": image, "steps": steps, **options})
            commands[form] = [sys.executable, "-m", "uplift_core.benchmark", request]
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                taken[name].append(in_own_process(name, image, command))
        tokens = (image // patch) ** 2
        for name, results in taken.items():
            seconds = [r["seconds"] for r in results]
            rows.append(Measurement(model, name, image, steps, tokens, statistics.median(seconds),
                                    int(statistics.median(r["peak"] for r in results)),
                                    int(statistics.median(r["base"] for r in results)), results[0].get("estimate", 0),
                                    seconds))
    return rows


def in_own_process(name: str, image: int, command: list[str]) -> dict[str, Any]:
    """What the program's last line of output says, JSON with at least ``seconds``, ``peak`` and ``base``.

    Raises InputError with the last line of its words when it fails."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    try:
        if done.returncode == 0:
            result = json.loads(done.stdout.strip().splitlines()[-1])
            if {"seconds", "peak", "base"} <= result.keys():
                return dict(result)
    except (ValueError, IndexError, AttributeError):
        pass
    last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
    raise InputError(f"measuring {name} at {image} failed: {last}")


def report(rows: Sequence[Measurement]) -> dict[str, Any]:
    """The measurements with what they were taken on, for a JSON file."""
    return {"machine": {"processor": platform.processor() or platform.machine(), "system": platform.system(),
                        "python": platform.python_version(), "torch": torch.__version__,
                        "torch_threads": torch.get_num_threads(),
                        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()},
            "rows": [asdict(row) for row in rows]}


def slope(rows: Sequence[Measurement]) -> float | None:
    """How time grows with tokens between the smallest and the largest case: 1 is linear, 2 quadratic (log-log)."""
    few, many = min(rows, key=lambda row: row.tokens), max(rows, key=lambda row: row.tokens)
    if few.tokens == many.tokens:
        return None
    return math.log(many.seconds / few.seconds) / math.log(many.tokens / few.tokens)


def plot(rows: Sequence[Measurement], path: Path) -> None:
    """Seconds and peak memory against tokens, both axes logarithmic (as in the paper's figure 1)."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError as error:
        from .errors import MissingExtra

        raise MissingExtra("matplotlib", "bench", "Drawing the plot") from error
    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for form in dict.fromkeys(row.form for row in rows):
        mine = [row for row in rows if row.form == form]
        tokens = [row.tokens for row in mine]
        grows = slope(mine)
        left.plot(tokens, [row.seconds for row in mine], "o-",
                  label=form if grows is None else f"{form} (slope {grows:.2f})")
        right.plot(tokens, [row.peak / 2**20 for row in mine], "o-", label=form)
    for axis, label in ((left, "seconds"), (right, "peak memory of the process, MB")):
        axis.set(xscale="log", yscale="log", xlabel="input tokens (latent pixels)", ylabel=label)
        ticks = sorted({row.tokens for row in rows})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, *range(2, 10))))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(f"{rows[0].model}, {2 ** rows[0].steps}x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(**json.loads(sys.argv[1])))) + "\n")
