"""``uplift train`` as a command: its plan, and how it stops and goes on."""

import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from training_runs import command, logged, recipe, same, yaml_file
from uplift_core.training import Trainer
from uplift_core.training.plan import make_plan, try_steps

MINI = ("train", "uplift-mini", "--dry-run", "--cpu")


def test_dry_run_of_an_uplift_with_the_folder_in_the_recipe(photos, tmp_path):
    words = [*MINI, "--out", tmp_path / "out"]
    for change in ("data.size=64", "data.batch=1", "model.linear_start=false"):
        words += ["--set", change]
    done = command(*words, "--set", f"data.folder={photos}", "--set", f"data.cache={tmp_path / 'cache'}")
    assert done.exit_code == 0, done.exception
    assert "8,500" in done.stdout and not list(tmp_path.iterdir())
    done = command(*words)
    assert done.exit_code == 1 and "data.folder" in str(done.exception)


def test_dry_run_counts_what_cannot_be_read(with_broken, tmp_path):
    done = command(*MINI, "--set", "data.size=64", "--set", "data.batch=1", "--data", with_broken)
    assert done.exit_code == 0, done.exception
    assert re.search(r"pictures +7 \(of all read now, 2 cannot be; the first: .*(bad\.png|worse\.jpg)", done.stdout)


def test_dry_run_of_a_folder_without_a_picture_that_can_be_read_fails_as_the_run_would(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    done = command(*MINI, "--data", tmp_path)
    assert done.exit_code == 1 and "no picture in this folder can be read" in str(done.exception)


@pytest.mark.parametrize("change, says", [
    ("model.uplift.attendr=5", "model.uplift.attendr is not known; did you mean attender"),
    ("model.uplift.encoder.block_0.cnt=1", "encoder.block_0.cnt is not known; did you mean encoder.block_0.count"),
    ("model.uplift.encoder.block_0.hc=[8, 9]", "block_0: 2 widths in hc, but count is 1"),
    ("model.uplift.attender=many", "attender is 'many'; expected a whole number"),
    ("model.uplift.refiner=3", "refiner is 3; expected entries"),
])
def test_a_mistake_in_the_model_is_named(photos, change, says):
    done = command(*MINI, "--data", photos, "--set", change)
    assert done.exit_code == 1 and says in str(done.exception)


def test_a_teacher_of_another_space_says_what_to_set(photos, tmp_path):
    (tmp_path / "own.yaml").write_text("codec: {channels: 32, patch: 8, width: 8, blocks: 1, detail: 4}\n"
                                       "data: {size: 32, batch: 2}\nrun: {steps: 1}\n")
    done = command("train-vae", tmp_path / "own.yaml", "--data", photos, "--cpu", "--out", tmp_path / "codec")
    assert done.exit_code == 0, done.exception
    words = [*MINI, "--data", photos, "--set", f"teacher.vae={tmp_path / 'codec' / 'own.safetensors'}", "--set",
             "data.size=64", "--set", "data.batch=1"]
    done = command(*words)
    assert done.exit_code == 1 and "leave model.latent_space empty (--set model.latent_space=)" in str(done.exception)
    assert command(*words, "--set", "model.latent_space=").exit_code == 0


def test_a_cache_that_will_never_be_read_is_told(photos, codec, tmp_path, caplog):
    for change, told in (({}, True), ({"data__crops_per_photo": 2}, False), ({"data__crop": "center"}, False)):
        caplog.clear()
        Trainer(recipe(data__cache=str(tmp_path / "cache"), **change), photos, tmp_path, teacher=codec, cpu=True)
        assert ("set data.crops_per_photo" in caplog.text) == told


def test_dry_run_of_what_would_not_fit_says_so_before_it_tries(photos):
    done = command(*MINI, "--data", photos, "--set", "data.size=8192", "--set", "data.batch=64")
    assert done.exit_code == 0, done.exception
    assert "1,851,105" in done.stdout and "8,500" in done.stdout
    assert "not tried: it would not fit; lower data.batch or data.size" in done.stdout
    assert float(re.search(r"about ([\d.]+) GB \(estimated\)", done.stdout)[1]) > 1000


def test_the_estimate_is_near_the_peak(photos, tmp_path):
    """In a process of its own: here the peak is that of the tests before."""
    code = f"""
import torch
from pathlib import Path
from uplift_core.training import Trainer, load_recipe
from uplift_core.training.plan import make_plan, try_steps
torch.set_num_threads(1)
recipe = load_recipe("uplift-mini", {{"data.batch": 4, "run.precision": "fp32"}})
trainer = Trainer(recipe, Path({str(photos)!r}), Path("unused"), cpu=True)
print(make_plan(trainer).memory_bytes, try_steps(trainer).memory_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    estimated, measured = map(int, done.stdout.split())
    assert 0.6 * measured < estimated < 1.5 * measured


@pytest.mark.parametrize("kind", ["uplift", "codec"])
def test_a_plan_computes_nothing_and_grows_with_the_batch(photos, codec, tmp_path, kind, monkeypatch):
    def plan(batch):
        more = {"codec": {"codec": {"channels": 6, "patch": 4, "width": 8, "detail": 4}}}.get(kind, {})
        trainer = Trainer(recipe(data__batch=batch, **more), photos, tmp_path, cpu=True,
                          teacher=codec if kind == "uplift" else None)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn", None)  # noise for a batch that may not fit
            return make_plan(trainer)

    small, large = plan(2), plan(200)
    assert large.more_bytes > 50 * (small.more_bytes - 16 * small.parameters) and not list(tmp_path.iterdir())


def test_precision_auto_is_fp32_on_a_cpu_and_says_so_to_a_run_that_goes_on(photos, codec, tmp_path):
    for steps, precision in ((2, "auto"), (3, "fp32"), (4, "auto")):
        trainer = Trainer(recipe(run__steps=steps, run__precision=precision), photos, tmp_path, teacher=codec, cpu=True)
        assert trainer.precision == "fp32"
        trainer.run(resume=steps > 2)
    trainer = Trainer(recipe(run__steps=5, run__precision="bf16"), photos, tmp_path, teacher=codec, cpu=True)
    with pytest.raises(Exception, match="run.precision was 'fp32' and is 'bf16'"):
        trainer.run(resume=True)


def test_memory_that_runs_out_in_a_trial_is_one_sentence(photos, codec, tmp_path):
    trainer = Trainer(recipe(), photos, tmp_path, teacher=codec, cpu=True)

    def full(*given):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nat")

    trainer.task.objective.forward = full
    with pytest.raises(Exception, match=r"not fit into the memory of cpu: lower data\.batch or data\.size \(.*9 b"):
        try_steps(trainer)


def test_ctrl_c_tells_the_command_that_goes_on_to_the_same_result(photos, codec_file, tmp_path):
    folder = tmp_path / "my run"
    run = yaml_file(tmp_path / "run.yaml", recipe(teacher__vae=str(codec_file), latents__normalise=False))
    words = ["train", str(run), "--data", str(photos), "--cpu", "--threads", "1", "--set", "run.steps=40",
             "--set", "data.crop=center", "--set", "run.save_every=0"]
    assert command(*words, "--out", tmp_path / "whole").exit_code == 0
    with (tmp_path / "said").open("w+") as said:
        going = subprocess.Popen([sys.executable, "-m", "uplift_core.cli", *words, "--out", str(folder)], stderr=said)
        try:
            until = time.monotonic() + 120
            while not ((folder / "log.csv").is_file() and logged(folder)) and time.monotonic() < until:
                time.sleep(0.02)
            going.send_signal(signal.SIGINT)
            assert going.wait(60) == 130
        finally:
            going.kill()
        said.seek(0)
        hint = said.read().rpartition("; go on with: ")[2].strip()
    assert not (folder / "small.safetensors").exists()
    _, *again = shlex.split(hint)
    done = command(*again)
    assert done.exit_code == 0, done.exception
    assert same(folder / "small.safetensors", tmp_path / "whole" / "small.safetensors")
