"""Weight files: read, recognised, refused, built, written."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import Conv2d

from rule_weights import golden_config, model_shapes, published_shapes, rule_state
from uplift_core import checkpoints
from uplift_core.checkpoints import build, config_and_source, config_for, read_weights, save, strip_prefixes
from uplift_core.config import PRESETS, ModelConfig
from uplift_core.devices import choose_device, choose_dtype, has_cpu_fp16
from uplift_core.errors import CheckpointError, InputError, UpliftError
from uplift_core.foreign import looks_like
from uplift_core.loading import load

SMALL = "small-vae_attender13"


@pytest.fixture(scope="module")
def config():
    return golden_config(SMALL)


@pytest.fixture(scope="module")
def state(config):
    return rule_state(model_shapes(config))


@pytest.fixture(scope="module")
def dino_state():
    return rule_state(published_shapes("dinov3-splus16"))


def refused(path: Path, *words: str, how=read_weights) -> str:
    """The one error for this file: it names the file and has all the words."""
    with pytest.raises(CheckpointError) as caught:
        how(path)
    message = str(caught.value)
    for word in (str(path), *words):
        assert word in message, message
    return message


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


# -- what loads ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "ckpt", "bin"])
def test_reads_every_format(tmp_path, state, suffix):
    path = tmp_path / f"own.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    assert same(read_weights(path).state, state)


def test_reads_old_torch_files_and_goes_by_content(tmp_path, state):
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "renamed.pth")
    torch.save(state, tmp_path / "renamed.safetensors")
    for name in ("old.pth", "renamed.pth", "renamed.safetensors"):
        assert same(read_weights(tmp_path / name).state, state)


@pytest.mark.parametrize("wrap", [
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model": s, "optimizer": {"state": {}}},
    lambda s: {"state_dict": {"model": s}},
    lambda s: {"net": OrderedDict(s)},
    lambda s: {"uplift": s, "step": torch.tensor(4)},
    lambda s: {"state_dict": {k: v + 1 if v.is_floating_point() else v for k, v in s.items()}, "state_dict_ema": s},
    lambda s: {"model": {}, "model_ema": {"module": 0, **{f"module.{k}": v for k, v in s.items()},
                                          "n_averaged": torch.tensor(7)}},
    lambda s: {f"module._orig_mod.model.uplift.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {**{f"model.{k}": v for k, v in s.items()}, "loss.weight": torch.zeros(3)}},
])
def test_unwraps_what_trainers_save(tmp_path, state, wrap):
    torch.save(wrap(state), tmp_path / "trained.pth")
    assert same(read_weights(tmp_path / "trained.pth").state, state)


def test_prefixes_are_only_taken_off_as_prefixes(state):
    assert strip_prefixes(state) == state
    half = {**{f"module.{k}": v for k, v in state.items()}, **{f"model.{k}": v for k, v in list(state.items())[:5]}}
    assert strip_prefixes(half) == state
    assert strip_prefixes({"module.x": 1, "encoder.block_0.y": 2}) == {"module.x": 1, "encoder.block_0.y": 2}


def test_the_tensors_do_not_hang_on_the_file(tmp_path, state):
    for name in ("a.safetensors", "a.pth"):
        path = tmp_path / name
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        weights = read_weights(path)
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        assert same(weights.state, state)


def test_half_precision_stays(tmp_path, state):
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
    model = build(read_weights(tmp_path / "half.safetensors"))
    assert {p.dtype for p in model.parameters()} == {torch.float16}


# -- the configuration ---------------------------------------------------------------------------------------------

def test_config_from_metadata_then_known_then_shapes(tmp_path, state, config, dino_state):
    save(state, tmp_path / "saved.safetensors", config=config)
    assert config_and_source(read_weights(tmp_path / "saved.safetensors")) == (config, "metadata")
    save_file(state, tmp_path / "bare.safetensors")
    found, source = config_and_source(read_weights(tmp_path / "bare.safetensors"))
    assert source == "shapes" and found == config
    save_file(dino_state, tmp_path / "x.safetensors")
    assert config_and_source(read_weights(tmp_path / "x.safetensors"))[1] == "known model dinov3-splus16"


@pytest.mark.parametrize("name, metadata, expected", [
    ("uplift_dinov2-s14.safetensors", {}, "dinov2-s14"),
    ("DINOv2 mine.safetensors", {}, "dinov2-s14"),
    ("uplift_dinov3-splus16.safetensors", {}, "dinov3-splus16"),
    ("model.safetensors", {}, "dinov3-splus16"),
    ("model.safetensors", {"patch": "14"}, "dinov2-s14"),
    ("model.safetensors", {"latent_space": "dinov2-s14"}, "dinov2-s14"),
    ("dinov2.safetensors", {"latent_space": "dinov3-splus16"}, "dinov3-splus16"),
    ("dinov2.safetensors", {"format": "pt"}, "dinov2-s14"),
])
def test_which_dino(tmp_path, dino_state, name, metadata, expected):
    save_file(dino_state, tmp_path / name, metadata=metadata)
    assert config_for(read_weights(tmp_path / name)) == PRESETS[expected]


def test_metadata_without_a_config_still_counts(tmp_path, state, config):
    save_file(state, tmp_path / "m.safetensors", metadata={"patch": "16", "latent_space": "mine"})
    found = config_for(read_weights(tmp_path / "m.safetensors"))
    assert (found.patch, found.latent_space) == (16, "mine")


@pytest.mark.parametrize("config_text", ["{", "[1]", "{}", '{"encoder": 3, "decoder": {}}', "null"])
def test_damaged_metadata(tmp_path, state, config_text):
    path = tmp_path / "m.safetensors"
    save_file(state, path, metadata={"config": config_text, "channels": "4", "patch": "8"})
    refused(path, "does not fit", how=lambda p: config_for(read_weights(p)))


# -- building ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", [SMALL, "small-vae_no-attender", "small-vae_no-refiner", "small-vae_no-share",
                                  "small-vae_8x_batch2", "dinov2-s14_16x"])
def test_builds_exactly_these_weights(tmp_path, case):
    config = golden_config(case)
    state = rule_state(model_shapes(config))
    save(state, tmp_path / "w.safetensors", config=config)
    model = build(read_weights(tmp_path / "w.safetensors"))
    assert not model.training and model.config == config
    assert same(model.state_dict(), state)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_published_keys_load(tmp_path, dino_state):
    save_file(dino_state, tmp_path / "uplift_dinov2-s14.safetensors")
    model = load(tmp_path / "uplift_dinov2-s14.safetensors", device="cpu")
    assert model.config == PRESETS["dinov2-s14"] and same(model.state_dict(), dino_state)


@pytest.mark.slow
def test_the_large_published_model_loads(tmp_path):
    state = rule_state(published_shapes("sd15-vae"))
    save_file(state, tmp_path / "uplift_sd1.5vae.safetensors")
    model = load(tmp_path / "uplift_sd1.5vae.safetensors", device="cpu")
    assert model.config == PRESETS["sd15-vae"]
    assert sum(p.numel() for p in model.parameters()) == 53_487_445
    assert same(model.state_dict(), state)


def test_missing_batch_counts_are_filled_in(tmp_path, dino_state):
    save_file({k: v for k, v in dino_state.items() if "num_batches" not in k}, tmp_path / "d.safetensors")
    assert build(read_weights(tmp_path / "d.safetensors"))


def test_a_host_brings_its_own_modules(tmp_path, state, config):
    class Mine(Conv2d):
        pass

    class Operations:
        Conv2d, LayerNorm, ConvTranspose2d = Mine, torch.nn.LayerNorm, torch.nn.ConvTranspose2d
        BatchNorm2d = torch.nn.BatchNorm2d

    save(state, tmp_path / "w.safetensors", config=config)
    model = build(read_weights(tmp_path / "w.safetensors"), operations=Operations)
    assert any(type(m) is Mine for m in model.modules()) and same(model.state_dict(), state)


# -- wrong files ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pth"])
def test_missing(tmp_path, name):
    refused(tmp_path / name, "does not exist")
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    refused(tmp_path / name, "link")


def test_directory_and_empty(tmp_path, state):
    save_file(state, tmp_path / "inside.safetensors")
    refused(tmp_path, "is a folder", "inside.safetensors")
    for name in ("e.safetensors", "e.pth"):
        (tmp_path / name).touch()
        refused(tmp_path / name, "empty (0 bytes)")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="this user may read everything")
def test_unreadable(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").chmod(0)
    refused(tmp_path / "w.safetensors", "permission")


def test_unreadable_whoever_asks(tmp_path, state, monkeypatch):
    save_file(state, tmp_path / "w.safetensors")

    def deny(self, *_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    refused(tmp_path / "w.safetensors", "permission denied")


@pytest.mark.parametrize("content, word", [
    (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    (b"\n  <html lang='en'>", "web page"),
    (b"\xef\xbb\xbf<HTML>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 213949780\n", "git-lfs"),
    (b'{"error": "Invalid username or password."}', "text file"),
    (b"Entry not found", "text file"),
    ("Nicht gefunden \u00fc".encode() * 60, "text file"),
    (b"GGUF\x03\0\0\0", "GGUF"),
    (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
    (b"\x05\0\0", "not a safetensors file"),
    (bytes(4096), "not a safetensors file"),
    (b"\xff" * 4096, "not a safetensors file"),
    (struct.pack("<Q", 9) + b"{nonsense" + bytes(20), "damaged safetensors header"),
    (struct.pack("<Q", 8) + b'{"a": 3}' + bytes(20), "damaged safetensors header"),
    (struct.pack("<Q", 14) + b'{"a":{"b":[]}}', "damaged safetensors header"),
])
def test_foreign_content(tmp_path, content, word):
    (tmp_path / "f.safetensors").write_bytes(content)
    refused(tmp_path / "f.safetensors", word)


def test_foreign_content_under_a_torch_suffix(tmp_path):
    (tmp_path / "f.pth").write_bytes(os.urandom(8).replace(b"\x80", b"\0") + bytes(500))
    refused(tmp_path / "f.pth", "f.pth")


@pytest.mark.parametrize("keep", [5, 8, 100, 0.3, 0.9, -1])
def test_truncated_safetensors(tmp_path, state, keep):
    path = tmp_path / "t.safetensors"
    save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(keep * len(whole)) if isinstance(keep, float) else keep])
    refused(path, "cut short" if keep != 5 and keep != 8 else "t.safetensors", "ownload it again")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.97])
def test_truncated_torch_file(tmp_path, state, old, keep):
    path = tmp_path / "t.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(keep * len(whole))])
    refused(path, "cut short")


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_code_is_refused_and_not_run(tmp_path, state, form):
    path, mark = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"state_dict": state, "extra": Evil(mark)}
    if form == "plain":
        path.write_bytes(pickle.dumps(Evil(mark)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refused(path, "holds code", "mkdir", "not loaded")
    assert not mark.exists()


def test_objects_beside_weights(tmp_path, state):
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "argparse.Namespace", "Save only the state dict")
    torch.save(Conv2d(1, 1, 1), tmp_path / "m.pth")
    refused(tmp_path / "m.pth", "holds code")


@pytest.mark.parametrize("content, word", [
    (torch.zeros(3), "single tensor"), ([torch.zeros(2)], "a list"), ({"epoch": 3}, "no state dict"), ({}, "nothing"),
    ({"state_dict": {"state_dict": {}}}, "nothing"),
])
def test_torch_files_without_a_state_dict(tmp_path, content, word):
    torch.save(content, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", word)


def test_zip_that_is_no_torch_file(tmp_path, state):
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as archive:
        archive.writestr("weights.txt", "hello")
    refused(tmp_path / "z.pth", "zip archive without torch weights", "weights.txt")
    with zipfile.ZipFile(tmp_path / "j.pt", "w") as archive:
        for name in ("j/data.pkl", "j/constants.pkl", "j/code/__torch__.py"):
            archive.writestr(name, "")
    refused(tmp_path / "j.pt", "TorchScript")


@pytest.mark.parametrize("keys, word", [
    (["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"], "an SDXL UNet"),
    (["model.diffusion_model.input_blocks.0.0.weight"], "Stable Diffusion UNet"),
    (["conditioner.embedders.0.w", "model.diffusion_model.x", "first_stage_model.y"], "full SDXL checkpoint"),
    (["cond_stage_model.t", "model.diffusion_model.x", "first_stage_model.y"], "full Stable Diffusion checkpoint"),
    (["down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight"], "an SDXL UNet"),
    (["first_stage_model.encoder.conv_in.weight"], "VAE"),
    (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], "VAE"),
    (["encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"], "VAE"),
    (["encoder.layers.0.weight", "decoder.layers.1.weight"], "TAESD"),
    (["lora_unet_down_blocks_0.lora_up.weight", "lora_unet_down_blocks_0.lora_down.weight"], "a LoRA"),
    (["base_model.model.unet.lora_A.weight"], "a LoRA"),
    (["control_model.input_hint_block.0.weight"], "ControlNet"),
    (["double_blocks.0.img_attn.weight"], "diffusion transformer"),
    (["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], "upscaler"),
    (["conv_first.weight", "body.0.rdb1.conv1.weight"], "upscaler"),
    (["cls_token", "blocks.0.attn.qkv.weight"], "DINO"),
    (["fc.weight"], "weights of another model"),
])
def test_models_of_other_families(tmp_path, keys, word):
    tensors = {key: torch.zeros(2) for key in keys}
    save_file(tensors, tmp_path / "o.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "o.ckpt")
    for name in ("o.safetensors", "o.ckpt"):
        refused(tmp_path / name, "is not an UPLiFT", word, keys[0] if word == "weights of another model" else "entry")


def test_our_own_keys_look_like_nobody_else():
    for name in PRESETS:
        assert looks_like(published_shapes(name)) is None


def no_fit(path: Path, state, *words: str, config=None) -> str:
    save_file(state, path)
    return refused(path, "does not fit", *words, how=lambda p: build(read_weights(p), config=config))


def test_first_shape_that_does_not_fit(tmp_path, state, config):
    first = "encoder.block_0.blocks.0.conv.0.weight"
    no_fit(tmp_path / "rgba.safetensors", {**state, first: torch.zeros(8, 4, 3, 3)}, first, "(8, 3, 3, 3)",
           "(8, 4, 3, 3)")
    other = ModelConfig.from_published(config.to_published(), channels=16, patch=8)
    no_fit(tmp_path / "c.safetensors", state, "should be", "(24, 44, 3, 3)", "(24, 32, 3, 3)", config=other)
    key = "decoder.block_0.blocks.0.conv.0.weight"
    no_fit(tmp_path / "d.safetensors", {**state, key: torch.zeros(24, 30, 3, 3)}, "decoder.block_0")


def test_missing_and_unexpected_entries(tmp_path, state):
    gone = "refiner.blocks.1.conv.3.bias"
    no_fit(tmp_path / "m.safetensors", {k: v for k, v in state.items() if k != gone}, "1 of ", gone)
    no_fit(tmp_path / "u.safetensors", {**state, "extra.weight": torch.zeros(1)}, "1 entries", "extra.weight")
    no_fit(tmp_path / "e.safetensors", {k: v for k, v in state.items() if k.startswith("encoder")}, "decoder")


def test_odd_shapes_never_escape_as_other_errors(tmp_path, state):
    shapes = (torch.zeros(()), torch.zeros(3, 5, 7, 11), torch.zeros(1), torch.zeros(2, 0))
    for i, (key, value) in enumerate(state.items()):
        for odd in (shapes[i % 4], shapes[(i + 1) % 4]):
            if odd.shape != value.shape:
                save_file({**state, key: odd}, tmp_path / "odd.safetensors")
                with pytest.raises(UpliftError):
                    build(read_weights(tmp_path / "odd.safetensors"))
        save_file({k: v for k, v in state.items() if k != key}, tmp_path / "odd.safetensors")
        with pytest.raises(UpliftError):
            build(read_weights(tmp_path / "odd.safetensors"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_none(tmp_path, state, bad, dtype):
    key = "decoder.up_1.up.weight"
    broken = {k: v.to(dtype, copy=True) for k, v in state.items()}
    broken[key][0, 0, 0, 0] = bad
    save_file(broken, tmp_path / "n.safetensors")
    refused(tmp_path / "n.safetensors", key, "NaN or infinite")


def test_quantised_weights(tmp_path, state):
    key = next(iter(state))
    no_fit(tmp_path / "q.safetensors", {**state, key: state[key].to(torch.int8)}, key, "int8")


@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
def test_damage_anywhere_is_an_error_of_ours_or_harmless(tmp_path, state, config, form):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save(state, path, config=config)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    whole, chance = path.read_bytes(), random.Random(7)
    for n in range(80):
        broken = bytearray(whole)
        for _ in range(chance.choice([1, 3, 30])):
            broken[chance.choice([chance.randrange(9000), -1 - chance.randrange(9000)])] = chance.randrange(256)
        (tmp_path / f"{n}{path.suffix}").write_bytes(broken)
        try:
            model = build(read_weights(tmp_path / f"{n}{path.suffix}"))
        except UpliftError as error:
            assert path.suffix in str(error)
        else:
            assert model.state_dict().keys() == state.keys()


# -- writing -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, state, config, dtype):
    path = save(state, tmp_path / "deep" / "w.safetensors", config=config, dtype=dtype,
                extra_metadata={"training_step": 12})
    weights = read_weights(path)
    assert config_for(weights) == config and weights.metadata["training_step"] == "12"
    assert same(weights.state, {k: v.to(dtype or v.dtype) for k, v in state.items()})
    again = save(build(weights), tmp_path / "again.safetensors")
    assert config_for(read_weights(again)) == config and same(read_weights(again).state, weights.state)
    assert os.stat(path).st_mode & 0o777 == os.stat(again).st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_save_takes_views_and_wrapped_models(tmp_path, state, config):
    flat = torch.cat([v.reshape(-1) for v in state.values()])
    parts = flat.split([v.numel() for v in state.values()])
    views = {f"module.{k}": p.view(v.shape) for (k, v), p in zip(state.items(), parts, strict=True)}
    path = save(views, tmp_path / "v.safetensors", config=config)
    assert same(read_weights(path).state, state)
    turned = {k: v.transpose(0, 1).contiguous().transpose(0, 1) if v.ndim > 1 else v for k, v in state.items()}
    assert same(read_weights(save(turned, tmp_path / "t.safetensors", config=config)).state, state)


def test_save_is_whole_or_not_at_all(tmp_path, state, config, monkeypatch):
    path = save(state, tmp_path / "w.safetensors", config=config)
    before = path.read_bytes()

    def full(_state, name, metadata=None):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.safetensors.torch, "save_file", full)
    refused(path, "cannot be written", "No space left", how=lambda p: save(state, p, config=config))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_save_calls_that_cannot_work(tmp_path, state, config):
    with pytest.raises(InputError, match="safetensors"):
        save(state, tmp_path / "w.pth", config=config)
    with pytest.raises(InputError, match="config"):
        save(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="latent_space"):
        save(state, tmp_path / "w.safetensors", config=config, extra_metadata={"latent_space": "x"})
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path / "folder.safetensors", "cannot be written", how=lambda p: save(state, p, config=config))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_presets_survive_the_metadata():
    for preset in PRESETS.values():
        assert ModelConfig.from_metadata(json.loads(json.dumps(preset.to_metadata()))) == preset


# -- device and number format --------------------------------------------------------------------------------------

def test_choose_device(monkeypatch):
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(InputError, match="expected auto"):
        choose_device("gpu please")
    there = {"cpu": 1}
    monkeypatch.setattr("uplift_core.devices._count", lambda kind: there.get(kind, 0))
    assert choose_device() == torch.device("cpu")
    with pytest.raises(InputError, match="cuda was asked for but this torch sees no CUDA device"):
        choose_device("cuda:0")
    with pytest.raises(InputError, match="no MPS"):
        choose_device("mps")
    there.update(mps=1)
    assert choose_device("AUTO").type == "mps"
    there.update(cuda=2)
    assert choose_device("auto").type == "cuda" and choose_device("cuda:1").index == 1
    with pytest.raises(InputError, match="2 CUDA devices"):
        choose_device("cuda:2")


def test_choose_dtype(monkeypatch):
    assert choose_dtype("auto", "cpu") == choose_dtype("auto", "mps") == torch.float32
    half = torch.float16 if has_cpu_fp16() else torch.float32
    assert choose_dtype("fp16") == choose_dtype("torch.float16") == choose_dtype(torch.float16) == half
    assert choose_dtype("fp16", "cuda") == torch.float16
    assert choose_dtype("BF16", "cuda") == torch.bfloat16
    for bad in ("int8", "fast", torch.int8, torch.complex64):
        with pytest.raises(InputError, match="fp32, fp16"):
            choose_dtype(bad)
    with pytest.raises(InputError, match="fp64"):
        choose_dtype("fp64", "mps")
    for has, card, expected in ((True, "RTX 4090", torch.bfloat16), (False, "RTX 2080", torch.float16),
                                (False, "NVIDIA GeForce GTX 1660 SUPER", torch.float32)):
        monkeypatch.setattr("uplift_core.devices._has_bf16", lambda _device, has=has: has)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device, card=card: card)
        assert choose_dtype("auto", "cuda") == expected


def test_load_casts(tmp_path, state, config):
    path = save(state, tmp_path / "w.safetensors", config=config)
    assert {p.dtype for p in load(path, device="cpu").parameters()} == {torch.float32}
    assert {p.dtype for p in load(str(path), device="cpu", dtype="bf16").parameters()} == {torch.bfloat16}


def test_a_page_of_misfits_is_cut_to_its_first_lines(tmp_path):
    """A host's own layers may refuse every entry, and torch then lists them all."""
    from types import SimpleNamespace

    from torch import nn

    class Refusing(nn.Conv2d):
        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
            errors.append(f"{prefix}weight is not for this layer")

    path = save(rule_state(model_shapes(golden_config("small-vae_attender9"))), tmp_path / "m.safetensors",
                config=golden_config("small-vae_attender9"))
    operations = SimpleNamespace(Conv2d=Refusing, ConvTranspose2d=nn.ConvTranspose2d, LayerNorm=nn.LayerNorm)
    with pytest.raises(CheckpointError, match="more lines") as refused:
        build(read_weights(path), operations=operations)
    text = str(refused.value)
    assert str(path) in text and "is not for this layer" in text and len(text) < 600 and "\n" not in text
