"""Codecs between pictures and latents: numbers against diffusers called directly, files as users have them, errors."""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quick_python import python
from uplift_core.errors import (
    Cancelled,
    CheckpointError,
    DownloadError,
    InputError,
    MissingExtra,
    OutOfMemory,
    UpliftError,
)
from uplift_core.memory import free_memory
from uplift_core.vae import LATENT_SPACES, Codec, check_pair, load_vae, scale_latent, unscale_latent
from uplift_core.vae.codec import KLCodec
from uplift_core.vae.layouts import kl_keys
from uplift_core.vae.tiles import pieces

diffusers = pytest.importorskip("diffusers")

SD15 = (128, 256, 512, 512)


def make_kl(widths=(32, 64), layers=1, seed=0, **options):
    torch.manual_seed(seed)
    module = diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=layers, latent_channels=options.pop("latent_channels", 4),
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=options.pop("norm_num_groups", 32), sample_size=64, **options)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "norm" in name:  # ones and zeros would hide a mix-up
                value.add_(0.2 * torch.randn_like(value))
    return module.eval()


def make_tiny(**options):
    torch.manual_seed(1)
    return diffusers.AutoencoderTiny(**options).eval()


def to_ldm(state: dict, levels: int, prefix: str = "", linear: bool = False) -> dict:
    """Diffusers' keys to LDM's, by plain replacement: independent of the mapping under test, in the other direction."""
    out = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part in ("encoder", "decoder"):
            for i in range(levels):
                rest = rest.replace(f"down_blocks.{i}.", f"down.{i}.")
                if rest.startswith(f"up_blocks.{i}."):
                    rest = f"up.{levels - 1 - i}." + rest.split(".", 2)[2]
            if rest.startswith("mid_block"):
                rest = rest.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
                for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
                                     ("to_out.0", "proj_out")):
                    rest = rest.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
            for ours, theirs in (("resnets", "block"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
                                 ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")):
                rest = rest.replace(ours, theirs)
            if "attn_1" in rest and value.ndim == 2 and not linear:
                value = value[:, :, None, None]
        out[f"{prefix}{part}.{rest}"] = value.contiguous()
    return out


def picture(height=32, width=48, batch=1, seed=3):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def latent(height=8, width=12, batch=1, seed=4, channels=4):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, b.std().item())


@torch.no_grad()
def check_like(codec, module):
    """The codec gives what the diffusers module gives when called directly."""
    x, z = picture(), latent()
    close(codec.encode(x), module.encode(x * 2 - 1).latent_dist.mode())
    close(codec.decode(z), ((module.decode(z).sample + 1) / 2).clamp(0, 1))


@pytest.fixture(scope="module")
def kl():
    return make_kl()


@pytest.fixture(scope="module")
def kl_folder(kl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl")
    kl.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_module():
    return make_tiny()


@pytest.fixture(scope="module")
def tiny(tiny_module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "taesd"
    tiny_module.save_pretrained(folder)
    return load_vae(folder)


@pytest.fixture(scope="module")
def codec(kl_folder):
    return load_vae(kl_folder)


# -- conventions ---------------------------------------------------------------------------------------------------

def test_table_holds_the_published_scalings():
    assert {name: (s.channels, s.patch, s.scaling_factor, s.shift) for name, s in LATENT_SPACES.items()} == {
        "sd15": (4, 8, 0.18215, 0.0), "sdxl": (4, 8, 0.13025, 0.0),
        "sd3": (16, 8, 1.5305, 0.0609), "flux": (16, 8, 0.3611, 0.1159),
        "tiny": (32, 8, 1.0, 0.0)}


@pytest.mark.parametrize("space", LATENT_SPACES)
def test_scaling_round_trip(space):
    z = latent(channels=LATENT_SPACES[space].channels)
    close(unscale_latent(scale_latent(z, space), space), z, 1e-6)
    assert torch.allclose(scale_latent(z, space), z) == (space == "tiny")


def test_sd15_scaled_is_smaller():
    assert torch.equal(scale_latent(torch.ones(1, 4, 2, 2), "sd15"), torch.full((1, 4, 2, 2), 0.18215))


def test_channels_and_names_are_checked():
    with pytest.raises(InputError, match=r"16 channels .* looks like a latent of Stable Diffusion 3 or Flux"):
        scale_latent(latent(channels=16), "sd15")
    with pytest.raises(InputError, match="expected one of sd15"):
        scale_latent(latent(), "sd14")
    with pytest.raises(InputError, match="batch x 4"):
        unscale_latent(torch.zeros(4, 8, 8), "sd15")


def test_check_pair():
    for pair in (("sd15", "sd15"), ("", "sdxl"), ("sd15", ""), ("", "")):
        check_pair(*pair)
    with pytest.raises(InputError, match=r"'sd15'.*'sdxl' \(SDXL\).*vae-ft-mse"):
        check_pair("sd15", "sdxl")
    with pytest.raises(InputError, match="dinov2-s14.*sd15-vae"):
        check_pair("dinov2-s14", "sd15")


# -- numbers -------------------------------------------------------------------------------------------------------

def test_kl_equals_diffusers(kl, codec):
    assert isinstance(codec, Codec)
    assert (codec.latent_space, codec.channels, codec.patch, codec.scaling_factor) == ("sd15", 4, 2, 0.18215)
    check_like(codec, kl)
    assert codec.dtype == torch.float32 and codec.device.type == "cpu" and "sd15" in repr(codec)


def test_kl_with_other_groups_comes_from_its_config(tmp_path):
    module = make_kl(widths=(24, 40), norm_num_groups=8)
    module.save_pretrained(tmp_path)
    check_like(load_vae(tmp_path), module)


@torch.no_grad()
def test_tiny_is_on_the_same_unscaled_latents(tiny, tiny_module):
    x, z = picture(), latent(4, 6)
    assert (tiny.latent_space, tiny.patch, tiny.scaling_factor) == ("sd15", 8, 0.18215)
    close(tiny.encode(x), tiny_module.encode(x * 2 - 1).latents / 0.18215)
    close(tiny.to_scaled(tiny.encode(x)), tiny_module.encode(x * 2 - 1).latents)
    close(tiny.decode(z), ((tiny_module.decode(z * 0.18215).sample + 1) / 2).clamp(0, 1))
    close(tiny.from_scaled(tiny.to_scaled(z)), z, 1e-6)


def test_batch_equals_single_runs(codec):
    x, z = picture(batch=3), latent(batch=3)
    for free in (1 << 40, 0):
        for run, value in ((codec.encode, x), (codec.decode, z)):
            single = [run(value[i:i + 1], free_bytes=free) for i in range(3)]
            close(run(value, free_bytes=free), torch.cat(single))


def test_picture_is_clamped_and_carries_no_gradient(codec):
    out = codec.decode(latent().mul(500).requires_grad_())
    assert out.min() >= 0 and out.max() <= 1 and not out.requires_grad


def test_result_is_fp32_in_any_format(codec, kl_folder):
    half = load_vae(kl_folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    out = half.decode(latent())
    assert out.dtype == torch.float32 and (out - codec.decode(latent())).abs().mean() < 0.02
    assert half.to("cpu", torch.float32).dtype == torch.float32


def test_overflow_in_fp16_goes_on_in_fp32(kl_folder, codec, caplog):
    half = load_vae(kl_folder, dtype="fp16")
    half.module.decoder.conv_in.weight.data.mul_(3e3)
    plain = load_vae(kl_folder)
    plain.module.decoder.conv_in.weight.data.copy_(half.module.decoder.conv_in.weight.float())
    z = latent() * 40
    out = half.decode(z)
    assert torch.isfinite(out).all() and half.dtype == torch.float32 and "fp32" in caplog.text
    assert (out - plain.decode(z)).abs().mean() < 1e-2


@pytest.mark.parametrize(("image", "message"), [
    (torch.rand(1, 3, 31, 48), r"48 x 31 pixels and the VAE needs multiples of 2: pad it to 48 x 32.*\(0, 0, 0, 1\)"),
    (torch.rand(3, 32, 48), "batch x 3"),
    (torch.rand(1, 4, 32, 48), "batch x 3"),
    (torch.rand(1, 3, 0, 48), "batch x 3"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "divide 8-bit values by 255"),
    (torch.rand(1, 3, 32, 32) * 255, r"expected \[0, 1\]"),
    (torch.rand(1, 3, 32, 32) * 2 - 1, r"expected \[0, 1\]"),
    (torch.full((1, 3, 32, 32), float("nan")), "NaN"),
])
def test_bad_pictures(codec, image, message):
    with pytest.raises(InputError, match=message):
        codec.encode(image)


def test_bad_latents(codec):
    with pytest.raises(InputError, match="looks like a latent of Stable Diffusion 3 or Flux"):
        codec.decode(latent(channels=16))
    with pytest.raises(InputError, match="NaN"):
        codec.decode(latent() * float("inf"))
    for tile in (0, -8, "big", 2.5, True):
        with pytest.raises(InputError, match="tile is"):
            codec.decode(latent(), tile=tile)


def test_the_advised_padding_works(tiny):
    with pytest.raises(InputError, match=r"pad it to 8 x 8 with .*\(0, 7, 0, 7\)"):
        tiny.encode(picture(1, 1))
    image = torch.nn.functional.pad(picture(1, 1), (0, 7, 0, 7), mode="replicate")
    assert tiny.encode(image).shape == (1, 4, 1, 1)


# -- tiles ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("size", "tile", "margin", "blend"), [
    (64, 64, 16, 8), (65, 64, 16, 8), (100, 7, 16, 8), (13, 1, 16, 8), (200, 32, 16, 8), (9, 4, 19, 0), (1, 1, 1, 1)])
def test_weights_of_pieces_add_up_to_one(size, tile, margin, blend):
    total = torch.zeros(size * 8)
    for piece in pieces(size, tile, margin, blend, 8):
        assert 0 <= piece.lo <= piece.use_lo < piece.use_hi <= piece.hi <= size
        total[piece.use_lo * 8:piece.use_hi * 8] += piece.weight
    close(total, torch.ones(size * 8), 1e-5)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A narrow TAESD with large weights, in which pixels far away matter."""
    module = make_tiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    with torch.no_grad():
        for value in module.parameters():
            value.mul_(1.7)
    folder = tmp_path_factory.mktemp("narrow") / "taesd"
    module.save_pretrained(folder)
    return load_vae(folder)


@pytest.mark.parametrize("tile", [1, 64, 100, 160])
def test_tiles_of_tiny_are_exact(narrow, tile):
    height, width = (45, 53) if tile > 1 else (3, 5)
    z, x = latent(height, width, batch=2), picture(height * 8, width * 8, batch=2)
    whole = narrow.decode(z, tile=None)
    assert whole.std() > 0.01
    assert (narrow.decode(z, tile=tile) - whole).abs().max() < 1e-4 * whole.std()
    whole = narrow.encode(x, tile=None)
    assert (narrow.encode(x, tile=tile) - whole).abs().max() < 1e-4 * whole.std()


def test_tiles_of_kl_are_close(codec):
    z, x = latent(70, 90), picture(140, 180)
    whole = codec.decode(z, tile=None)
    error = (codec.decode(z, tile=64) - whole).square().mean()
    assert 10 * torch.log10(1 / error) > 35
    encoded = codec.encode(x, tile=None)
    assert (codec.encode(x, tile=64) - encoded).abs().mean() < 0.05 * encoded.std()


def test_auto_tiles_only_when_memory_is_short(codec):
    calls: list[tuple[int, int]] = []
    z = latent(200, 210)
    codec.decode(z, free_bytes=1 << 40, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 1)]
    need = codec.estimate_memory("decode", 400, 420)
    tiles = codec.estimate_memory("decode", 400, 420, tile=256)
    assert tiles < need
    calls.clear()
    codec.decode(z, free_bytes=tiles, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 4) for i in range(1, 5)]


def test_estimate_grows_with_size_and_is_bounded_by_tiles(codec):
    sizes = [codec.estimate_memory("decode", n, n) for n in (64, 256, 1024)]
    assert sizes == sorted(set(sizes))
    tiles = [codec.estimate_memory("decode", n, n, tile=256) for n in (4096, 8192)]
    assert tiles[0] == tiles[1]
    assert codec.estimate_memory("encode", 256, 256, batch=4) > codec.estimate_memory("encode", 256, 256)
    with pytest.raises(InputError):
        codec.estimate_memory("both", 8, 8)


def test_out_of_memory_is_caught_and_the_tile_halved(codec, monkeypatch, caplog):
    expected, seen = codec.decode(latent(100, 100), tile=128), []
    real = codec._decode

    def short(part):
        seen.append(max(part.shape[-2:]))
        if seen[-1] > 70:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(part)

    monkeypatch.setattr(codec, "_decode", short)
    close(codec.decode(latent(100, 100), free_bytes=1 << 40), expected, 1e-5)
    assert seen[0] == 100 and "smaller parts" in caplog.text
    with pytest.raises(OutOfMemory, match="tile='auto'"):
        codec.decode(latent(100, 100), tile=None)
    monkeypatch.setattr(codec, "_decode", lambda part: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(OutOfMemory, match="close other programs"):
        codec.decode(latent(100, 100))
    monkeypatch.setattr(codec, "_decode", lambda part: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        codec.decode(latent())


def test_stop(codec):
    done = []
    with pytest.raises(Cancelled):
        codec.decode(latent(100, 100), tile=64, progress=lambda d, t: done.append(d),
                     should_stop=lambda: len(done) == 2)
    assert done == [1, 2]
    with pytest.raises(Cancelled):
        codec.decode(latent(), should_stop=lambda: True)


def test_free_memory_is_plausible():
    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50


# -- files ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("widths", [(32, 64), (32, 32, 64), (32, 64, 96, 96)])
@pytest.mark.parametrize("linear", [False, True])
def test_ldm_file(tmp_path, widths, linear):
    module = make_kl(widths, layers=2)
    save_file(to_ldm(module.state_dict(), len(widths), linear=linear), str(tmp_path / "vae.safetensors"))
    codec = load_vae(tmp_path / "vae.safetensors")
    assert codec.latent_space == "sd15" and codec.patch == 2 ** (len(widths) - 1)
    for key, value in module.state_dict().items():
        assert torch.equal(codec.module.state_dict()[key], value), key
    x = picture(32, 48)
    close(codec.encode(x), module.encode(x * 2 - 1).latent_dist.mode().detach())


def test_mapping_agrees_with_diffusers_own(kl):
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    if not hasattr(single_file, "convert_ldm_vae_checkpoint"):
        pytest.skip("this diffusers has no converter")
    ldm = to_ldm(kl.state_dict(), 2)
    theirs = single_file.convert_ldm_vae_checkpoint(dict(ldm), dict(kl.config))
    assert set(theirs) == set(kl_keys({key: key for key in ldm}))
    for new, old in kl_keys({key: key for key in ldm}).items():
        assert torch.equal(theirs[new].flatten(), ldm[old].flatten()), new


def full_checkpoint(module, levels=2, text="cond_stage_model."):
    return {**to_ldm(module.state_dict(), levels, "first_stage_model."),
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3),
            f"{text}transformer.text_model.embeddings.position_ids": torch.zeros(1, 77),
            "first_stage_model.loss.logvar": torch.zeros(1),
            "alphas_cumprod": torch.ones(10)}


@pytest.mark.parametrize(("text", "space"), [("cond_stage_model.", "sd15"), ("conditioner.embedders.0.", "sdxl")])
def test_full_checkpoint_reads_only_the_vae(tmp_path, kl, monkeypatch, text, space):
    path = tmp_path / "model.safetensors"
    save_file(full_checkpoint(kl, text=text), str(path))
    import safetensors

    read, real = [], safetensors.safe_open

    class Spy:
        def __init__(self, *args, **options):
            self.file = real(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(safetensors, "safe_open", Spy)
    codec = load_vae(str(path))
    assert codec.latent_space == space
    assert len(read) == len(kl.state_dict()) and all(key.startswith("first_stage_model.") for key in read)
    check_like(codec, kl)


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth"])
@pytest.mark.parametrize("old", [False, True])
def test_torch_file(tmp_path, kl, suffix, old):
    path = tmp_path / f"model.{suffix}"
    torch.save({"state_dict": full_checkpoint(kl), "epoch": 3}, path, _use_new_zipfile_serialization=not old)
    check_like(load_vae(path), kl)


def test_diffusers_layout_and_old_attention_names(tmp_path, kl):
    save_file(kl.state_dict(), str(tmp_path / "new.safetensors"))
    check_like(load_vae(tmp_path / "new.safetensors"), kl)
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in kl.state_dict().items():
        for new, name in renames.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        old[key] = value
    save_file(old, str(tmp_path / "old.safetensors"))
    check_like(load_vae(tmp_path / "old.safetensors"), kl)
    folder = tmp_path / "folder"
    kl.save_pretrained(folder)
    save_file(old, str(folder / "diffusion_pytorch_model.safetensors"))
    check_like(load_vae(folder), kl)


def test_half_file_is_computed_in_what_was_asked(tmp_path, kl):
    save_file({k: v.half() for k, v in to_ldm(kl.state_dict(), 2).items()}, str(tmp_path / "v.safetensors"))
    codec = load_vae(tmp_path / "v.safetensors")
    assert all(p.dtype == torch.float32 for p in codec.module.parameters())


def test_loaded_weights_do_not_hang_on_the_file(tmp_path, kl):
    path = tmp_path / "v.safetensors"
    save_file(to_ldm(kl.state_dict(), 2), str(path))
    codec = load_vae(path)
    path.write_bytes(bytes(path.stat().st_size))
    check_like(codec, kl)


def test_flux_like_without_quant_conv(tmp_path):
    try:
        module = make_kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    except TypeError:
        pytest.skip("this diffusers is older than VAEs without quant_conv")
    path = tmp_path / "ae.safetensors"
    save_file(to_ldm(module.state_dict(), 2), str(path))
    codec = load_vae(path)
    assert (codec.latent_space, codec.shift) == ("flux", 0.1159)
    z = latent(channels=16)
    close(codec.from_scaled(codec.to_scaled(z)), z, 1e-5)
    other = path.rename(tmp_path / "some.safetensors")
    with pytest.raises(InputError, match="sd3 or flux"):
        load_vae(other)
    assert load_vae(other, latent_space="sd3").latent_space == "sd3"


def test_pipeline_folder(tmp_path, kl):
    kl.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    check_like(load_vae(tmp_path), kl)


def test_bin_folder(tmp_path, kl):
    kl.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors"))
    check_like(load_vae(tmp_path), kl)


def test_latent_space_is_recognised(tmp_path, kl, caplog):
    ldm = to_ldm(kl.state_dict(), 2)
    save_file(ldm, str(tmp_path / "sdxl_vae.safetensors"))
    assert load_vae(tmp_path / "sdxl_vae.safetensors").scaling_factor == 0.13025
    assert load_vae(tmp_path / "sdxl_vae.safetensors", latent_space="sd15").scaling_factor == 0.18215
    save_file(ldm, str(tmp_path / "a.safetensors"),
              metadata={"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"})
    assert load_vae(tmp_path / "a.safetensors").latent_space == "sdxl"
    make_kl(scaling_factor=0.13025).save_pretrained(tmp_path / "x")
    assert load_vae(tmp_path / "x").latent_space == "sdxl"
    assert load_vae(tmp_path / "x", latent_space="sd15").latent_space == "sd15" and "'sdxl'" in caplog.text
    make_kl(scaling_factor=0.5).save_pretrained(tmp_path / "own")
    own = load_vae(tmp_path / "own")
    assert (own.latent_space, own.scaling_factor) == ("", 0.5)
    with pytest.raises(InputError, match="expected one of"):
        load_vae(tmp_path / "x", latent_space="sd2")
    with pytest.raises(InputError, match="4-channel latents and latent_space='flux' has 16"):
        load_vae(tmp_path / "x", latent_space="flux")


def taesd_pair(module, folder: Path, name: str = "taesd"):
    """The two files as TAESD is published: plain sequential keys, the decoder one up for the clamp in front."""
    halves: dict[str, dict] = {"encoder": {}, "decoder": {}}
    for key, value in module.state_dict().items():
        half, _, index, rest = key.split(".", 3)
        halves[half][f"{int(index) + (half == 'decoder')}.{rest}"] = value
    paths = []
    for half, state in halves.items():
        save_file(state, str(folder / f"{name}_{half}.safetensors"))
        paths.append(folder / f"{name}_{half}.safetensors")
    return paths


def test_taesd_pair(tmp_path, tiny, tiny_module):
    for path in taesd_pair(tiny_module, tmp_path):
        codec = load_vae(path)
        assert codec.latent_space == "sd15" and codec.module.config.num_decoder_blocks == (3, 3, 3, 1)
        assert torch.equal(codec.decode(latent()), tiny.decode(latent()))
        assert torch.equal(codec.encode(picture()), tiny.encode(picture()))
    assert load_vae(taesd_pair(tiny_module, tmp_path, "taesdxl")[1]).latent_space == "sdxl"
    assert load_vae(taesd_pair(make_tiny(latent_channels=16), tmp_path, "taef1")[0]).latent_space == "flux"


def test_taesd_in_one_file(tmp_path, tiny, tiny_module):
    save_file(tiny_module.state_dict(), str(tmp_path / "a.safetensors"))
    assert torch.equal(load_vae(tmp_path / "a.safetensors").decode(latent()), tiny.decode(latent()))


def test_taesd_without_its_other_half(tmp_path, tiny_module):
    encoder, decoder = taesd_pair(tiny_module, tmp_path)
    odd = shutil.copy(encoder, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="does not say which file the decoder is"):
        load_vae(odd)
    shutil.copy(encoder, decoder)
    with pytest.raises(CheckpointError, match="not the decoder that belongs to taesd_encoder"):
        load_vae(encoder)
    decoder.unlink()
    with pytest.raises(CheckpointError, match=r"put its decoder beside it as taesd_decoder\.safetensors"):
        load_vae(encoder)


# -- wrong files ---------------------------------------------------------------------------------------------------

def wrong_files(folder: Path, kl) -> dict[str, tuple[Path, str]]:
    ldm = to_ldm(kl.state_dict(), 2)
    out = {}

    def tensors(name, state, message):
        save_file(state, str(folder / f"{name}.safetensors"))
        out[name] = (folder / f"{name}.safetensors", message)

    def content(name, data, message):
        (folder / name).write_bytes(data)
        out[name] = (folder / name, message)

    tensors("unet", {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(3)}, "UNet.*input_blocks")
    tensors("lora", {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(3)}, "LoRA.*lora_unet")
    tensors("clip", {"text_model.embeddings.weight": torch.zeros(3)}, "text encoder")
    tensors("none", {}, "no entries")
    tensors("decoder_only", {k: v for k, v in ldm.items() if k.startswith(("decoder", "post"))}, "decoder alone")
    key = "decoder.mid.block_2.conv1.weight"
    tensors("missing", {k: v for k, v in ldm.items() if k != key},
            r"1 of \d+ .*decoder.mid_block.resnets.1.conv1.weight")
    tensors("extra", {**ldm, "encoder.down.0.attn.0.q.weight": torch.zeros(2)}, r"no place.*encoder.down.0.attn.0.q")
    tensors("shape", {**ldm, key: torch.zeros(64, 32, 3, 3)}, r"should be \(64, 64, 3, 3\) and is \(64, 32, 3, 3\)")
    tensors("vector", {**ldm, "decoder.conv_in.weight": torch.zeros(4)}, "decoder.conv_in.weight")
    tensors("scalar", {**ldm, "encoder.down.0.block.0.conv1.weight": torch.zeros(())}, "encoder.down_blocks.0")
    tensors("ints", {**ldm, key: torch.zeros(64, 64, 3, 3, dtype=torch.int8)}, "torch.int8")
    tensors("nan", {**ldm, key: torch.full((64, 64, 3, 3), float("nan"))}, "NaN")
    tensors("video", {**ldm, key: torch.zeros(64, 64, 3, 3, 3)}, "for video")
    tensors("widths", to_ldm(make_kl((24, 48), norm_num_groups=8).state_dict(), 2), r"\[24, 48\]; expected multiples")
    tensors("eight", to_ldm(make_kl(latent_channels=8).state_dict(), 2), "8-channel latents; known are 4")
    tensors("tiny_odd", {"encoder.layers.1.conv.0.weight": torch.zeros(2, 2, 3, 3), "decoder.layers.0.weight":
            torch.zeros(2, 2, 3, 3)}, "first and last convolution")
    tensors("tiny_half", {"decoder.layers.2.conv.0.weight": torch.zeros(2, 2, 3, 3)}, "no entries of the encoder")
    good = (folder / "missing.safetensors").read_bytes()
    content("empty.safetensors", b"", "empty")
    content("cut.safetensors", good[:len(good) // 2], "cut short")
    content("cut_header.safetensors", good[:100], "cut short")
    content("page.safetensors", b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page")
    content("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs")
    content("noise.safetensors", b"\xa7" * 999, "header")
    content("page.ckpt", b"<html></html>", "web page")
    torch.save({"state_dict": ldm}, folder / "whole.ckpt")
    content("cut.ckpt", (folder / "whole.ckpt").read_bytes()[:9999], "cut short")
    torch.save({"state_dict": ldm, "hook": subprocess.Popen}, folder / "code.ckpt")
    out["code"] = (folder / "code.ckpt", "code or objects")
    out["absent"] = (folder / "absent.safetensors", "does not exist")
    for name, config, message in (("no_config", None, "no config.json"), ("bad_json", "{", "JSON"),
                                  ("other", '{"_class_name": "UNet2DConditionModel"}', "UNet2DConditionModel"),
                                  ("a_list", "[]", "no model"),
                                  ("no_weights", '{"_class_name": "AutoencoderKL"}', "no weights"),
                                  ("bad_config", json.dumps({**kl.config, "_class_name": "AutoencoderKL",
                                   "block_out_channels": [30, 64]}), "cannot be built")):
        (folder / name).mkdir()
        if config is not None:
            (folder / name / "config.json").write_text(config)
        if name == "bad_config":
            save_file(kl.state_dict(), str(folder / name / "diffusion_pytorch_model.safetensors"))
        out[name] = (folder / name, message)
    return out


def test_wrong_files_each_give_one_clear_error(tmp_path, kl):
    for name, (path, message) in wrong_files(tmp_path, kl).items():
        with pytest.raises(CheckpointError) as caught:
            load_vae(path)
        assert str(path) in str(caught.value), f"{name}: {caught.value}"
        assert re.search(message, str(caught.value)), f"{name}: {caught.value}"


def test_folder_with_a_partial_file_is_not_half_loaded(tmp_path, kl):
    kl.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(str(path))
    state.pop("decoder.conv_out.bias")
    save_file(state, str(path))
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias"):
        load_vae(tmp_path)


def test_broken_diffusers_is_not_called_missing(tmp_path, kl, monkeypatch):
    save_file(to_ldm(kl.state_dict(), 2), str(tmp_path / "v.safetensors"))
    real = builtins.__import__

    def broken(name, *args, **options):
        if name == "diffusers":
            raise ImportError("cannot import name 'cached_download'", name="huggingface_hub")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(UpliftError, match=r"installed but cannot be imported \(cannot import name 'cached_download'\)"):
        load_vae(tmp_path / "v.safetensors")


def test_without_diffusers(tmp_path, kl, monkeypatch):
    save_file(to_ldm(kl.state_dict(), 2), str(tmp_path / "v.safetensors"))
    real = builtins.__import__

    def blocked(name, *args, **options):
        if name.partition(".")[0] == "diffusers":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(MissingExtra, match=r"diffusers.*uplift-upscale\[vae\]"):
        load_vae(tmp_path / "v.safetensors")


# -- the hub, out of reach -----------------------------------------------------------------------------------------

def fake_cache(home: Path, repo: str, files: dict[str, Path]) -> None:
    """What huggingface_hub leaves in HF_HOME after a download."""
    base = home / "hub" / f"models--{repo.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(revision)
    for name, source in files.items():
        target = base / "snapshots" / revision / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


SCRIPT = """
import sys, torch
import uplift_core.vae as vae
assert "diffusers" not in sys.modules
for name in sys.argv[1:]:
    try:
        print(name, vae.load_vae(name).latent_space, sep="|")
    except Exception as error:
        print(name, type(error).__name__, error, sep="|")
"""


def run_offline(home: Path, names: list[str], **environment: str) -> dict[str, str]:
    root = Path(__file__).parents[1]
    env = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(root), **environment}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"):
        env.pop(name, None)
    done = python("-c", SCRIPT, *names, env=env)
    assert done.returncode == 0, done.stderr
    return dict(line.split("|", 1) for line in done.stdout.splitlines())


def test_hub_names_come_from_the_cache_offline(tmp_path, kl_folder, tiny_module):
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    fake_cache(tmp_path, "stable-diffusion-v1-5/stable-diffusion-v1-5",
               {f"vae/{name}": kl_folder / name for name in names})
    fake_cache(tmp_path, "someone/a-vae", {name: kl_folder / name for name in names})
    tiny_module.save_pretrained(tmp_path / "t")
    fake_cache(tmp_path, "madebyollin/taesdxl", {name: tmp_path / "t" / name for name in names})
    sd15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    out = run_offline(tmp_path, ["sd15", sd15, f"{sd15}:vae", "someone/a-vae", "taesdxl", "some/other", "taesd"],
                      HF_HUB_OFFLINE="1")
    for name in ("sd15", sd15, f"{sd15}:vae", "someone/a-vae"):
        assert out[name] == "sd15"
    assert out["taesdxl"] == "sdxl"
    for name, repo in (("some/other", "some/other"), ("taesd", "madebyollin/taesd")):
        assert out[name].startswith("DownloadError|") and "HF_HUB_OFFLINE" in out[name]
        assert f"https://huggingface.co/{repo}" in out[name] and "that folder's path" in out[name]


def test_hub_out_of_reach_names_the_endpoint(tmp_path, monkeypatch):
    from huggingface_hub import constants

    def unreachable(repo, filename):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match=r"downloaded from https://mirror\.example/stable-diffusion-v1-5/"
                                            r"stable-diffusion-v1-5: https://mirror\.example cannot be reached.*"
                                            r"its folder vae/ config.json and diffusion_pytorch_model.safetensors"):
        load_vae("sd15")


def test_repository_without_a_vae(monkeypatch):
    from huggingface_hub.utils import EntryNotFoundError

    from uplift_core.vae import loading

    class Gone(EntryNotFoundError):
        def __init__(self):
            pass

    def gone(repo, filename):
        raise Gone

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gone)
    monkeypatch.setattr(loading.hub, "cached", lambda *args: None)
    with pytest.raises(DownloadError, match="some/thing holds no VAE.*top folder or in vae/"):
        load_vae("some/thing")


def test_hub_download_walks_the_places(monkeypatch, kl, kl_folder, tmp_path):
    from huggingface_hub.utils import EntryNotFoundError

    from uplift_core.vae import loading

    class Gone(EntryNotFoundError):
        def __init__(self):
            pass

    shutil.copytree(kl_folder, tmp_path / "vae")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')

    def download(repo, filename):
        if not (tmp_path / filename).is_file():
            raise Gone
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(loading.hub, "cached", lambda *args: None)
    check_like(load_vae("some/thing"), kl)


def test_names_that_are_neither(tmp_path):
    for name in ("nothing", "a/b/c", "models/vae.safetensors", "C:\\vae"):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_vae(name)
    assert issubclass(CheckpointError, UpliftError)


# -- the real shape ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_sd15_shape(tmp_path):
    module = make_kl(SD15, layers=2)
    path = tmp_path / "sd15.safetensors"
    save_file(full_checkpoint(module, 4), str(path))
    codec = load_vae(path)
    assert isinstance(codec, KLCodec) and codec.patch == 8 and codec.latent_space == "sd15"
    assert sum(p.numel() for p in codec.module.parameters()) == 83_653_863
    x = picture(64, 72)
    with torch.no_grad():
        z = codec.encode(x)
        close(z, module.encode(x * 2 - 1).latent_dist.mode())
        close(codec.decode(z), (module.decode(z).sample / 2 + 0.5).clamp(0, 1))
    assert z.shape == (1, 4, 8, 9)
