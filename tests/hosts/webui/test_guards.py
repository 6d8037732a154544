"""When UPLiFT must keep its hands off, and that no failure of ours costs the user a picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hosts.webui.standin import DecodedSamples, P, SdModel, Standin
from hosts.webui.test_routes import OFF, ON, first_picture, hires


def untouched(host: Standin, p: P, result: Any) -> None:
    """The first pass, byte by byte; no second one; the host's count is right; nothing claims to be enlarged."""
    assert np.array_equal(np.asarray(result.pictures[0]), first_picture(host, p.first_samples[0].clone())[0])
    assert not p.second_pass_from and not host.errors
    assert result.state.job_no == result.state.job_count
    assert not {"UPLiFT scale", "UPLiFT version", "UPLiFT color fix"} & set(result.texts[0])


def said(result: Any, *words: str) -> None:
    """One line under the picture, and the reason in its text."""
    assert len(result.comments) == 1
    for word in words:
        assert word in result.comments[0] and word in result.texts[0]["UPLiFT not applied"]


@pytest.mark.parametrize("kind, name", [("sdxl", "SDXL"), ("sd3", "Stable Diffusion 3"), ("sd2", "Stable Diffusion 2"),
                                        ("flux", "SdModel")])
@pytest.mark.parametrize("denoise", [0.0, 0.4])
def test_other_checkpoints(host: Standin, kind: str, name: str, denoise: float) -> None:
    host.sd_model = SdModel(kind)
    for p, args in ((hires(host, denoising_strength=denoise, n_iter=2), OFF), (P(host), ON)):
        result = host.run(p, *args)
        untouched(host, p, result)
        said(result, "Stable Diffusion 1.5", name)


def test_second_checkpoint_of_another_kind(host: Standin) -> None:
    p = hires(host, denoising_strength=0.4, hr_checkpoint_info=SdModel("sdxl", vae_seed=1), hr_checkpoint_name="xl")
    result = host.run(p, *OFF)
    expected = first_picture(host, p.first_samples[0].clone())[0].astype(int)
    assert np.abs(np.asarray(result.pictures[0]).astype(int) - expected).max() <= 1  # handed over as 0 to 1 by Neo
    assert not p.second_pass_from
    said(result, "SDXL", "second pass")


@pytest.mark.parametrize("name", ["image_mask", "mask_for_overlay", "latent_mask"])
def test_masks(host: Standin, name: str) -> None:
    p = P(host, **{name: object()})
    result = host.run(p, *ON)
    untouched(host, p, result)
    said(result, "inpainting")


def test_a_mask_that_appears_late(host: Standin) -> None:
    p = P(host)
    p.init = lambda: setattr(p, "mask_for_overlay", object())  # type: ignore[method-assign]
    result = host.run(p, *ON)
    untouched(host, p, result)
    said(result, "inpainting")


def test_a_selected_script(host: Standin) -> None:
    runner = SimpleNamespace(selectable_scripts=[SimpleNamespace(title=lambda: "SD upscale")])
    p = P(host, script_args=[1, False], scripts=runner)
    result = host.run(p, *ON)
    untouched(host, p, result)
    said(result, "SD upscale")


def test_hires_and_the_accordion_together(host: Standin) -> None:
    p = hires(host, "Latent", denoising_strength=0.4)
    said(host.run(p, *ON), "Hires. fix")
    p = hires(host)  # with UPLiFT as the upscaler, it is enlarged once
    result = host.run(p, *ON)
    assert result.pictures[0].size == (128, 128) and not result.comments


def test_samples_that_are_decoded_or_odd(host: Standin) -> None:
    for odd, word in ((DecodedSamples(torch.zeros(1, 3, 64, 64)), "decoded"), (torch.zeros(1, 16, 8, 8), "16")):
        p = P(host)
        p.sample = lambda seeds, odd=odd: odd  # type: ignore[method-assign]
        host.sd_model.decode_first_stage = lambda scaled: torch.zeros(1, 3, 64, 64)  # type: ignore[method-assign]
        result = host.run(p, *ON)
        assert result.pictures[0].size == (64, 64) and not host.errors
        said(result, word)


@pytest.mark.parametrize("button", ["interrupted", "skipped"])
@pytest.mark.parametrize("denoise", [0.0, 0.4])
def test_interrupted_before(host: Standin, button: str, denoise: float) -> None:
    for p, args in ((hires(host, denoising_strength=denoise), OFF), (P(host), ON)):
        p.init = lambda p=p: (P.init(p), setattr(host.shared.state, button, True))  # type: ignore[method-assign]
        result = host.run(p, *args)
        assert result.pictures[0].size == (64, 64) and not p.second_pass_from and not host.errors
        assert not result.comments  # the user knows
        assert not [key for key in result.texts[0] if key.startswith("UPLiFT")]


@pytest.mark.parametrize("denoise", [0.0, 0.4])
def test_interrupted_in_the_middle(host: Standin, monkeypatch: pytest.MonkeyPatch, denoise: float) -> None:
    class Pressed(type(host.shared.state)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "textinfo" and value and str(value).split(": ")[-1] > "20 %":
                self.interrupted = True

    monkeypatch.setattr("hosts.webui.standin.State", Pressed)
    for p, args in ((hires(host, denoising_strength=denoise), OFF), (P(host), ON)):
        result = host.run(p, *args)
        assert result.state.interrupted and result.state.textinfo is None
        assert result.pictures[0].size == (64, 64) and not p.second_pass_from and not host.errors
        assert np.array_equal(np.asarray(result.pictures[0]), first_picture(host, p.first_samples[0].clone())[0])
        assert not [key for key in result.texts[0] if key.startswith("UPLiFT")]


@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryError(), KeyError("x"), AssertionError("\nlines\n")])
@pytest.mark.parametrize("place", ["uplift_webui.enlarge.upscale_latents", "uplift_webui.models.load",
                                   "uplift_webui.pictures.to_unit", "uplift_webui.pictures.check_guide"])
def test_nothing_of_ours_costs_a_picture(host: Standin, monkeypatch: pytest.MonkeyPatch, place: str,
                                         error: Exception) -> None:
    def fail(*args: Any, **named: Any) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(place, fail)
        for p, args in ((hires(host), OFF), (hires(host, denoising_strength=0.4), OFF), (P(host), ON)):
            result = host.run(p, *args)
            untouched(host, p, result)
            said(result, type(error).__name__)


@pytest.mark.parametrize("place", ["uplift_webui.options.read", "uplift_webui.hires.hook",
                                   "uplift_webui.pictures.match_color", "uplift_webui.infotext.write"])
def test_failures_in_the_small_hooks(host: Standin, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def fail(*args: Any, **named: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(place, fail)
    for p, args in ((hires(host), OFF), (P(host), ON)):
        assert len(host.run(p, *args).pictures) == 1 and not host.errors


def test_latents_that_are_not_numbers(host: Standin) -> None:
    p = P(host)
    p.sample = lambda seeds: torch.full((1, 4, 8, 8), float("nan"))  # type: ignore[method-assign]
    result = host.run(p, *ON)
    assert result.pictures[0].size == (64, 64)
    said(result, "NaN")


def test_a_failure_of_the_hosts_second_pass_is_the_hosts(host: Standin) -> None:
    host.second_pass_fails = True
    host.shared.opts.save_images_before_highres_fix = True
    p = hires(host, denoising_strength=0.4)
    with pytest.raises(RuntimeError, match="second pass"):
        host.run(p, *OFF)
    assert p.do_not_save_samples is False


def test_one_bad_batch_does_not_mark_the_others(forge: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    from uplift_webui import enlarge

    real, calls = enlarge.upscale_latents, []

    def fail_first(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("boom")
        return real(*args, **named)

    monkeypatch.setattr(enlarge, "upscale_latents", fail_first)
    result = forge.run(P(forge, n_iter=2), *ON)
    assert [picture.size for picture in result.pictures] == [(64, 64), (128, 128)]
    assert "UPLiFT not applied" in result.texts[0] and "UPLiFT not applied" not in result.texts[1]
    assert result.texts[1]["UPLiFT scale"] == "2x"
