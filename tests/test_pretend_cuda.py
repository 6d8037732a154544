"""The data's way on a pretended CUDA device: torch's fake tensors carry a device and a shape but no numbers, and an
operation on two devices raises. They cannot show that numbers are right, only that everything is where it should be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from uplift_core import PRESETS, UPLiFT, upscale_latents
from uplift_core.baselines import Interpolated, JointBilateral
from uplift_core.cascade import UpliftWindows
from uplift_core.color import match_color
from uplift_core.consistency import back_project
from uplift_core.dense import DenseFeatures
from uplift_core.features import similarity
from uplift_core.resample import Span

fake = pytest.importorskip("torch._subclasses.fake_tensor", reason="this torch has no fake tensors")
DTYPES = (torch.float32, torch.float16)
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def pretended():
    with fake.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            torch.empty(1, device=CUDA)
        except RuntimeError as error:
            pytest.skip(f"this torch wants a driver even for a tensor that is none: {error}")
        yield


def on_cuda(build, dtype):
    with CUDA:
        module = build()
    for part in module.modules():  # Module.to cannot move fake tensors
        for entries, make in ((part._parameters, nn.Parameter), (part._buffers, lambda t: t)):
            for name, value in entries.items():
                if value is not None and value.is_floating_point():
                    entries[name] = make(value.detach().to(dtype))
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_latents_come_back_to_where_they_were(preset, dtype):
    config = PRESETS[preset]
    model = on_cuda(lambda: UPLiFT(config), dtype)
    latent = torch.randn(1, config.channels, 8, 8)
    image = torch.rand(1, 3, 8 * config.patch, 8 * config.patch)
    for form in ("plain", "fast"):
        found = model(image.to(CUDA, dtype), latent.to(CUDA, dtype), 2, noise=0, form=form)
        assert (found.device.type, found.dtype, found.shape[2:]) == ("cuda", dtype, (32, 32))
    for tile, where in ((None, CUDA), (4 * config.patch, torch.device("cpu"))):
        found = upscale_latents(model, latent.to(where), image.to(where), scale=4, tile=tile)
        assert (found.device.type, tuple(found.shape[2:])) == (where.type, (32, 32))


@pytest.mark.parametrize("method", ["none", "mean", "adain", "wavelet"])
def test_colour_and_consistency_stay_with_the_enlarged_picture(method):
    large, low = torch.rand(1, 3, 64, 64, device=CUDA), torch.rand(1, 3, 32, 32)
    assert match_color(large, low, method).device.type == "cuda"
    assert back_project(large, low).device.type == "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_are_made_there_and_used_on_the_cpu(dtype):
    model = on_cuda(lambda: UPLiFT(PRESETS["dinov2-s14"]), dtype)
    low, picture = torch.randn(1, 384, 6, 6, device=CUDA, dtype=dtype), torch.rand(1, 3, 84, 84)
    part = Span(3, 50, 84), Span(0, 84, 84)
    for upsampler in (UpliftWindows(model, picture, low, 14), JointBilateral(picture, low, 14),
                      Interpolated("nearest", low, 14), Interpolated("bilinear", low, 14)):
        found = upsampler.window(*part)
        assert (found.device.type, found.dtype, tuple(found.shape)) == ("cpu", torch.float32, (384, 47, 84))
    made = DenseFeatures(torch.randn(24, 30, 40, device=CUDA, dtype=dtype), (30, 40), 1.0)
    assert (made.read(slice(2, 4)).device.type, made.at([(3, 4)]).device.type) == ("cpu", "cpu")
    assert similarity(made, [(3, 4)], [(5, 6)]).device.type == "cpu"
