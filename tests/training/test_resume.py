"""A run that was killed or stopped ends where it would have ended."""

import csv
import json
import shutil
import signal

import pytest
import torch

from training_runs import AUTOENCODER, end, logged, recipe, same, start
from uplift_core.errors import Cancelled, InputError
from uplift_core.training import Trainer


@pytest.mark.parametrize("kind", ["uplift", "codec", "autoencoder"])
def test_a_killed_run_ends_like_an_uninterrupted_one(photos, codec_file, tmp_path, kind):
    if kind == "autoencoder":
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    run = recipe(run__steps=8, **{
        "uplift": {"data__guides_decoded": 0.5, "teacher__vae": str(codec_file)},
        "codec": {"codec": {"channels": 6, "patch": 4, "width": 8, "detail": 4}},
        "autoencoder": {"autoencoder": AUTOENCODER}}[kind])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Trainer(run, photos, whole, cpu=True).run()
    assert end(start("run(recipe, out, die_at=6)", recipe=run, photos=photos, out=cut)) == [-signal.SIGKILL]
    assert sorted(path.name for path in cut.iterdir()) == ["log.csv", "step-00000002", "step-00000004"]
    assert [row[0] for row in csv.reader((cut / "log.csv").open())][-1] == "5"  # more than the snapshot knows
    with pytest.raises(InputError, match="--resume"):
        Trainer(run, photos, cut, cpu=True).run()
    (cut / ".dead.part").mkdir()
    Trainer(run, photos, cut, cpu=True).run(resume=True)
    assert same(whole / "small.safetensors", cut / "small.safetensors")
    logs = [[row[:2] for row in csv.reader((out / "log.csv").open())] for out in (whole, cut)]
    assert logs[0] == logs[1]
    assert not (cut / ".dead.part").exists()


def test_workers_and_a_cache_survive_kills_before_and_after_the_first_snapshot(photos, codec_file, tmp_path):
    psutil = pytest.importorskip("psutil")
    options = {"teacher__vae": str(codec_file), "run__steps": 4}
    whole = Trainer(recipe(**options), photos, tmp_path / "whole", cpu=True).run()
    names = {"recipe": recipe(**options, data__workers=1, data__cache=str(tmp_path / "cache")), "photos": photos,
             "out": tmp_path / "cut", "log": tmp_path / "log", "pids": tmp_path / "pids"}
    code = """
logging.basicConfig(filename=log)
kill = die
def die():
    pids.write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
    kill()
run(recipe, out, resume=resume, die_at=die_at)
"""

    def workers():
        return {psutil.Process(int(pid)) for pid in names["pids"].read_text().split()}

    assert end(start(code, **names, resume=False, die_at=1)) == [-signal.SIGKILL]
    left = workers()
    assert left and not list(names["out"].glob("step-*")) and list((tmp_path / "cache").rglob("*.safetensors"))
    assert end(start(code, **names, resume=True, die_at=3)) == [-signal.SIGKILL]
    assert "no snapshot; starting from the beginning" in names["log"].read_text()
    assert [path.name for path in names["out"].glob("step-*")] == ["step-00000002"]
    left |= workers()
    assert end(start(code, **names, resume=True, die_at=0)) == [0]
    assert same(names["out"] / "small.safetensors", whole)
    _, alive = psutil.wait_procs(left, timeout=30)  # they look for their parent every five seconds
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_stopped_run_goes_on(photos, codec, tmp_path):
    whole = Trainer(recipe(), photos, tmp_path / "a", teacher=codec, cpu=True).run()
    seen = []
    first = Trainer(recipe(), photos, tmp_path / "b", teacher=codec, cpu=True)
    with pytest.raises(Cancelled, match="step 3"):
        first.run(progress=seen.append, should_stop=lambda: len(seen) == 3)
    for change, says in (({"data__batch": 3}, "data.batch was 2 and is 3"),
                         ({"data__depths": [1]}, r"data.depths was \[1, 2\] and is \[1\]"),
                         ({"optimizer__name": "adamw"}, "optimizer.name was 'adam' and is 'adamw'"),
                         ({"run__seed": 9}, "run.seed was 0 and is 9"),
                         ({"teacher__vae": "another"}, "teacher.vae was 'unused' and is 'another'")):
        with pytest.raises(InputError, match=says):
            Trainer(recipe(**change), photos, tmp_path / "b", teacher=codec, cpu=True).run(resume=True)
    path = Trainer(recipe(), photos, tmp_path / "b", teacher=codec, cpu=True).run(resume=True)
    assert same(path, whole)


def test_the_scale_of_the_loss_goes_on(photos, codec, tmp_path):
    """fp16's scaler, here on the CPU: it doubles the scale every two steps; a stopped run goes on where it was."""
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("this torch scales on CUDA only")

    def trainer(out):
        made = Trainer(recipe(run__steps=5), photos, tmp_path / out, teacher=codec, cpu=True)
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        return made

    trainer("whole").run()
    steps = iter(range(9))
    with pytest.raises(Cancelled, match="step 3"):
        trainer("cut").run(should_stop=lambda: next(steps) == 3)
    path = trainer("cut").run(resume=True)
    assert same(path, tmp_path / "whole" / "small.safetensors")
    scalers = [json.loads((tmp_path / out / "step-00000005" / "training.json").read_text())["scaler"]
               for out in ("whole", "cut")]
    assert scalers[0] == scalers[1] and (scalers[0]["scale"], scalers[0]["_growth_tracker"]) == (256, 1)


def test_resuming_a_finished_run_leaves_its_snapshot_in_place(photos, codec, tmp_path):
    """A kill while it is written anew would otherwise leave none."""
    for resume in (False, True):
        Trainer(recipe(run__steps=2), photos, tmp_path, teacher=codec, cpu=True).run(resume=resume)
        file = next(tmp_path.glob("step-*/training.safetensors")).stat()
        if not resume:
            before = file.st_ino
    assert file.st_ino == before and not list(tmp_path.glob(".*.part"))


def dying_at(step):
    def listen(progress):
        if progress.step == step:
            raise RuntimeError("gone")
    return listen


def test_the_log_goes_on_in_the_middle_of_an_interval(photos, codec, tmp_path):
    """Killed after a row that the snapshot does not know, stopped between two rows, and made longer: no row twice, none
    missing, and each the mean of the steps since the row before it."""
    def trainer(out, steps=11, every=3):
        run = recipe(run__steps=steps, run__log_every=every, run__save_every=4)
        return Trainer(run, photos, tmp_path / out, teacher=codec, cpu=True)

    whole = trainer("whole", every=1).run()
    losses = [float(row["loss"]) for row in logged(tmp_path / "whole")]
    with pytest.raises(RuntimeError, match="gone"):
        trainer("cut").run(progress=dying_at(7))
    assert [row["step"] for row in logged(tmp_path / "cut")] == ["3", "6"]
    asked = iter(range(99))
    with pytest.raises(Cancelled, match="step 8"):
        trainer("cut").run(resume=True, should_stop=lambda: next(asked) == 4)  # on from 4
    assert [row["step"] for row in logged(tmp_path / "cut")] == ["3", "6"]
    trainer("cut", steps=10).run(resume=True)
    path = trainer("cut").run(resume=True)
    rows = logged(tmp_path / "cut")
    assert [row["step"] for row in rows] == ["3", "6", "9", "10", "11"]
    spans = [(0, 3), (3, 6), (6, 9), (9, 10), (10, 11)]
    assert [float(row["loss"]) for row in rows] == pytest.approx(
        [sum(losses[a:b]) / (b - a) for a, b in spans], rel=1e-5)
    assert (tmp_path / "cut" / "log.csv").read_text().count("step") == 1
    assert same(path, whole)


def test_a_run_that_is_longer_already_is_not_called_a_shorter_one(photos, codec, tmp_path):
    path = Trainer(recipe(run__steps=4), photos, tmp_path, teacher=codec, cpu=True).run()
    before = path.stat().st_mtime_ns
    with pytest.raises(InputError, match=r"at step 4 already .* to end at 2: raise run\.steps"):
        Trainer(recipe(run__steps=2), photos, tmp_path, teacher=codec, cpu=True).run(resume=True)
    assert path.stat().st_mtime_ns == before


def test_other_pictures_are_told(photos, codec, tmp_path, caplog):
    def go_on(folder, steps):
        caplog.clear()
        Trainer(recipe(run__steps=steps), folder, tmp_path / "out", teacher=codec, cpu=True).run(resume=steps > 2)
        return caplog.text

    assert "other pictures" not in go_on(photos, 2)
    shutil.copytree(photos, tmp_path / "moved")
    assert "other pictures" not in go_on(tmp_path / "moved", 3)
    (tmp_path / "moved" / "new.png").write_bytes(b"another")
    assert f"other pictures (3, now 4 in {tmp_path / 'moved'})" in go_on(tmp_path / "moved", 4)
    (tmp_path / "moved" / "new.png").write_bytes(b"yet another")
    assert "other pictures (4, now 4" in go_on(tmp_path / "moved", 5)


def test_broken_pictures_are_counted_however_a_run_ends(with_broken, codec, tmp_path, caplog):
    """Those a run met before it was stopped count in the one that goes on, unless they are gone."""
    def go_on(steps):
        caplog.clear()
        Trainer(recipe(run__steps=steps), with_broken, tmp_path / "out", teacher=codec, cpu=True).run(resume=True)
        return "2 pictures could not be read, skipped" in caplog.text

    asked = iter(range(99))
    with pytest.raises(Cancelled):
        Trainer(recipe(), with_broken, tmp_path / "out", teacher=codec, cpu=True).run(
            should_stop=lambda: next(asked) == 4)
    assert "2 pictures could not be read, skipped" in caplog.text
    assert go_on(4) and "is the last step already: raise run.steps" in caplog.text
    for name in ("bad.png", "worse.jpg"):
        (with_broken / name).unlink()
    assert not go_on(5) and "skipped" not in caplog.text


def test_tensorboard_goes_on_without_a_gap(photos, codec, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def trainer():
        return Trainer(recipe(), photos, tmp_path, teacher=codec, cpu=True, tensorboard=True)

    with pytest.raises(RuntimeError, match="gone"):
        trainer().run(progress=dying_at(6))  # the last snapshot is of step 4
    trainer().run(resume=True)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_weights_that_are_not_finite_replace_no_snapshot(photos, codec, tmp_path):
    run = recipe(optimizer__lr=1e30, run__log_every=0, run__save_every=1, run__save_keep=1)
    with pytest.raises(InputError, match=r"not finite at step 2, which is not saved: lower optimizer\.lr"):
        Trainer(run, photos, tmp_path, teacher=codec, cpu=True).run()
    assert [path.name for path in tmp_path.glob("*")] == ["step-00000001"]  # and no log without a row


def test_others_may_read_a_snapshot(photos, codec, tmp_path):
    Trainer(recipe(run__steps=1), photos, tmp_path, teacher=codec, cpu=True).run()
    assert len({path.stat().st_mode for path in (tmp_path / "step-00000001").iterdir()}) == 1
