"""Training: what a recipe says is what happens, and a run that was killed ends where it would have ended."""

import csv
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from skimage import data
from torch import nn
from torch.nn import Linear
from typer.testing import CliRunner

from uplift_core import checkpoints, load, load_vae, upscale_image
from uplift_core.cli import app
from uplift_core.config import ModelConfig
from uplift_core.errors import Cancelled, CheckpointError, ConfigError, InputError
from uplift_core.model import UPLiFT
from uplift_core.training import Trainer, load_recipe, named_recipes
from uplift_core.training.latent_cache import LatentCache, fingerprint
from uplift_core.training.linear_start import begin
from uplift_core.training.objective import MultiDepth, distance, pyramid
from uplift_core.training.photos import Photos, Positions
from uplift_core.training.recipe import DataPart, Recipe, from_dict
from uplift_core.training.tasks import CodecTask, UpliftTask
from uplift_core.vae.codec import PatchCodec
from uplift_core.vae.patchnet import BlockStatistics, PatchNet, PatchNetConfig

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


@pytest.fixture(autouse=True)
def few_measured_crops(monkeypatch):
    """A run begins with a look at thousands of crops, which takes longer than the few steps of these tests."""
    for task in (UpliftTask, CodecTask):
        monkeypatch.setattr(task, "measured_crops", MEASURED_CROPS)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i, name in enumerate(("astronaut", "coffee", "chelsea")):
        Image.fromarray(getattr(data, name)()[:100 + i, :140]).save(folder / ("more" if i else ".") / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def codec(photos):
    net = PatchNet(PatchNetConfig(channels=6, patch=4, width=8, blocks=1, detail=4, detail_blocks=1))
    statistics = BlockStatistics(4)
    statistics.add(torch.stack([Photos(photos, DataPart(size=64, turns=True), 0)[i]["image"] for i in range(9)]))
    statistics.install(net)
    return PatchCodec(net)


@pytest.fixture(scope="module")
def codec_file(codec, tmp_path_factory):
    path = tmp_path_factory.mktemp("codec") / "vae.safetensors"
    net = codec.module
    checkpoints.write_safetensors(net.state_dict(), path, {**net.config.to_metadata(), "latent_space": "tiny"})
    return path


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


# -- other processes -----------------------------------------------------------------------------------------------

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


def test_a_helper_process_says_how_it_ended():
    assert end(start("die()"), start("1 / 0"), start("")) == [-signal.SIGKILL, 1, 0]


# -- recipes -------------------------------------------------------------------------------------------------------

def test_the_recipes_that_come_along_can_be_built():
    assert {"sd15-vae", "dinov2-s14", "dinov3-splus16", "tiny-vae", "uplift-mini"} <= set(named_recipes())
    for name in named_recipes():
        loaded = load_recipe(name)
        assert from_dict(loaded.to_dict()) == loaded
        if not loaded.is_codec:
            with torch.device("meta"):
                UPLiFT(loaded.model_config())


@pytest.mark.parametrize("changes, says", [
    ({"data__depths": [9]}, "multiple of 2048"), ({"data__sise": 3}, "did you mean 'size'"),
    ({"loss": "l3"}, "l2, l1, log, cosine"), ({"data__batch": "many"}, "batch: expected int"),
    ({"optimizer__ema": 1.0}, "below 1"), ({"teacher__backbone": "x"}, "one of them"),
    ({"run__steps": 0}, "run.epochs"),
    ({"model__uplift": {"encoder": {}}}, "'decoder'"),
    ({"data__size": 20}, "a multiple of 16"),
])
def test_wrong_recipes_name_the_entry(changes, says):
    with pytest.raises(ConfigError, match=says):
        recipe(**changes).model_config()


# -- pictures ------------------------------------------------------------------------------------------------------

def test_crops_depend_on_their_number_alone(photos):
    part = DataPart(size=48, zoom=2, turns=True)
    one, other = Photos(photos, part, 5, 1 << 30), Photos(photos, part, 5)
    for n in (0, 7, 3, 100, 3):
        assert torch.equal(one[n]["image"], other[n]["image"])
    assert not torch.equal(one[0]["image"], Photos(photos, part, 6)[0]["image"])
    assert sorted(one._index(n)[1] for n in range(3, 6)) == [0, 1, 2]  # an epoch shows every picture


def test_crops_come_again_when_asked_to(photos):
    few = Photos(photos, DataPart(size=48, crops_per_photo=2), 1)
    seen = {}
    for n in range(30):
        seen.setdefault(few._index(n)[1], set()).add(few[n]["key"])
    assert {len(keys) for keys in seen.values()} <= {1, 2}


def test_a_center_crop_is_the_resized_center(photos):
    crop = Photos(photos, DataPart(size=50, crop="center", flips=False), 0)
    names = [p.name for p in crop.files]
    picture = data.astronaut()[:100, :140]
    n = next(n for n in range(3) if crop._index(n)[1] == names.index("astronaut.png"))
    expected = Image.fromarray(picture).resize((70, 50), Image.Resampling.BILINEAR).crop((10, 0, 60, 50))
    assert np.abs(crop[n]["image"].permute(1, 2, 0).numpy() * 255 - np.asarray(expected, float)).max() < 1.01


def test_broken_pictures_are_skipped_and_named(tmp_path):
    Image.fromarray(data.coffee()[:64, :64]).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    photos = Photos(tmp_path, DataPart(size=32), 0)
    items = [photos[n] for n in range(4)]
    assert sum("bad.png" in item["broken"] for item in items) == 2
    (tmp_path / "good.png").unlink()
    with pytest.raises(InputError, match=r"bad\.png"):
        Photos(tmp_path, DataPart(size=32), 0)[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        Photos(tmp_path / "empty", DataPart(size=32), 0)


def test_processes_share_the_positions():
    whole = list(Positions(4, 1, 3))
    halves = [list(Positions(2, 1, 3, rank, 2)) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == whole
    assert halves[0] == [4, 5, 8, 9]


# -- the latent cache ----------------------------------------------------------------------------------------------

def test_cache_gives_back_and_survives_damage(tmp_path):
    cache = LatentCache(tmp_path / "c", "vae")
    latent = torch.randn(4, 3, 5)
    assert cache.read("k") is None
    cache.write("k", latent)
    assert torch.equal(cache.read("k"), latent)
    assert LatentCache(tmp_path / "c", "another vae").read("k") is None
    cache.path("k").write_bytes(cache.path("k").read_bytes()[:-7])
    assert cache.read("k") is None
    cache.write("k", latent)
    assert torch.equal(cache.read("k"), latent)


def test_cache_is_used_and_changes_nothing(photos, codec, tmp_path, monkeypatch):
    options = {"data__crops_per_photo": 1, "data__crop": "center", "data__flips": False, "run__steps": 4,
               "latents__normalise": False}
    plain = Trainer(recipe(**options), photos, tmp_path / "a", teacher=codec, cpu=True)
    plain.run()
    cached = recipe(**options, data__cache=str(tmp_path / "cache"))
    Trainer(cached, photos, tmp_path / "b", teacher=codec, cpu=True).run()
    last = Trainer(cached, photos, tmp_path / "c", teacher=codec, cpu=True)
    monkeypatch.setattr(last.task, "encode", lambda images: pytest.fail("not read from the cache"))
    last.run()
    states = [load(tmp_path / run / "small.safetensors").state_dict() for run in "abc"]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) and torch.equal(value, states[2][name])


def test_a_cache_is_made_when_it_is_needed_and_rid_of_what_the_dead_left(tmp_path):
    assert LatentCache(tmp_path / "c", "vae").read("k") is None and not (tmp_path / "c").exists()
    LatentCache(tmp_path / "c", "vae").write("k", torch.ones(2))
    dead, living = (next((tmp_path / "c").iterdir()) / name for name in (".1.part", ".2.part"))
    dead.touch()
    living.touch()
    os.utime(dead, (0, 0))
    LatentCache(tmp_path / "c", "vae")
    assert living.exists() and not dead.exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a folder"):
        LatentCache(tmp_path / "file", "vae")


def test_crops_of_another_zoom_have_another_key(photos):
    keys = [Photos(photos, DataPart(size=32, crop="center", flips=False, zoom=zoom, cache="c"), 0)[0]["key"]
            for zoom in (1.0, 2.0)]
    assert keys[0] != keys[1]


def test_two_processes_write_the_same_cache(tmp_path):
    code = """
cache = LatentCache(folder, "v")
for _ in range(3):
    for i in range(40):
        found = cache.read(str(i))
        assert found is None or (found == i).all()
        cache.write(str(i), torch.full((50, 50), float(i)))
"""
    assert end(*[start(code, folder=tmp_path / "c") for _ in range(2)]) == [0, 0]
    assert not list((tmp_path / "c").rglob("*.part"))


def test_a_process_that_dies_while_it_writes_leaves_no_entry(photos, codec_file, tmp_path):
    """Half an entry is on the disk when the process is killed; the next run makes it anew."""
    options = {"teacher__vae": str(codec_file), "run__steps": 3}
    run = recipe(**options, data__cache=str(tmp_path / "cache"))
    code = """
written = []
def write_half(path, content):
    written.append(path)
    with path.open("wb") as file:
        file.write(content if len(written) < 5 else content[:len(content) // 2])
    if len(written) == 5:
        die()
Path.write_bytes = write_half
run(recipe, out)
"""
    assert end(start(code, recipe=run, photos=photos, out=tmp_path / "out")) == [-signal.SIGKILL]
    entries = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in entries) == [".part", *[".safetensors"] * 4]
    for path in entries:
        assert path.suffix == ".part" or load_file(path)["latent"].shape[0] == 6
    cached = Trainer(run, photos, tmp_path / "out", cpu=True).run(resume=True)
    plain = Trainer(recipe(**options), photos, tmp_path / "plain", cpu=True).run()
    assert _same(cached, plain)


def test_fingerprint_tells_weights_apart():
    one, other = Linear(2, 2), Linear(2, 2)
    assert fingerprint(one) != fingerprint(other)
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(other)


# -- the objective -------------------------------------------------------------------------------------------------

def test_objective_is_the_sum_over_depths_and_steps():
    torch.manual_seed(0)
    config = ModelConfig.from_published(SMALL, channels=6, patch=4)
    model = UPLiFT(config).eval()
    nn.init.normal_(model.ref_outc.weight)
    image = torch.rand(2, 3, 64, 64)
    guides = pyramid(image, 2)
    maps = [torch.randn(2, 6, 16 >> level, 16 >> level) for level in range(3)]
    got = MultiDepth(model, (1, 2))(guides, maps, 3)
    generator = torch.Generator().manual_seed(3)

    def noise(shape, step, site):
        return torch.randn(shape, generator=generator)
    one = model(guides[1], maps[1], 1, noise=noise, return_steps=True)
    two = model(guides[2], maps[2], 2, noise=noise, return_steps=True)
    expected = F.mse_loss(one[0], maps[0]) + F.mse_loss(two[0], maps[1]) + F.mse_loss(two[1], maps[0])
    assert abs((got - expected).item()) < 1e-5
    kept = [m.clone() for m in maps]
    MultiDepth(model, (1, 2), augment=1.0)(guides, maps, 3)
    assert all(torch.equal(a, b) for a, b in zip(maps, kept, strict=True))  # noised latents are no targets


@pytest.mark.parametrize("loss", ["l1", "cosine"])
def test_other_losses_are_zero_for_the_same(loss):
    from uplift_core.training.objective import distance

    x = torch.randn(2, 6, 4, 4)
    assert float(distance(x, x, loss)) < 1e-6 < float(distance(x, x + torch.randn_like(x), loss))


# -- runs ----------------------------------------------------------------------------------------------------------

def test_the_log_loss_weighs_pictures_by_their_own_error():
    """Halving a small error counts as much as halving a large one."""
    target = torch.zeros(2, 3, 4, 4)
    error = torch.stack([torch.full((3, 4, 4), 1.0), torch.full((3, 4, 4), 0.01)])

    def loss(factors):
        return distance(error * torch.tensor(factors).view(2, 1, 1, 1), target, "log", 1e-12)

    torch.testing.assert_close(loss([0.5, 1.0]), loss([1.0, 0.5]))
    assert loss([0.5, 1.0]) < loss([1.0, 1.0])


CARRYING = {"attender": 9, "enc_share": True,
            "encoder": {"down_steps": 2, "block_0": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [12]},
                        "down_1": {"down_op": "conv"},
                        "block_1": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [12]},
                        "down_2": {"down_op": "max"},
                        "block_2": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [16]}},
            "decoder": {"up_steps": 1, "ncat_c": 1, "enc_resample": "nearest",
                        "block_0": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [24]},
                        "up_1": {"up_op": "tconv", "residual": "bilinear"},
                        "block_1": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [24]}},
            "refiner": {"enc_resample": "bilinear", "ncat_c": 1, "ref_con": -2, "residual": True,
                        "block_0": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [20]}}}
"""Room for all of a linear start: 2x2 pixels of 3 colours, and a constant for the attender."""


def linear_recipe(**changes):
    return recipe(model__uplift=CARRYING, model__linear_start=True, model__fixed_norm=True, **changes)


def test_a_linear_start_pools_bilinearly_and_carries_pixels():
    torch.manual_seed(0)
    model = UPLiFT(linear_recipe().model_config()).eval()
    begin(model)
    image, latent = torch.rand(1, 3, 16, 24), torch.randn(1, 6, 4, 6)
    seen = []
    model.attender.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        maps = model.encoder(image)
        model(image, latent, noise=None, form="plain")
    bilinear = F.interpolate(latent, scale_factor=2, mode="bilinear", align_corners=False)
    assert (seen[0] - bilinear).abs().max() < 9 * 2e-3 * latent.abs().max() * 2
    torch.testing.assert_close(maps[1][:, :12], F.pixel_unshuffle(image, 2).view(1, 3, 4, 8, 12).transpose(1, 2)
                               .reshape(1, 12, 8, 12), atol=1e-4, rtol=0)


def test_a_linear_start_beats_bilinear_latents_before_training(photos, codec, tmp_path):
    trainer = Trainer(linear_recipe(data__depths=[1]), photos, tmp_path / "out", teacher=codec, cpu=True)
    trainer.task.measured_crops = 64
    trainer.task.prepare(trainer._first_images)
    model, picture = trainer.task.network.eval(), trainer.photos[5]["image"][None]
    low = pyramid(picture, 1)[1]
    with torch.no_grad():
        target, latent = codec.encode(picture), codec.encode(low)
        ours = F.mse_loss(model(low, latent, noise=None), target)
    bilinear = F.mse_loss(F.interpolate(latent, scale_factor=2, mode="bilinear", align_corners=False), target)
    assert ours < 0.5 * bilinear


def test_fixed_norms_keep_their_statistics(photos, codec, tmp_path):
    trainer = Trainer(linear_recipe(run__steps=2), photos, tmp_path / "out", teacher=codec, cpu=True)
    trainer.task.measured_crops = 4
    weights = load_file(trainer.run())
    assert (weights["encoder.down_1.down.1.running_mean"] == 0).all()
    assert (weights["encoder.down_1.down.1.running_var"] == 1).all()


@pytest.mark.parametrize("changes, says", [
    ({"refiner": {**CARRYING["refiner"], "residual": False}}, "refiner with residual"),
    ({"encoder": {**CARRYING["encoder"], "down_1": {"down_op": "max"}}}, "down_1 must be conv"),
    ({"encoder": {**CARRYING["encoder"], "block_1": {**CARRYING["encoder"]["block_1"], "hc": [8]}}}, "takes 12"),
    ({"encoder": {**CARRYING["encoder"], "block_2": {**CARRYING["encoder"]["block_2"], "hc": [12]}}},
     "4 channels wider"),
    ({"decoder": {**CARRYING["decoder"], "block_1": {**CARRYING["decoder"]["block_1"], "hc": [12]}}}, "needs 22"),
])
def test_a_model_without_room_for_a_linear_start_is_refused(changes, says):
    model = UPLiFT(recipe(model__uplift={**CARRYING, **changes}).model_config())
    with pytest.raises(ConfigError, match=says):
        begin(model)


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
    assert _same(whole / "small.safetensors", cut / "small.safetensors")
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
    assert _same(names["out"] / "small.safetensors", whole)
    _, alive = psutil.wait_procs(left, timeout=30)  # they look for their parent every five seconds
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


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


def _same(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_stopped_run_goes_on(photos, codec, tmp_path):
    whole = Trainer(recipe(), photos, tmp_path / "a", teacher=codec, cpu=True).run()
    seen = []
    first = Trainer(recipe(), photos, tmp_path / "b", teacher=codec, cpu=True)
    with pytest.raises(Cancelled, match="step 3"):
        first.run(progress=seen.append, should_stop=lambda: len(seen) == 3)
    for change, part in (({"data__batch": 3}, "data"), ({"optimizer__name": "adamw"}, "optimizer"),
                         ({"run__seed": 9}, "run"), ({"teacher__vae": "another"}, "teacher")):
        with pytest.raises(InputError, match=f"'{part}' differs"):
            Trainer(recipe(**change), photos, tmp_path / "b", teacher=codec, cpu=True).run(resume=True)
    path = Trainer(recipe(), photos, tmp_path / "b", teacher=codec, cpu=True).run(resume=True)
    assert _same(path, whole)


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


# -- several processes ---------------------------------------------------------------------------------------------

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
    assert _same(tmp_path / "whole" / "small.safetensors", tmp_path / "cut" / "small.safetensors")


def test_another_number_of_processes_is_told(photos, codec, tmp_path, caplog):
    run = recipe(run__steps=2)
    Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True).run()
    notes = tmp_path / "out" / "step-00000002" / "training.json"
    notes.write_text(json.dumps({**json.loads(notes.read_text()), "processes": 4}))
    Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True).run(resume=True)
    assert "was made by 4 processes, now there are 1" in caplog.text


@pytest.fixture
def with_broken(photos, tmp_path):
    """Three pictures, and two that are none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "good").symlink_to(photos / "more")
    for path in photos.rglob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("bad.png", "worse.jpg"):
        (folder / name).write_bytes(b"nothing")
    return folder


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
    assert done.stderr.count("2 pictures could not be read and were skipped") == 1
    notes = json.loads((tmp_path / "out" / "step-00000006" / "training.json").read_text())
    assert notes["processes"] == 2 and load(tmp_path / "out" / "small.safetensors").config.channels == 6


# -- the command ---------------------------------------------------------------------------------------------------

def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_the_command_counts_broken_pictures(with_broken, codec_file, tmp_path, caplog):
    run = yaml_file(tmp_path / "run.yaml", recipe(teacher__vae=str(codec_file), latents__normalise=False))
    done = command("train", run, "--data", with_broken, "--out", tmp_path / "out", "--cpu")
    assert done.exit_code == 0, done.exception
    said = [line for line in (done.output + caplog.text).splitlines() if "could not be read" in line]
    assert len(said) == 1 and "2 pictures" in said[0] and ("bad.png" in said[0] or "worse.jpg" in said[0])


# -- precision -----------------------------------------------------------------------------------------------------

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
    with pytest.raises(InputError, match="fp16 needs a GPU; use fp32 or bf16"):
        Trainer(recipe(run__precision="fp16"), photos, tmp_path / "out", teacher=codec, cpu=True)


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
    assert _same(path, tmp_path / "whole" / "small.safetensors")
    scalers = [json.loads((tmp_path / out / "step-00000005" / "training.json").read_text())["scaler"]
               for out in ("whole", "cut")]
    assert scalers[0] == scalers[1] and (scalers[0]["scale"], scalers[0]["_growth_tracker"]) == (256, 1)


# -- what else a run does ------------------------------------------------------------------------------------------

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


def test_features_of_a_vision_transformer(photos, tmp_path):
    timm = pytest.importorskip("timm")
    from uplift_core.backbones import Backbone

    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    backbone = Backbone(timm.create_model(name, pretrained=False, num_classes=0, depth=1, dynamic_img_size=True), name)
    run = recipe(teacher={"backbone": name}, model__channels=192, model__patch=16, data__size=64, data__depths=[1],
                 run__steps=3, latents={})
    path = Trainer(run, photos, tmp_path / "out", teacher=backbone, cpu=True).run()
    config = load(path).config
    assert (config.channels, config.image_norm) == (192, "imagenet")  # the guide it was trained on


# -- the tiny codec ------------------------------------------------------------------------------------------------

def test_the_linear_codec_is_optimal(photos):
    images = torch.stack([Photos(photos, DataPart(size=64), 3)[i]["image"] for i in range(12)])
    statistics = BlockStatistics(4)
    statistics.add(images)
    net = PatchNet(PatchNetConfig(channels=10, patch=4, width=4, blocks=0, detail=2, detail_blocks=0))
    left = statistics.install(net)
    basis = net.analysis.weight.detach().flatten(1)
    assert (basis @ basis.T - torch.eye(10)).abs().max() < 1e-5
    with torch.no_grad():
        latent = net.encode(images)
        assert abs(float(F.mse_loss(net(images), images)) / left - 1) < 1e-3
    blocks = F.unfold(images, 4, stride=4).transpose(1, 2).flatten(0, 1)
    mean = blocks.view(-1, 3, 16).mean((0, 2)).repeat_interleave(16)
    best = torch.linalg.svdvals((blocks - mean).double())[10:].pow(2).sum() / blocks.numel()
    assert abs(float(best) / left - 1) < 1e-3
    flat = latent.transpose(0, 1).flatten(1)
    assert (flat.mean(1) - net.latent_mean).abs().max() < 1e-4
    assert (flat.std(1) / net.latent_std - 1).abs().max() < 1e-2


def test_tiles_of_the_tiny_codec_are_exact(codec):
    net = PatchNet(codec.module.config)
    net.load_state_dict(codec.module.state_dict())
    nn.init.normal_(net.tail.weight)
    other = PatchCodec(net)
    latent = torch.randn(1, 6, 37, 23)
    whole = other.decode(latent, tile=None)
    assert (other.decode(latent, tile=32) - whole).abs().max() < 1e-5
    assert (other.encode(whole, tile=32) - other.encode(whole, tile=None)).abs().max() < 1e-5


def test_a_trained_codec_beats_the_linear_one(photos, tmp_path):
    run = Recipe(**{**vars(recipe(run__steps=60, data__batch=4, latents__augment=0.0, optimizer__lr=1e-2)),
                    "codec": PatchNetConfig(channels=6, patch=4, width=16, blocks=1, detail=8, detail_blocks=1)})
    path = Trainer(run, photos, tmp_path / "out", cpu=True).run()
    codec = load_vae(path)
    assert codec.latent_space == "tiny"
    image = torch.stack([Photos(photos, DataPart(size=64), 4)[i]["image"] for i in range(3)])
    latent = codec.encode(image)
    linear = codec.module.synthesis(latent)
    assert F.mse_loss(codec.decode(latent), image) < 0.8 * F.mse_loss(linear, image)


AUTOENCODER = {"channels": 4, "width": 8, "levels": 3, "blocks": 1, "latent_space": "mine"}


def test_an_autoencoder_of_diffusers_is_trained_and_loads_as_a_vae(photos, tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    run = recipe(autoencoder=AUTOENCODER, run__steps=60, data__batch=4, latents__augment=0.01, run__preview_every=60)
    path = Trainer(run, photos, tmp_path / "out", cpu=True).run()
    losses = [float(row[1]) for row in csv.reader((tmp_path / "out" / "log.csv").open()) if row[0].isdigit()]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert list((tmp_path / "out").rglob("*.png")) or list((tmp_path / "out").rglob("*.jpg"))
    codec = load_vae(path)
    assert (codec.latent_space, codec.channels, codec.patch) == ("mine", 4, 4)
    image = torch.stack([Photos(photos, DataPart(size=64), 4)[i]["image"] for i in range(3)])
    latent = codec.encode(image)
    assert (latent[:, :3] * 0.5 + 0.5 - F.avg_pool2d(image, 4)).abs().mean() < 0.15  # the anchor
    with pytest.raises(InputError, match="'mine' latents, not 'sd15'"):
        load_vae(path, latent_space="sd15")
    more = recipe(autoencoder=AUTOENCODER, model__start=str(path), run__steps=1)
    again = Trainer(more, photos, tmp_path / "more", cpu=True)
    assert torch.equal(again.task.network.encoder.layers[0].weight, codec.module.encoder.layers[0].weight)
    with pytest.raises(InputError, match="no AutoencoderTiny"):
        Trainer(recipe(autoencoder={**AUTOENCODER, "width": 16}, model__start=str(path)), photos, tmp_path / "x",
                cpu=True)


def test_dry_run_writes_nothing(photos, tmp_path):
    done = command("train-vae", "--data", photos, "--dry-run", "--out", tmp_path / "out", "--set", "data.batch=2",
                   "--set", "run.precision=fp32", "--cpu")
    assert done.exit_code == 0, done.exception
    for word in ("trained parameters", "20,000", "time per step", "GB"):
        assert word in done.stdout
    assert not (tmp_path / "out").exists()


def test_dry_run_of_an_uplift_with_the_folder_in_the_recipe(photos, tmp_path):
    words = ["train", "uplift-mini", "--dry-run", "--cpu", "--out", tmp_path / "out"]
    for change in ("data.size=64", "data.batch=1", "model.linear_start=false", "run.precision=fp32"):
        words += ["--set", change]
    done = command(*words, "--set", f"data.folder={photos}", "--set", f"data.cache={tmp_path / 'cache'}")
    assert done.exit_code == 0, done.exception
    assert "8,500" in done.stdout and not list(tmp_path.iterdir())
    done = command(*words)
    assert done.exit_code == 1 and "data.folder" in str(done.exception)


def test_a_codec_of_ones_own_is_not_taken_for_the_bundled_one(photos, tmp_path):
    """Its components are others, whatever its size: the bundled UPLiFT refuses its latents."""
    run = Recipe(**{**vars(recipe(run__steps=1, model__latent_space="")),
                    "codec": PatchNetConfig(channels=32, patch=8, width=8, blocks=1, detail=4, detail_blocks=1)})
    own = load_vae(Trainer(run, photos, tmp_path / "out", cpu=True).run())
    assert own.latent_space == "own" and (own.channels, own.patch) == (32, 8)
    with pytest.raises(InputError, match="uplift-mini|tiny.*own"):
        upscale_image(load("uplift-mini", device="cpu"), own, torch.rand(3, 32, 32))


def test_a_kl_vae_of_ones_own_teaches(photos, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    kl = diffusers.AutoencoderKL(block_out_channels=(32,) * 3, down_block_types=("DownEncoderBlock2D",) * 3,
                                 up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=6)
    path = tmp_path / "mine.safetensors"
    checkpoints.write_safetensors(kl.state_dict(), path, {})
    with pytest.raises(CheckpointError, match="6-channel latents.*latent_space='own'"):
        load_vae(path)
    run = recipe(teacher={"vae": str(path), "latent_space": "own-kl"}, run__steps=2, model__latent_space="")
    model = load(Trainer(run, photos, tmp_path / "out", cpu=True).run(), device="cpu")
    assert model.config.latent_space == "own-kl" and model.config.channels == 6


def test_resuming_a_finished_run_leaves_its_snapshot_in_place(photos, codec, tmp_path):
    """A kill while it is written anew would otherwise leave none."""
    for resume in (False, True):
        Trainer(recipe(run__steps=2), photos, tmp_path, teacher=codec, cpu=True).run(resume=resume)
        file = next(tmp_path.glob("step-*/training.safetensors")).stat()
        if not resume:
            before = file.st_ino
    assert file.st_ino == before and not list(tmp_path.glob(".*.part"))
