"""The Generate tab through its API, with a tiny diffusers pipeline of random weights saved to disk."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_host import DemoHost, photo
from gradio_client.exceptions import AppError
from PIL import Image

import uplift_core as uplift
from golden_cases import ruled
from rule_weights import golden_config
from uplift_core.checkpoints import save
from uplift_core.imageio import read_settings

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")


def make_pipeline(folder: Path) -> None:
    """Stable Diffusion 1.5 in small: the same kinds of parts, 8 pixels a latent, the same scaling."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = folder / "words"
    words.mkdir(parents=True)
    letters = [chr(n) for n in range(97, 123)]
    vocabulary = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (words / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=16)
    torch.manual_seed(0)
    size = len(vocabulary)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                        num_attention_heads=2, max_position_embeddings=16, bos_token_id=size - 2,
                                        eos_token_id=size - 1, pad_token_id=size - 1))
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                attention_head_dim=2, cross_attention_dim=16,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=64,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                              skip_prk_steps=True)
    StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None,
                            requires_safety_checker=False).save_pretrained(folder / "pipeline")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    make_pipeline(folder)
    save(ruled(replace(golden_config("small-vae_8x_batch2"), latent_space="sd15")), folder / "small.safetensors")
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory, files):
    demo = DemoHost(tmp_path_factory.mktemp("generate"), "--offline", "--checkpoint", str(files / "pipeline"),
                    "--model", str(files / "small.safetensors"))
    yield demo
    demo.close()


def generate(client, prompt="a cat", **options):
    return client.predict(prompt, **{"width": 64, "height": 64, "steps": 3, "seed": 5, **options},
                          api_name="/generate")


def test_the_latents_go_straight_to_uplift(host, files):
    from diffusers import StableDiffusionPipeline

    small, large, facts = generate(host.client(), scale=4)
    assert facts["from"] == [64, 64] and facts["to"] == [256, 256]
    assert set(facts["seconds"]) == {"generate", "decode", "uplift", "decode_large"}
    assert all(s > 0 for s in facts["seconds"].values())
    pipe = StableDiffusionPipeline.from_pretrained(files / "pipeline", safety_checker=None)
    latents = pipe("a cat", width=64, height=64, num_inference_steps=3, output_type="latent",
                   generator=torch.Generator().manual_seed(5)).images / 0.18215
    vae = uplift.load_vae(files / "pipeline")
    with torch.no_grad():
        low = vae.decode(latents)
        net = uplift.load(files / "small.safetensors", device="cpu")
        high = vae.decode(uplift.upscale_latents(net, latents, low, scale=4, seed=5))
        high = uplift.match_color(high, low, "mean").clamp(0, 1)
    for file, expected in ((small, low), (large, high)):
        found = np.asarray(Image.open(file).convert("RGB")).astype(int)
        assert np.abs(found - np.rint(expected[0].permute(1, 2, 0).numpy() * 255)).max() <= 1
    inside = read_settings(large)
    assert inside["prompt"] == "a cat" and inside["seed"] == 5 and inside["scale"] == 4


def test_the_seed_decides(host):
    client = host.client()
    first, again, other = (np.asarray(Image.open(generate(client, seed=s)[0])) for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("options, word", [({"prompt": "  "}, "prompt"), ({"steps": 100000}, "aximum|steps"),
                                           ({"width": 10**6}, "aximum|width"), ({"scale": 3}, "2, 4"),
                                           ({"width": 100}, "multiples of 8"),
                                           ({"model": "uplift-mini"}, "tiny"), ({"model": "nobody"}, "no model"),
                                           ({"checkpoint": "/no/such.safetensors"}, "does not exist")])
def test_bad_requests_are_refused_in_words(host, options, word):
    with pytest.raises(AppError, match=f"(?i){word}"):
        generate(host.client(), **options)
    assert "unexpected error" not in host.log()


def test_files_that_are_no_checkpoints_are_refused(host, files, tmp_path):
    photo().save(tmp_path / "picture.png")
    (tmp_path / "text.safetensors").write_text("words")
    (tmp_path / "folder").mkdir()
    for name, words in (("picture.png", "no checkpoint"), ("text.safetensors", "cannot be loaded|tokenizer"),
                        ("folder", "cannot be loaded")):
        with pytest.raises(AppError, match=words):
            generate(host.client(), checkpoint=str(tmp_path / name))


def test_the_built_in_configuration_is_stable_diffusion_1_5():
    """The parameters of the three networks, as published."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from demo_app.diffusion import CONFIGS

    with torch.device("meta"):
        nets = {UNet2DConditionModel.from_config(CONFIGS["unet/config.json"]): 859_520_964,
                AutoencoderKL.from_config(CONFIGS["vae/config.json"]): 83_653_863,
                CLIPTextModel(CLIPTextConfig(**CONFIGS["text_encoder/config.json"])): 123_060_480}
    for net, count in nets.items():
        assert sum(p.numel() for p in net.parameters()) == count


def test_a_checkpoint_without_a_tokenizer_says_where_to_put_one(host, tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "alone.ckpt")
    with pytest.raises(AppError, match="(?s)vocab.json and merges.txt.*tokenizer"):
        generate(host.client(), checkpoint=str(tmp_path / "alone.ckpt"))


def test_cancel_stops_the_sampler(host):
    client, other = host.client(), host.client()
    job = client.submit("a dog", width=512, height=512, steps=100, api_name="/generate")
    for _ in range(300):
        data = job.status().progress_data
        if data and "enerating" in (data[0].desc or ""):
            break
        time.sleep(0.1)
    begun = time.monotonic()
    job.cancel()
    assert generate(other)
    assert time.monotonic() - begun < 15


def test_without_weights_one_line_says_what_to_do(demo, tmp_path, files):
    with pytest.raises(AppError, match="--checkpoint"):
        generate(demo.client())
    with pytest.raises(AppError, match="Models tab"):
        generate(demo.client(), model="sd15-vae", checkpoint=str(files / "pipeline"))
