"""The numbers and the memory of a real graphics device (CUDA, XPU or MPS); skipped where there is none.

UPLIFT_TEST_DEVICE=cpu runs what of it a CPU can, to try the tests themselves.
"""

from __future__ import annotations

import copy
import gc
import os

import pytest
import torch
from typer.testing import CliRunner

from golden_cases import CASES, TOLERANCE, difference, golden, ruled
from test_memory import slim
from uplift_core import PRESETS, UPLiFT, dense_features, estimate_memory, load, load_vae, upscale_image, upscale_latents
from uplift_core.attender import pool, pool_reference
from uplift_core.cli import app
from uplift_core.devices import choose_device, choose_dtype
from uplift_core.errors import OutOfMemory
from uplift_core.forms import fast_forms
from uplift_core.measure import peak_memory, start_peak

DEVICE = torch.device(os.environ.get("UPLIFT_TEST_DEVICE") or choose_device("auto"))
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu" and "UPLIFT_TEST_DEVICE" not in os.environ,
                                reason="there is no graphics device here")
counted = pytest.mark.skipif(DEVICE.type not in ("cuda", "xpu"), reason="torch counts no peak of this device")
limited = pytest.mark.skipif(DEVICE.type != "cuda", reason="torch can limit the memory of CUDA alone")
HALVES = {torch.bfloat16: 0.1, torch.float16: 0.02}  # mean difference allowed, in standard deviations


@pytest.fixture
def exact():
    """fp32 that is fp32: torch's convolutions would be TF32. (cuDNN then takes workspaces of gigabytes.)"""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def moved(model, dtype=torch.float32):
    return copy.deepcopy(model).to(DEVICE, dtype)


def placed(model):
    return next(model.parameters()).device.type


def inputs(h, w, channels=4, patch=8, b=1):
    torch.manual_seed(h * 100 + w)
    return torch.randn(b, channels, h, w), torch.rand(b, 3, patch * h, patch * w)


def used(work):
    """Bytes of the device that ``work`` took at most beyond what was there, and what it returned."""
    gc.collect()
    start_peak(DEVICE)
    before = peak_memory(DEVICE)
    result = work()
    return peak_memory(DEVICE) - before, result


def test_auto_takes_it():
    assert placed(load("uplift-mini")) == DEVICE.type
    assert choose_dtype("auto", DEVICE) in (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("form", ["plain", "fast", "compiled", "contiguous", "small bands"])
@pytest.mark.parametrize("name", CASES)
def test_golden(name, form):
    case = golden(name)
    changes = {"compiled": {"compiled": True}, "contiguous": {"channels_last": False},
               "small bands": {"band_pixels": 64}}.get(form, {})
    with fast_forms(**changes):
        results = moved(case.model)(case.image.to(DEVICE), case.latent.to(DEVICE), case.steps, noise=case.noise(),
                                    return_steps=True, outsize=case.outsize,
                                    form="plain" if form == "plain" else "fast")
    for step, expected in case.expected.items():
        assert results[step - 1].device.type == DEVICE.type
        assert difference(results[step - 1].cpu(), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_half_formats_stay_near(name, dtype):
    case = golden(name)
    result = moved(case.model, dtype)(case.image.to(DEVICE), case.latent.to(DEVICE), case.steps, noise=case.noise(),
                                      outsize=case.outsize)
    expected = case.expected[case.steps]
    assert result.isfinite().all()
    assert (result.cpu().float() - expected).abs().mean() < HALVES[dtype] * expected.std()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_attender_stays_within_its_neighbours(dtype):
    torch.manual_seed(0)
    for channels in (4, 48):
        value = (torch.randn(2, channels, 9, 11) * 9).to(DEVICE, dtype)
        weights = torch.randn(2, 17, 18, 22, device=DEVICE).softmax(1)
        exact = pool_reference(weights.double().cpu(), value.double().cpu())
        found = pool(weights, value, 2).double().cpu()
        assert (found - exact).abs().max() < {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}[dtype]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("scale", "tile"), [(2, 72), (4, 100), (8, 64)])
def test_tiled_is_whole(scale, tile):
    model = moved(golden("small-vae_8x_batch2").model)
    latents, image = inputs(13, 21, b=2)
    whole = upscale_latents(model, latents.to(DEVICE), image.to(DEVICE), scale=scale, seed=7, tile=None).cpu()
    assert difference(upscale_latents(model, latents, image, scale=scale, seed=7, tile=tile), whole) < TOLERANCE
    on_cpu = upscale_latents(golden("small-vae_8x_batch2").model, latents, image, scale=scale, seed=7, tile=None)
    assert difference(whole, on_cpu) < TOLERANCE  # the same noise, too


@limited
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_out_of_memory_shrinks_the_tiles(dtype, caplog):
    model = moved(ruled(PRESETS["sd15-vae"]), dtype)
    latents, image = inputs(96, 96)
    peak, expected = used(lambda: upscale_latents(model, latents, image, tile=None))
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.6 * peak) / total)
    try:
        with pytest.raises(OutOfMemory, match="tile"):
            upscale_latents(model, latents, image, tile=None)
        found = upscale_latents(model, latents, image, tile="auto", memory_budget="500GB")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "going on in tiles" in caplog.text
    assert (found - expected).abs().mean() < 0.01 * expected.std()


@counted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [None, 256])
@pytest.mark.parametrize("preset", ["sd15-vae", "dinov3-splus16"])
def test_the_estimate_holds(preset, tile, dtype):
    config = PRESETS[preset]
    model = moved(ruled(config), dtype)
    side, scale = (512, 2) if preset == "sd15-vae" else (448, 16)
    latents, image = inputs(side // config.patch, side // config.patch, config.channels, config.patch)
    upscale_latents(model, latents[..., :8, :8], image[..., :8 * config.patch, :8 * config.patch])  # what loads once
    peak, result = used(lambda: upscale_latents(model, latents, image, scale=scale, tile=tile))
    estimate = estimate_memory(model, side, side, scale, tile, dtype)
    here = result.numel() * result.element_size() if result.device == DEVICE else 0
    print(f"{preset} {tile} {dtype}: peak {peak >> 20} MB, estimate {estimate >> 20} MB, result {here >> 20}")
    assert peak < estimate + here


@counted
def test_a_budget_holds_for_a_4096_pixel_guide():
    model = moved(UPLiFT(slim()).requires_grad_(False).eval())
    latents, image = inputs(512, 512)
    assert estimate_memory(model, 4096, 4096, 2) > 400 << 20
    peak, result = used(lambda: upscale_latents(model, latents, image, memory_budget="200MB"))
    print(f"4096 px under 200 MB: {peak >> 20} MB")
    assert result.isfinite().all() and peak < (200 << 20) + result.numel() * 4


@pytest.mark.parametrize("dtype", ["auto", "fp32", "fp16", "bf16"])
def test_pictures(dtype):
    vae = load_vae("tiny", device=DEVICE, dtype=dtype)
    small = torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(0))
    picture = torch.nn.functional.interpolate(small[None], (90, 123), mode="bicubic")[0].clamp(0, 1)
    found = upscale_image(load("uplift-mini", device=DEVICE, dtype=dtype), vae, picture, scale=3)
    expected = upscale_image(load("uplift-mini", device="cpu"), load_vae("tiny", device="cpu"), picture, scale=3)
    assert found.shape == (3, 270, 369) and found.device.type == "cpu"
    assert (found - expected).abs().mean() < 0.02


def test_a_vae_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    from uplift_core.vae.codec import KLCodec

    torch.manual_seed(0)
    widths = (128, 256, 512, 512)
    module = diffusers.AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4,
                                     down_block_types=("DownEncoderBlock2D",) * 4,
                                     up_block_types=("UpDecoderBlock2D",) * 4)
    latent, picture = inputs(64, 64)
    with torch.no_grad():
        expected = (module.decode(latent[..., :16, :16]).sample * 0.5 + 0.5).clamp(0, 1)
    codec = KLCodec(module, "sd15", scaling_factor=0.18215).to(DEVICE)
    assert difference(codec.decode(latent[..., :16, :16], tile=None), expected) < 0.02  # TF32
    for dtype in (torch.float32, torch.bfloat16):
        codec.to(dtype=dtype)
        scale = 1 if dtype == torch.float32 else 0.5
        for name, compute, bytes_ in (("encode", lambda: codec.encode(picture, tile=None), codec.encode_bytes),
                                      ("decode", lambda: codec.decode(latent, tile=None), codec.decode_bytes)):
            compute()
            if DEVICE.type in ("cuda", "xpu"):
                peak, _ = used(compute)
                print(f"VAE {name} {dtype}: {peak / 512 / 512:.0f} bytes a pixel, {bytes_ * scale:.0f} expected")
                assert peak < bytes_ * scale * 512 * 512


@limited
def test_a_vae_out_of_memory_goes_on_in_tiles():
    diffusers = pytest.importorskip("diffusers")
    from uplift_core.vae.codec import KLCodec

    torch.manual_seed(0)
    module = diffusers.AutoencoderKL(block_out_channels=(64, 128), layers_per_block=1, latent_channels=4,
                                     down_block_types=("DownEncoderBlock2D",) * 2,
                                     up_block_types=("UpDecoderBlock2D",) * 2)
    codec = KLCodec(module, "sd15", scaling_factor=0.18215).to(DEVICE)
    latent = inputs(640, 640)[0]
    codec.decode(latent[..., :64, :64])
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (900 << 20)) / total)
    try:
        found = codec.decode(latent, free_bytes=1 << 45)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tuple(found.shape) == (1, 3, 1280, 1280) and found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_features(dtype):
    timm = pytest.importorskip("timm")
    from uplift_core.backbones import BACKBONES, Backbone

    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0, depth=1, dynamic_img_size=True)
    space, picture = "dinov3-splus16", torch.rand(3, 75, 90)
    on_cpu = dense_features(picture, backbone=Backbone(copy.deepcopy(net), BACKBONES[space]),
                            model=ruled(PRESETS[space]), dtype=torch.float32, tile=None)
    there = dense_features(picture, backbone=Backbone(net.to(DEVICE, dtype), BACKBONES[space]),
                           model=moved(ruled(PRESETS[space]), dtype), dtype=torch.float32, tile=None)
    one, other = (made.read(slice(0, 75)).float() for made in (there, on_cpu))
    limit = 0.01 if dtype == torch.float32 else 0.1
    assert ((one - other).abs().mean() / other.std()) < limit


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16"] if DEVICE.type != "cpu" else ["fp32"])
def test_training(precision, tmp_path):
    pytest.importorskip("accelerate")
    skimage = pytest.importorskip("skimage.data")
    from PIL import Image

    from training_runs import losses_fall, recipe
    from uplift_core.training import Trainer

    (tmp_path / "photos").mkdir()
    for name in ("astronaut", "chelsea"):
        Image.fromarray(getattr(skimage, name)()).save(tmp_path / "photos" / f"{name}.png")
    vae = load_vae("tiny", device=DEVICE)
    run = recipe(run__steps=60, run__precision=precision, optimizer__lr=1e-2, model__channels=vae.channels,
                 model__patch=vae.patch, teacher__vae="tiny")
    trainer = Trainer(run, tmp_path / "photos", tmp_path / "out", cpu=DEVICE.type == "cpu")
    assert trainer.device.type == DEVICE.type
    path = trainer.run()
    assert losses_fall(tmp_path / "out")
    assert placed(load(path)) == DEVICE.type


def test_the_commands(tmp_path):
    from PIL import Image

    Image.effect_noise((96, 64), 60).convert("RGB").save(tmp_path / "one.png")
    done = CliRunner().invoke(app, ["upscale", str(tmp_path / "one.png"), "-o", str(tmp_path / "out"), "--scale", "4",
                                    "--device", str(DEVICE), "--tile", "64"])
    assert done.exit_code == 0, done.output
    assert Image.open(next((tmp_path / "out").iterdir())).size == (384, 256)
    done = CliRunner().invoke(app, ["bench", "--device", str(DEVICE), "--model", "uplift-mini", "--sizes", "64",
                                    "--forms", "plain,fast", "-o", str(tmp_path / "bench")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "bench" / "bench.json").exists()
