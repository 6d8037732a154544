"""Both routes in every host: the numbers are the core's, the sizes are those asked for, the host counts right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hosts.webui.standin import FACTOR, P, SdModel, Standin, first_latents
from uplift_core import load, match_color, upscale_latents

ON = (True, "2x", 1.0, True)
OFF = (False, "2x", 1.0, True)


def hires(host: Standin, upscaler: str = "UPLiFT 2x", **given: Any) -> P:
    return P(host, enable_hr=True, hr_upscaler=upscaler, **given)


def unit(pictures: Any) -> Tensor:
    return ((torch.stack(list(pictures)) + 1) / 2).clamp(0, 1)


def guide_of(host: Standin, samples: Tensor) -> Tensor:
    return unit(host.sd_model.decode_first_stage(samples.float()))


def by_core(host: Standin, path: Path, samples: Tensor, scale: int, seed: int, noise: float = 1.0) -> Tensor:
    """Scaled latents, enlarged by the Python API."""
    larger = upscale_latents(load(path, device="cpu", dtype="fp32"), samples.float() / FACTOR, guide_of(host, samples),
                             scale=scale, seed=seed, noise_strength=noise)
    return larger * FACTOR


def picture_of(host: Standin, latents: Tensor, reference: Tensor | None) -> np.ndarray:
    pictures = unit(host.sd_model.decode_first_stage(latents))
    if reference is not None:
        pictures = match_color(pictures, reference, "mean").clamp(0, 1)
    return (pictures.movedim(1, -1) * 255).to(torch.uint8).numpy()


def near(picture: Image.Image, expected: np.ndarray) -> bool:
    """Equal up to rounding to bytes."""
    return np.abs(np.asarray(picture).astype(int) - expected.astype(int)).max() <= 1


def first_picture(host: Standin, samples: Tensor) -> np.ndarray:
    return picture_of(host, samples, None)


@pytest.mark.parametrize("scale", [2, 4])
def test_hires_without_second_pass_is_the_cores_result(host: Standin, small_model: Path, scale: int) -> None:
    p = hires(host, f"UPLiFT {scale}x", hr_scale=float(scale), batch_size=2)
    result = host.run(p, *OFF)
    assert not host.errors and not p.second_pass_from
    samples = p.first_samples[0].clone()
    for i, picture in enumerate(result.pictures):
        one = samples[i:i + 1]
        expected = by_core(host, small_model, one, scale, seed=7 + i)
        assert picture.size == (64 * scale, 64 * scale)
        assert near(picture, picture_of(host, expected, guide_of(host, one))[0])
    assert result.state.job_no == result.state.job_count == 2
    assert "UPLiFT version" in result.texts[0] and result.texts[0]["UPLiFT color fix"] == "mean"
    assert "UPLiFT scale" not in result.texts[0]


def test_hires_second_pass_starts_from_the_cores_latents(host: Standin, small_model: Path) -> None:
    p = hires(host, denoising_strength=0.4, batch_size=2, n_iter=2)
    result = host.run(p, *OFF)
    assert not host.errors and len(p.second_pass_from) == 2
    for n, given in enumerate(p.second_pass_from):
        for i in range(2):
            expected = by_core(host, small_model, p.first_samples[n][i:i + 1].clone(), 2, seed=7 + 2 * n + i)
            assert torch.allclose(given[i:i + 1].clone(), expected, atol=1e-5)
    assert result.state.job_no == result.state.job_count == 4
    assert "UPLiFT color fix" not in result.texts[0]  # the second pass makes its own colours


@pytest.mark.parametrize("upscaler", ["UPLiFT 2x", "UPLiFT 4x"])
@pytest.mark.parametrize("denoise", [0.0, 0.4])
def test_other_factors_end_at_the_asked_size(host: Standin, upscaler: str, denoise: float) -> None:
    for asked, size in ((dict(hr_scale=1.5), (96, 96)), (dict(hr_scale=3.0), (192, 192)),
                        (dict(hr_resize_x=128, hr_resize_y=96), (128, 96)),
                        (dict(hr_resize_x=80, hr_resize_y=152), (80, 152))):
        p = hires(host, upscaler, denoising_strength=denoise, **asked)
        result = host.run(p, *OFF)
        assert not host.errors and not result.comments
        assert result.pictures[0].size == size
        assert len(p.second_pass_from) == bool(denoise)


def test_cut_pictures_keep_the_colors_of_what_is_left(host: Standin) -> None:
    """Resize-to with another shape cuts the sides off: those must not count."""
    p = hires(host, hr_resize_x=128, hr_resize_y=64)
    picture = host.run(p, *OFF).pictures[0]
    guide = guide_of(host, p.first_samples[0].clone())[:, :, 16:48]
    mean = torch.tensor(np.asarray(picture)).float().mean((0, 1)) / 255
    assert torch.allclose(mean, guide.mean((0, 2, 3)), atol=0.02)


def test_direct_route_is_the_cores_result(host: Standin, small_model: Path) -> None:
    p = P(host, batch_size=2)
    result = host.run(p, True, "4x", 0.5, True)
    assert not host.errors and not result.comments
    for i, picture in enumerate(result.pictures):
        one = p.first_samples[0][i:i + 1].clone()
        expected = by_core(host, small_model, one, 4, seed=7 + i, noise=0.5)
        assert near(picture, picture_of(host, expected, guide_of(host, one))[0])
    keys = {"UPLiFT scale": "4x", "UPLiFT noise": 0.5, "UPLiFT color fix": "mean"}
    assert keys.items() <= result.texts[0].items()
    assert not any(key.startswith("Hires") for key in result.texts[0])


def test_direct_route_without_color_fix(host: Standin, small_model: Path) -> None:
    p = P(host)
    result = host.run(p, True, "2x", 1.0, False)
    expected = by_core(host, small_model, p.first_samples[0].clone(), 2, seed=7)
    assert near(result.pictures[0], picture_of(host, expected, None)[0])
    assert result.texts[0]["UPLiFT color fix"] == "none"


def test_off_by_default(host: Standin) -> None:
    p = P(host)
    result = host.run(p, *OFF)
    assert result.pictures[0].size == (64, 64) and not result.texts[0] and not result.comments
    assert np.array_equal(np.asarray(result.pictures[0]), first_picture(host, p.first_samples[0].clone())[0])
    assert not host.run(P(host)).texts[0]  # the API may send nothing at all


@pytest.mark.parametrize("scale, size", [(2, 128), ("4x", 256), (4.0, 256), ("2", 128), ("nonsense", 128)])
def test_the_api_may_write_the_scale_as_it_likes(forge: Standin, scale: Any, size: int) -> None:
    assert forge.run(P(forge), True, scale).pictures[0].size == (size, size)


def test_latents_come_back_as_they_were_given(host: Standin) -> None:
    host.latent_dtype = torch.float16
    p = hires(host, denoising_strength=0.4)
    host.run(p, *OFF)
    assert p.second_pass_from[0].dtype == torch.float16 and not host.errors


def test_the_host_keeps_its_other_upscalers(host: Standin) -> None:
    p = hires(host, "Latent", denoising_strength=0.4)
    result = host.run(p, *OFF)
    expected = F.interpolate(p.first_samples[0].clone(), size=(16, 16), mode="bilinear")
    assert torch.equal(p.second_pass_from[0].clone(), expected)
    assert not [key for key in result.texts[0] if key.startswith("UPLiFT")]
    assert "sample_hr_pass" not in vars(p)


def test_weights_are_placed_by_the_hosts_own_means(host: Standin) -> None:
    host.run(hires(host), *OFF)
    assert ("gc" if host.flavour.memory == "devices" else "loaded") in host.moved
    host.run(hires(host), *OFF)  # a model loaded in the first run serves the second
    assert not host.errors


def test_upscale_button_uses_the_picture_itself(host: Standin, small_model: Path) -> None:
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
    p = hires(host, denoising_strength=0.4, firstpass_image=image)
    host.run(p, *OFF)
    samples = first_latents([7], 8, 8)
    guide = torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0)[None].float() / 255
    expected = upscale_latents(load(small_model, device="cpu", dtype="fp32"), samples / FACTOR, guide, scale=2,
                               seed=7) * FACTOR
    assert torch.allclose(p.second_pass_from[0].clone(), expected, atol=1e-5)


def test_another_checkpoint_for_the_second_pass(host: Standin, small_model: Path) -> None:
    """The guide is decoded by the first checkpoint's VAE, before it goes."""
    other = SdModel(vae_seed=1)
    p = hires(host, denoising_strength=0.4, hr_checkpoint_info=other, hr_checkpoint_name="other")
    result = host.run(p, *OFF)
    assert not host.errors and not result.comments and p.checkpoint_loads == 1
    expected = by_core(host, small_model, p.first_samples[0].clone(), 2, seed=7)
    assert torch.allclose(p.second_pass_from[0].clone(), expected, atol=1e-4)


def test_another_checkpoint_is_not_loaded_for_nothing(host: Standin) -> None:
    p = hires(host, hr_checkpoint_info=SdModel(vae_seed=1), hr_checkpoint_name="other")
    assert host.run(p, *OFF).pictures[0].size == (128, 128)
    assert p.checkpoint_loads == 0 and not host.errors


def test_first_pass_is_saved_small(host: Standin) -> None:
    host.shared.opts.save_images_before_highres_fix = True
    for denoise in (0.0, 0.4):
        host.saved.clear()
        p = hires(host, denoising_strength=denoise, batch_size=2)
        host.run(p, *OFF)
        assert host.saved == [("-before-highres-fix", (64, 64))] * 2 and not host.errors
        assert p.do_not_save_samples is False


def test_progress_is_told(host: Standin) -> None:
    state = host.run(hires(host), *OFF).state
    percents = [int(text.split()[2]) for text in state.texts if text.startswith("UPLiFT 2x:")]
    assert len(percents) > 3 and percents == sorted(percents) and percents[-1] == 100
    assert state.textinfo is None
