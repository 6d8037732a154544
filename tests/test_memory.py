"""Amounts of memory, and that a budget holds whatever the picture's size."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from rule_weights import golden_config
from uplift_core import UPLiFT, estimate_memory
from uplift_core.config import ModelConfig
from uplift_core.errors import InputError
from uplift_core.memory import free_memory, is_out_of_memory, parse_bytes

RUN = """
import json, resource, sys
sys.path[:0] = {paths}
import torch
from test_memory import slim
from uplift_core import UPLiFT, upscale_latents

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

torch.set_num_threads(1)
model = UPLiFT(slim()).requires_grad_(False).eval()
side = {side}
image, latent = torch.rand(1, 3, side, side), torch.randn(1, 4, side // 8, side // 8)
small = image[..., :64, :64].contiguous(), latent[..., :8, :8].contiguous()
upscale_latents(model, small[1], small[0])  # what torch loads on first use
before = peak()
result = upscale_latents(model, latent, image, memory_budget="{budget}")
print(json.dumps({{"grown": peak() - before, "result": result.numel() * result.element_size(),
                  "shape": list(result.shape), "finite": bool(result.isfinite().all())}}))
"""


def slim() -> ModelConfig:
    """An UPLiFT of a few channels, so that 17 million pixels take seconds."""
    config = golden_config("small-vae_8x_batch2")
    group = partial(replace, config.encoder[0])
    return replace(config, encoder=(group(widths=(4, 4)), group(widths=(8, 8)), group(widths=(8,))),
                   downs=config.downs[:2], decoder=(group(widths=(8,)), group(widths=(8,))),
                   refiner=replace(config.refiner, group=group(widths=(8, 8))))


@pytest.mark.parametrize(("text", "expected"), [("4GB", 4 << 30), ("800 MiB", 800 << 20), ("1.5g", 3 << 29), (100, 100),
                                                ("64", 64), (None, None)])
def test_amounts_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["much", "", "4 GBs", "-1GB", "1.2.3GB", "0", ".", -5, "inf"])
def test_other_amounts_say_what_one_looks_like(text):
    with pytest.raises(InputError, match="800MB|nothing"):
        parse_bytes(text)


def test_free_memory_is_an_amount_of_this_machine():
    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50


def test_out_of_memory_is_known_in_its_forms():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"))
    assert is_out_of_memory(RuntimeError("Invalid buffer size: 19.38 GiB"))
    assert is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_a_budget_holds_for_a_4096_pixel_guide():
    assert estimate_memory(UPLiFT(slim()), 4096, 4096, 2) > 400 << 20  # untiled it would not fit
    code = RUN.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])], side=4096, budget="200MB")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["shape"] == [1, 4, 1024, 1024] and seen["finite"]
    assert seen["grown"] - seen["result"] < 200 << 20


WHOLE = """
import torch
from uplift_core import PRESETS, UPLiFT, estimate_memory
from uplift_core.measure import AnonymousPeak

torch.set_num_threads(1)
model = UPLiFT(PRESETS["dinov3-splus16"]).eval().requires_grad_(False)
image, low = torch.rand(1, 3, 384, 384), torch.randn(1, 384, 24, 24)
model(image[..., :64, :64], low[..., :4, :4], 4)  # what torch itself needs the first time
with AnonymousPeak() as peak:
    result = model(image, low, 4)
print(peak.grown, estimate_memory(model, 384, 384, 16) + result.numel() * 4)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the anonymous memory of a process")
def test_the_estimate_is_near_the_peak_for_pixel_dense_features():
    done = subprocess.run([sys.executable, "-c", WHOLE], capture_output=True, text=True, check=True)
    peak, estimate = map(int, done.stdout.split())
    assert 0.9 * peak < estimate < 2 * peak


BUDGET = """
import sys, torch
torch.set_num_threads(1)
from training_runs import SMALL
from uplift_core import ModelConfig, UPLiFT, upscale_latents
from uplift_core.measure import AnonymousPeak
kind, size, scale, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) << 20
section = {part: dict(value) if isinstance(value, dict) else value for part, value in SMALL.items()}
channels = 4
if kind == "unshared":
    section["enc_share"] = False
else:
    channels = 384
    del section["refiner"]
    section["decoder"]["ncat_c"] = 0
for part in ("encoder", "decoder"):
    section[part] = {name: {**value, "hc": [32]} if name.startswith("block") else value
                     for name, value in section[part].items()}
model = UPLiFT(ModelConfig.from_published(section, channels=channels, patch=16)).requires_grad_(False)
image, latent = torch.rand(1, 3, size, size), torch.randn(1, channels, size // 16, size // 16)
upscale_latents(model, latent[:, :, :4, :4], image[:, :, :64, :64])
with AnonymousPeak() as peak:
    result = upscale_latents(model, latent, image, scale=scale, memory_budget=budget)
print(peak.grown - result.numel() * 4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("kind, size, scale, budget", [("unshared", 1024, 8, 200), ("features", 1024, 8, 300)])
def test_a_budget_holds_for_other_configurations(kind, size, scale, budget):
    """An encoder that reads the picture enlarged 4x; a result of 384 MB."""
    done = subprocess.run([sys.executable, "-c", BUDGET, kind, *map(str, (size, scale, budget))], capture_output=True,
                          text=True, check=True, cwd=Path(__file__).parent)
    assert int(done.stdout) < budget << 20


def test_the_estimate_grows_with_the_picture_unless_tiled():
    model = UPLiFT(golden_config("small-vae_8x_batch2"))
    whole = [estimate_memory(model, side, side, 2) for side in (512, 1024, 2048)]
    tiled = [estimate_memory(model, side, side, 2, tile=512) for side in (1024, 2048)]
    assert whole[0] < whole[1] < whole[2]
    assert tiled[1] < whole[2]


def test_devices_that_cannot_tell_their_free_memory(monkeypatch):
    class Xpu:
        get_device_properties = staticmethod(lambda index: type("P", (), {"total_memory": 8 << 30}))
        memory_allocated = memory_reserved = staticmethod(lambda index: 1 << 30)

        @staticmethod
        def mem_get_info(index):
            raise RuntimeError("The device does not support querying the available free memory")

    monkeypatch.setattr(torch, "xpu", Xpu, raising=False)
    assert free_memory(torch.device("xpu", 0)) == 7 << 30
