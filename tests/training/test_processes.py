"""Several processes of one run."""

import json
import os
import signal
import socket
import subprocess
import sys

from safetensors.torch import load_file

from training_runs import SMALL, end, pair, recipe, same, start, yaml_file
from uplift_core import load
from uplift_core.training import Trainer


def test_a_helper_process_says_how_it_ended():
    assert end(start("die()"), start("1 / 0"), start("")) == [-signal.SIGKILL, 1, 0]


def test_two_processes_learn_what_one_learns_from_both_their_pictures(photos, codec_file, tmp_path):
    """Two processes of one picture each see what one process of two pictures sees, where nothing is drawn."""
    still = {**SMALL, "decoder": {**SMALL["decoder"], "ncat_c": 0}, "refiner": {**SMALL["refiner"], "ncat_c": 0}}
    runs = {kind: {batch: recipe(**options, data__batch=batch, latents__augment=0.0, run__steps=4) for batch in (1, 2)}
            for kind, options in (("uplift", {"model__uplift": still, "teacher__vae": str(codec_file)}),
                                  ("codec", {"codec": {"channels": 6, "patch": 4, "width": 8, "detail": 4}}))}
    pair("""
for kind, recipes in runs.items():
    run(recipes[1], out / f"{kind} of two")
""", photos=photos, runs=runs, out=tmp_path)
    for kind, recipes in runs.items():
        for batch in (1, 2):
            Trainer(recipes[batch], photos, tmp_path / f"{kind} {batch}", cpu=True).run()
        two, alone, one = (load_file(tmp_path / f"{kind} {run}" / "small.safetensors") for run in ("of two", 1, 2))
        assert max(float((two[name] - one[name]).abs().max()) for name in two) < 1e-4
        assert max(float((two[name] - alone[name]).abs().max()) for name in two) > 1e-3


def test_two_processes_that_one_of_them_stopped_go_on(photos, codec_file, tmp_path):
    names = {"recipe": recipe(teacher__vae=str(codec_file), run__save_every=0), "photos": photos, "out": tmp_path}
    pair("""
run(recipe, out / "whole")
asked = []
try:
    run(recipe, out / "cut", should_stop=lambda: asked.append(1) or (rank == 1 and len(asked) == 4))
except Cancelled as stop:
    assert "step 3" in str(stop)
else:
    raise AssertionError("went on")
""", **names)
    notes = json.loads((tmp_path / "cut" / "step-00000003" / "training.json").read_text())
    assert notes["processes"] == 2
    pair('run(recipe, out / "cut", resume=True)', **names)
    assert same(tmp_path / "whole" / "small.safetensors", tmp_path / "cut" / "small.safetensors")


def test_another_number_of_processes_is_told(photos, codec, tmp_path, caplog):
    run = recipe(run__steps=2)
    Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True).run()
    notes = tmp_path / "out" / "step-00000002" / "training.json"
    notes.write_text(json.dumps({**json.loads(notes.read_text()), "processes": 4}))
    Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True).run(resume=True)
    assert "was made by 4 processes, now there are 1" in caplog.text


def test_the_command_in_two_processes(with_broken, codec_file, tmp_path):
    """As the help says: accelerate launch -m uplift_core.cli train."""
    run = yaml_file(tmp_path / "run.yaml", recipe(teacher__vae=str(codec_file), latents__normalise=False))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "uplift_core.cli",
               "train", str(run), "--data", str(with_broken), "--out", str(tmp_path / "out"), "--cpu"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command[3:3] = ["--main_process_port", str(free.getsockname()[1])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert done.stderr.count("2 pictures could not be read, skipped") == 1
    notes = json.loads((tmp_path / "out" / "step-00000006" / "training.json").read_text())
    assert notes["processes"] == 2 and load(tmp_path / "out" / "small.safetensors").config.channels == 6
