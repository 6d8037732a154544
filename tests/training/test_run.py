"""A run: what a recipe says is what happens, and what is seen of it."""

import csv
import json
import re
from time import sleep

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from training_runs import command, end, logged, losses_fall, recipe, same, start, yaml_file
from uplift_core import load
from uplift_core.errors import InputError
from uplift_core.training import Trainer
from uplift_core.training.objective import pyramid
from uplift_core.training.photos import Photos
from uplift_core.training.recipe import DataPart
from uplift_core.vae.codec import PatchCodec
from uplift_core.vae.patchnet import PatchNet, PatchNetConfig


def test_training_learns(photos, codec, tmp_path):
    run = recipe(run__steps=60, optimizer__lr=1e-2, latents__augment=0.0)
    path = Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True).run()
    model = load(path)
    assert model.config.latent_space == "tiny" and len(model.config.latent_std) == 6
    image = Photos(photos, DataPart(size=64), 9)[1]["image"][None]
    small = pyramid(image, 1)[1]
    latent = codec.encode(small)
    target = codec.encode(image)
    with torch.no_grad():
        ours = model(small, latent, 1, noise=0)
    bilinear = F.interpolate(latent, scale_factor=2, mode="bilinear")
    assert F.mse_loss(ours, target) < 0.8 * F.mse_loss(bilinear, target)
    with (tmp_path / "out" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_the_rate_rises_falls_and_the_gradient_is_clipped(photos, codec, tmp_path):
    run = recipe(run__steps=8, optimizer={"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "warmup": 4, "decay": 0.25,
                                          "clip": 1e-3, "ema": 0})
    trainer = Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True)
    assert isinstance(trainer.make_optimizer(), torch.optim.AdamW)
    trainer.run()
    with (tmp_path / "out" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["rate"]) for row in rows]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3, 1e-3, 0.5e-3])
    assert all(float(row["grad_norm"]) > 1e-3 for row in rows)  # before it is clipped


def test_an_error_in_a_worker_is_one_sentence(tmp_path, codec_file):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    code = """
try:
    run(recipe, out)
except InputError as error:
    said.write_text(str(error))
"""
    run = recipe(teacher__vae=str(codec_file), data__workers=1, latents__normalise=False)
    assert end(start(code, recipe=run, photos=tmp_path, out=tmp_path / "out", said=tmp_path / "said")) == [0]
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"{tmp_path}: 1 pictures in a row cannot be read") and "\n" not in said


def test_the_command_counts_broken_pictures(with_broken, codec_file, tmp_path, caplog):
    run = yaml_file(tmp_path / "run.yaml", recipe(teacher__vae=str(codec_file), latents__normalise=False))
    done = command("train", run, "--data", with_broken, "--out", tmp_path / "out", "--cpu")
    assert done.exit_code == 0, done.exception
    said = [line for line in (done.output + caplog.text).splitlines() if "could not be read" in line]
    assert len(said) == 1 and "2 pictures" in said[0] and ("bad.png" in said[0] or "worse.jpg" in said[0])


def test_bf16_trains_weights_of_fp32(photos, codec, tmp_path):
    """And one process may train in one precision after the other."""
    short, other, long = (
        load_file(Trainer(recipe(run__steps=steps, run__precision=precision), photos, tmp_path / f"{precision} {steps}",
                          teacher=codec, cpu=True).run())
        for precision, steps in (("bf16", 2), ("fp32", 2), ("bf16", 20)))
    assert any(not torch.equal(value, other[name]) for name, value in short.items())
    assert {value.dtype for value in long.values()} == {value.dtype for value in other.values()} == {torch.float32}
    losses = [float(row[1]) for row in csv.reader((tmp_path / "bf16 20" / "log.csv").open()) if row[0].isdigit()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_fp16_without_a_gpu_is_refused(photos, codec, tmp_path):
    with pytest.raises(InputError, match="fp16 needs a GPU; use auto, fp32 or bf16"):
        Trainer(recipe(run__precision="fp16"), photos, tmp_path / "out", teacher=codec, cpu=True)


def test_tensorboard_has_the_log(photos, codec, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Trainer(recipe(), photos, tmp_path / "out", teacher=codec, cpu=True, tensorboard=True).run()
    events = reader.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    with (tmp_path / "out" / "log.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses, rel=1e-5)


def test_previews_are_pictures(photos, codec, tmp_path):
    run = recipe(run__steps=2, run__preview_every=2, run__preview_photos=2)
    Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True).run()
    page = Image.open(next((tmp_path / "out" / "previews").iterdir()))
    assert page.size == (5 * 32, 2 * (32 + 16))


def test_a_run_that_diverges_says_so(photos, codec, tmp_path):
    with pytest.raises(InputError, match=r"optimizer\.lr"):
        Trainer(recipe(optimizer__lr=1e30), photos, tmp_path / "out", teacher=codec, cpu=True).run()


def test_a_teacher_that_does_not_fit_is_refused(photos, tmp_path):
    other = PatchCodec(PatchNet(PatchNetConfig(channels=7, patch=4, width=4, blocks=0, detail=2, detail_blocks=0)))
    with pytest.raises(InputError, match="7 channels"):
        Trainer(recipe(), photos, tmp_path / "out", teacher=other, cpu=True)


# -- the optimizer -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ema", [0.0, 0.3])
def test_the_saved_model_is_the_mean_of_the_weights_of_the_steps(photos, codec, tmp_path, ema):
    """Exponential, from the weights the run begins with, with a shorter memory in the first steps; each snapshot's
    weights file is the mean up to there."""
    run = recipe(run__steps=6, run__save_every=1, run__save_keep=9, optimizer__ema=ema)
    trainer = Trainer(run, photos, tmp_path, teacher=codec, cpu=True)
    mean = {name: value.detach().double() for name, value in trainer.task.network.state_dict().items()}
    path = trainer.run()
    for step in range(6):
        folder = tmp_path / f"step-{step + 1:08d}"
        now = {name[7:]: value for name, value in load_file(folder / "training.safetensors").items()
               if name.startswith("weight.")}
        keep = min(ema, (1 + step) / (10 + step))
        mean = {name: keep * mean[name] + (1 - keep) * value.double() for name, value in now.items()}
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() == mean.keys() == now.keys()
        for name, value in saved.items():
            torch.testing.assert_close(value.double(), mean[name], atol=1e-6, rtol=1e-5)
        assert all(torch.equal(value, now[name]) for name, value in saved.items()) == (ema == 0)
    assert same(path, folder / "model.safetensors")


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e6])
def test_no_step_takes_a_longer_gradient_than_the_clip(photos, codec, tmp_path, clip):
    """What the optimizer is given; the log has the length before. A shorter one stays as it is."""
    trainer = Trainer(recipe(optimizer__clip=clip), photos, tmp_path, teacher=codec, cpu=True)
    make, taken = trainer.make_optimizer, []

    def watched():
        optimizer = make()
        optimizer.register_step_pre_hook(lambda own, given, more: taken.append(float(torch.stack([
            value.grad.norm() for group in own.param_groups for value in group["params"] if value.grad is not None
        ]).norm())))
        return optimizer

    trainer.make_optimizer = watched
    trainer.run()
    before = [float(row["grad_norm"]) for row in logged(tmp_path)]
    assert len(taken) == 6
    if clip == 1e-3:
        assert taken == pytest.approx([clip] * 6, rel=0.01) and max(taken) <= clip and min(before) > 2 * clip
    else:
        assert min(taken) > 2e-3 and before == pytest.approx(taken if clip else [0] * 6, rel=1e-3)


@pytest.mark.parametrize("loss", ["l1", "log"])
def test_other_losses_learn_and_are_noted(photos, codec, tmp_path, loss):
    run = recipe(loss=loss, run__steps=40, optimizer__lr=1e-2, run__save_every=0)
    Trainer(run, photos, tmp_path, teacher=codec, cpu=True).run()
    if loss == "l1":
        assert losses_fall(tmp_path)
    else:
        losses = [float(row["loss"]) for row in logged(tmp_path)]
        assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    notes = json.loads((tmp_path / "step-00000040" / "training.json").read_text())
    assert notes["recipe"]["loss"] == loss
    with pytest.raises(InputError, match=f"loss was '{loss}' and is 'l2'"):
        Trainer(recipe(run__steps=41, optimizer__lr=1e-2), photos, tmp_path, teacher=codec, cpu=True).run(resume=True)


# -- what is seen of a run -----------------------------------------------------------------------------------------

def test_the_log_has_the_mean_of_an_interval_and_a_listener_hears_every_step(photos, codec, tmp_path):
    heard = []
    run = recipe(run__log_every=4)
    Trainer(run, photos, tmp_path, teacher=codec, cpu=True).run(progress=heard.append)
    assert [(p.step, p.steps) for p in heard] == [(n, 6) for n in range(1, 7)]
    assert all(p.images_per_second > 0 for p in heard)
    assert all(p.seconds_left > 0 for p in heard[:-1]) and heard[-1].seconds_left == 0
    rows = logged(tmp_path)
    assert list(rows[0]) == ["step", "loss", "rate", "grad_norm", "images_per_second"]
    assert [int(row["step"]) for row in rows] == [4, 6]  # the last step always
    losses = [p.loss for p in heard]
    assert [float(row["loss"]) for row in rows] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 2], rel=1e-5)
    assert [float(row["images_per_second"]) for row in rows] == pytest.approx(
        [heard[3].images_per_second, heard[5].images_per_second], rel=0.01)


def test_no_interval_is_no_row_but_the_last(photos, codec, tmp_path):
    Trainer(recipe(run__log_every=0), photos, tmp_path, teacher=codec, cpu=True).run()
    assert [row["step"] for row in logged(tmp_path)] == ["6"]


def test_speed_and_time_left_are_those_of_the_clock(photos, codec, tmp_path):
    """Two pictures a step, and a step that is made to take 0.1 s: at most 20 pictures a second, at least 0.1 s for each
    step that is left."""
    heard = []

    def listen(progress):
        heard.append(progress)
        sleep(0.1)

    Trainer(recipe(run__save_every=0), photos, tmp_path, teacher=codec, cpu=True).run(progress=listen)
    last = heard[-2]
    assert last.images_per_second < 2 * 5 / 0.4
    assert last.seconds_left == pytest.approx(2 * 5 / last.images_per_second / 5, rel=0.05)
    assert heard[2].seconds_left > 3 * 0.2 / 3


def test_the_command_shows_loss_speed_and_time_left(photos, codec_file, tmp_path):
    run = yaml_file(tmp_path / "run.yaml", recipe(teacher__vae=str(codec_file)))
    done = command("train", run, "--data", photos, "--out", tmp_path / "out", "--cpu")
    assert done.exit_code == 0, done.exception
    assert re.search(r"small  loss [\d.e-]+  [\d.]+ images/s .*6/6 .*\d:\d\d:\d\d left 0:00:00", done.output)
    assert f"written to {tmp_path / 'out' / 'small.safetensors'}" in done.output
    loss = float(re.search(r"loss ([\d.e-]+)", done.output)[1])
    assert loss == pytest.approx(float(logged(tmp_path / "out")[-1]["loss"]), rel=1e-3)


def test_a_preview_has_a_row_a_photo_and_a_column_a_method(photos, codec, tmp_path):
    """Low resolution, bilinear latent, UPLiFT, the VAE's own best, and the crop itself."""
    run = recipe(run__steps=3, run__preview_every=3, run__preview_photos=2)
    trainer = Trainer(run, photos, tmp_path, teacher=codec, cpu=True)
    model = load(trainer.run(), device="cpu")
    page = torch.from_numpy(np.array(Image.open(tmp_path / "previews" / "step-00000003.png"))).permute(2, 0, 1)
    images = torch.stack([trainer.photos[n]["image"] for n in range(2)])
    small = pyramid(images, 1)[1]
    latent = codec.encode(small, tile=None)
    with torch.no_grad():
        columns = [small.repeat_interleave(2, 2).repeat_interleave(2, 3),
                   codec.decode(F.interpolate(latent, scale_factor=2, mode="bilinear"), tile=None),
                   codec.decode(model(small, latent, 1, noise=0), tile=None),
                   codec.decode(codec.encode(images, tile=None), tile=None), images]
    for j, column in enumerate(columns):
        for i, expected in enumerate(column):
            cell = page[:, i * 48 + 16:(i + 1) * 48, j * 32:(j + 1) * 32].float() / 255
            error = (cell - expected.clamp(0, 1)).abs().max()
            assert error < (0.51 if j == 4 else 1.1) / 255, (i, j)
            title = page[:, i * 48:i * 48 + 16, j * 32:(j + 1) * 32]
            assert title.min() < 64 and title.max() == 255  # black on white


@pytest.mark.parametrize("every, steps", [(2, [2, 4, 5]), (5, [5]), (0, [])])
def test_previews_come_at_their_interval_and_change_nothing(photos, codec, tmp_path, every, steps):
    run = recipe(run__steps=5, run__preview_every=every, run__preview_photos=1)
    trainer = Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True)
    draw, drawn = trainer.task.preview, []
    trainer.task.preview = lambda network, images, path: (drawn.append(path), draw(network, images, path))
    path = trainer.run()
    assert len(drawn) == len(steps)
    assert sorted(p.name for p in tmp_path.rglob("previews/*")) == [f"step-{step:08d}.png" for step in steps]
    plain = Trainer(recipe(run__steps=5), photos, tmp_path / "plain", teacher=codec, cpu=True).run()
    assert same(path, plain)
