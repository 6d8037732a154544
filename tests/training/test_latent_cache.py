"""The latent cache changes nothing but the time, whoever writes it and dies."""

import os
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data
from torch.nn import Linear

from training_runs import end, recipe, same, start
from uplift_core import checkpoints, load
from uplift_core.errors import InputError
from uplift_core.training import Trainer
from uplift_core.training.latent_cache import LatentCache, fingerprint
from uplift_core.training.photos import Photos
from uplift_core.training.recipe import DataPart
from uplift_core.vae.codec import PatchCodec
from uplift_core.vae.patchnet import PatchNet


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
    assert same(cached, plain)


def test_fingerprint_tells_weights_apart():
    one, other = Linear(2, 2), Linear(2, 2)
    assert fingerprint(one) != fingerprint(other)
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(other)


def test_an_entry_belongs_to_the_content_of_the_file_the_crop_and_the_vae(codec, tmp_path):
    """Not to the file's name, size or time: an edited picture is encoded anew, a renamed one is not."""
    folder, cache, runs = tmp_path / "pictures", tmp_path / "cache", iter(range(99))
    folder.mkdir()
    picture = folder / "picture.bmp"
    Image.fromarray(data.coffee()[:64, :64]).save(picture)
    time, size = picture.stat().st_mtime_ns, picture.stat().st_size

    def new_entries(teacher=codec, **changes):
        """Those of one more run, which makes the model that it makes without a cache."""
        before, models = len(list(cache.rglob("*.safetensors"))), []
        for place in (str(cache), ""):
            run = recipe(**{"data__crop": "center", "data__flips": False, "data__crops_per_photo": 1, "data__batch": 1,
                            "data__depths": [1], "latents__normalise": False, "run__steps": 2, "run__save_every": 0,
                            **changes}, data__cache=place)
            models.append(Trainer(run, folder, tmp_path / str(next(runs)), teacher=teacher, cpu=True).run())
        assert same(*models)
        return len(list(cache.rglob("*.safetensors"))) - before

    assert new_entries() == 2  # the picture, and its half
    assert new_entries() == 0
    picture = picture.rename(folder / "renamed.bmp")
    assert new_entries() == 0
    Image.fromarray(data.coffee()[:64, 64:128]).save(picture)
    os.utime(picture, ns=(time, time))
    assert picture.stat().st_size == size and new_entries() == 2
    assert new_entries(data__size=48) == 2
    assert new_entries(data__zoom=2.0) == 2
    other = PatchNet(codec.module.config)
    other.load_state_dict({name: value * 1.5 for name, value in codec.module.state_dict().items()})
    assert new_entries(PatchCodec(other)) == 2
    assert new_entries() == 0  # those of the first VAE are still there


def test_a_vae_whose_latents_are_scaled_otherwise_is_another(photos, tmp_path):
    """The same weights of a TAESD make other latents when they are taken for another space's."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    module = diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                                       num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)
    checkpoints.write_safetensors(module.state_dict(), path, {})
    models = []
    for cache, space in ((True, "sd15"), (True, "sdxl"), (False, "sdxl")):
        run = recipe(teacher={"vae": str(path), "latent_space": space}, model__channels=4, model__patch=8,
                     model__latent_space=space, run__steps=1, latents__normalise=False, data__depths=[1],
                     data__cache=str(tmp_path / "cache") if cache else "")
        models.append(Trainer(run, photos, tmp_path / f"{cache} {space}", cpu=True).run())
    assert same(models[1], models[2]) and not same(models[0], models[1])
