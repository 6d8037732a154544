"""The codecs: the tiny one, diffusers' AutoencoderTiny, and VAEs of one's own as teachers."""

import csv

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training_runs import AUTOENCODER, command, logged, recipe
from uplift_core import checkpoints, load, load_vae, upscale_image
from uplift_core.errors import CheckpointError, InputError
from uplift_core.training import Trainer
from uplift_core.training.photos import Photos
from uplift_core.training.recipe import DataPart, Recipe
from uplift_core.vae.codec import PatchCodec
from uplift_core.vae.patchnet import BlockStatistics, PatchNet, PatchNetConfig


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


def test_the_command_trains_the_recipe_of_the_bundled_codec_and_the_file_is_a_vae(photos, tmp_path):
    """A few steps with less in the decoder; no recipe named."""
    words = ["train-vae", "--data", photos, "--out", tmp_path / "out", "--cpu"]
    for change in ("data.size=32", "data.batch=4", "run.steps=4", "run.precision=fp32", "run.preview_every=4",
                   "codec.width=8", "codec.blocks=1", "codec.detail=4", "codec.detail_blocks=1", "run.log_every=1"):
        words += ["--set", change]
    done = command(*words)
    assert done.exit_code == 0, done.exception
    path = tmp_path / "out" / "tiny-vae.safetensors"
    assert f"written to {path}" in done.output and "4/4" in done.output
    assert [row["step"] for row in logged(tmp_path / "out")] == ["1", "2", "3", "4"]
    assert [p.name for p in (tmp_path / "out" / "previews").iterdir()] == ["step-00000004.png"]
    codec = load_vae(path)
    assert isinstance(codec, PatchCodec) and (codec.channels, codec.patch, codec.latent_space) == (32, 8, "own")
    image = Photos(photos, DataPart(size=64), 3)[0]["image"][None]
    again = codec.decode(codec.encode(image))
    assert again.shape == image.shape and F.mse_loss(again, image) < 0.1 * image.var()
    done = command("train", "tiny-vae", *words[1:], "--dry-run")
    assert done.exit_code == 1 and "uplift train-vae" in str(done.exception)
