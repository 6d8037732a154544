"""Tiles give the numbers of the whole, at any size, and go on when memory ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_cases import TOLERANCE, difference, golden
from uplift_core import engine as engine_module
from uplift_core import estimate_memory, upscale_latents
from uplift_core.errors import OutOfMemory


def inputs(h, w, b=1):
    torch.manual_seed(h * 100 + w)
    return torch.randn(b, 4, h, w) * 4, torch.rand(b, 3, 8 * h, 8 * w)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.sampled_from([2, 4]), st.integers(24, 90), st.integers(1, 2))
def test_tiled_is_whole(h, w, scale, tile, batch):
    model = golden("small-vae_8x_batch2").model
    latents, image = inputs(h, w, batch)
    whole = upscale_latents(model, latents, image, scale=scale, seed=7, tile=None)
    tiled = upscale_latents(model, latents, image, scale=scale, seed=7, tile=tile)
    assert difference(tiled, whole) < TOLERANCE


def test_eight_times_in_tiles():
    model = golden("small-vae_8x_batch2").model
    latents, image = inputs(7, 10)
    whole = upscale_latents(model, latents, image, scale=8, tile=None)
    assert difference(upscale_latents(model, latents, image, scale=8, tile=40), whole) < TOLERANCE


def test_out_of_memory_shrinks_the_tiles(monkeypatch):
    model = golden("small-vae_8x_batch2").model
    latents, image = inputs(32, 32)
    expected = upscale_latents(model, latents, image, tile=None)
    decode = engine_module.Engine.decode

    def limited(self, latent, plan, *rest):
        if plan.out[0].length > 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return decode(self, latent, plan, *rest)

    monkeypatch.setattr(engine_module.Engine, "decode", limited)
    assert difference(upscale_latents(model, latents, image, tile="auto"), expected) < TOLERANCE
    with pytest.raises(OutOfMemory, match="tile"):
        upscale_latents(model, latents, image, tile=None)


def test_estimate_grows_with_the_picture_but_not_with_tiles():
    model = golden("small-vae_8x_batch2").model
    assert estimate_memory(model, 4096, 4096, 2) > 3 * estimate_memory(model, 1024, 1024, 2)
    assert estimate_memory(model, 4096, 4096, 2, 512) < 1.1 * estimate_memory(model, 2048, 2048, 2, 512)
