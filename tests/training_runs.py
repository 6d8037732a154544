"""Small training runs, in this process and in others that are killed."""

import csv
import multiprocessing
import os
import socket

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from uplift_core.cli import app
from uplift_core.training.recipe import from_dict

SMALL = {"attender": 5, "enc_share": True,
         "encoder": {"down_steps": 1, "block_0": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [8]},
                     "down_1": {"down_op": "max"},
                     "block_1": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [8]}},
         "decoder": {"up_steps": 1, "ncat_c": 1, "enc_resample": "nearest",
                     "block_0": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [8]},
                     "up_1": {"up_op": "tconv", "residual": "bilinear"},
                     "block_1": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [8]}},
         "refiner": {"enc_resample": "nearest", "ncat_c": 1, "residual": True,
                     "block_0": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [8]}}}

MEASURED_CROPS = 32


def recipe(**changes):
    content = {"name": "small", "teacher": {"vae": "unused"}, "data": {"size": 32, "batch": 2},
               "model": {"channels": 6, "patch": 4, "latent_space": "tiny", "uplift": SMALL},
               "optimizer": {"lr": 3e-3, "ema": 0.9}, "latents": {"normalise": True, "augment": 0.02},
               "run": {"steps": 6, "log_every": 1, "preview_every": 0, "save_every": 2}}
    for entry, value in changes.items():
        node = content
        *path, last = entry.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return from_dict(content)


def yaml_file(path, recipe):
    import yaml

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
    path.write_text(yaml.safe_dump(plain(recipe.to_dict())))
    return path


CHILD = """
import logging, multiprocessing, os, signal, torch
from pathlib import Path
os.environ.update(environment)
torch.set_num_threads(threads)
from uplift_core.errors import Cancelled, InputError
from uplift_core.training import Trainer
from uplift_core.training.latent_cache import LatentCache
from uplift_core.training.tasks import CodecTask, UpliftTask
UpliftTask.measured_crops = CodecTask.measured_crops = measured_crops
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def run(recipe, out, die_at=None, **options):
    def listen(progress):
        if progress.step == die_at:
            die()
    return Trainer(recipe, photos, out, cpu=True).run(progress=listen, **options)
"""


def start(code, environment=None, **names):
    """A process that runs ``code`` after CHILD. It is forked off a server that has imported torch once for all."""
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked and killed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["uplift_core.training", "accelerate", "torch._dynamo"])  # as optimizers import it
    process = context.Process(target=exec, args=(CHILD + code, {
        "environment": environment or {}, "threads": torch.get_num_threads(), "measured_crops": MEASURED_CROPS,
        **names}))
    process.start()
    return process


def end(*processes):
    """Wait for them; their exit codes."""
    try:
        for process in processes:
            process.join(200)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def pair(code, **names):
    """``code`` in two processes of one run, as torch's launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    both = [start(code, {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}, rank=rank, **names) for rank in (0, 1)]
    assert end(*both) == [0, 0]


def same(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def logged(out):
    """The rows of a run's log.csv."""
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses_fall(out, to=0.8):
    """Whether the last five losses are at most that share of the first five."""
    losses = [float(row["loss"]) for row in logged(out)]
    return sum(losses[-5:]) < to * sum(losses[:5])


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


AUTOENCODER = {"channels": 4, "width": 8, "levels": 3, "blocks": 1, "latent_space": "mine"}
