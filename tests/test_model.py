"""The model through its public door: the config language, forms that agree, inputs that do not fit."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from golden_cases import CASES, TOLERANCE, difference, golden, ruled
from uplift_core import PRESETS, ModelConfig, UPLiFT
from uplift_core.config import DownConfig, GroupConfig, RefinerConfig, UpConfig
from uplift_core.devices import choose_dtype, has_cpu_fp16
from uplift_core.errors import ConfigError, InputError
from uplift_core.noise import SeededNoise
from uplift_core.tiling import Job, run

widths = st.sampled_from([8, 12, 20])


@st.composite
def groups(draw):
    return GroupConfig(draw(st.sampled_from(["SingleConv", "DoubleConv"])),
                       tuple(draw(st.lists(widths, min_size=1, max_size=2))),
                       norm=draw(st.sampled_from(["batch", "layer"])), residual=draw(st.booleans()),
                       one_by=draw(st.booleans()))


@st.composite
def configs(draw):
    """Any UPLiFT of the published language, small."""
    levels = draw(st.integers(1, 4))
    ups = draw(st.integers(0, min(2, levels - 1)))
    downs = [draw(st.sampled_from([DownConfig(), DownConfig("conv", 0.5, "bilinear"), DownConfig("max", 0.5),
                                   DownConfig("conv", 0.5)])) for _ in range(levels - 1)]
    refiner = None
    if draw(st.booleans()):
        refiner = RefinerConfig(draw(groups()), draw(st.integers(-levels, -1)),
                                noise_channels=draw(st.sampled_from([0, 2])),
                                sampling=draw(st.sampled_from(["nearest", "bilinear"])), residual=draw(st.booleans()))
    channels = draw(st.sampled_from([4, 20]))
    scaled = draw(st.booleans())
    return ModelConfig(
        channels=channels, patch=8, encoder=tuple(draw(groups()) for _ in range(levels)), downs=tuple(downs),
        decoder=tuple(draw(groups()) for _ in range(ups + 1)),
        ups=tuple(draw(st.sampled_from([UpConfig(), UpConfig(residual="none"), UpConfig(factor=3)]))
                  for _ in range(ups)),
        attender=draw(st.sampled_from([None, 5, 9, 13, 17, 25])), share_encoder=draw(st.booleans()),
        sampling=draw(st.sampled_from(["nearest", "bilinear"])), noise_channels=draw(st.sampled_from([0, 3])),
        noise_scale=draw(st.sampled_from([1.0, 0.5])), refiner=refiner,
        latent_mean=(0.5,) * channels if scaled else (), latent_std=(2.0,) * channels if scaled else ())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), st.integers(2, 7), st.integers(2, 7), st.integers(1, 2), st.sampled_from([8, 16, 40]))
def test_plain_fast_and_tiled_agree(config, h, w, steps, tile):
    model = ruled(config)
    torch.manual_seed(h * 10 + w)
    image, latent = torch.rand(1, 3, 8 * h, 8 * w), torch.randn(1, config.channels, h, w) * 3
    exact = copy.deepcopy(model).double()(image.double(), latent.double(), steps, noise=3, form="plain")
    plain = model(image, latent, steps, noise=3, form="plain")
    # A norm over a handful of nearly equal channels magnifies rounding in any form: allow what the plain one has.
    bound = max(TOLERANCE, 4 * difference(plain.double(), exact))
    assert difference(model(image, latent, steps, noise=3, form="fast").double(), exact) < bound
    if config.step_factor == 2:
        tiled = run(Job(model, image, latent, steps, SeededNoise(3)), tile)
        assert difference(tiled.double(), exact) < bound


@settings(max_examples=60, deadline=None)
@given(configs())
def test_config_survives_both_its_written_forms(config):
    section = config.to_published()
    assert ModelConfig.from_published(section, channels=config.channels, patch=8) == config
    assert ModelConfig.from_metadata(config.to_metadata()) == config


@pytest.mark.parametrize("name", CASES)
def test_config_is_read_off_the_shapes(name):
    case = golden(name)
    read = ModelConfig.from_state_dict(case.model.state_dict())
    ours = case.model.config
    for field in ("channels", "encoder", "decoder", "attender", "noise_channels", "refiner", "sampling"):
        assert getattr(read, field) == getattr(ours, field), field
    UPLiFT(read).load_state_dict(case.model.state_dict(), strict=True)


def test_preset_is_recognised():
    with torch.device("meta"):
        state = UPLiFT(PRESETS["sd15-vae"]).state_dict()
    assert ModelConfig.from_state_dict(state) == PRESETS["sd15-vae"]
    assert ModelConfig.from_state_dict(state).patch == 8


def test_gradients_flow_through_auto():
    case = golden("small-vae_attender5")
    model = copy.deepcopy(case.model).train().requires_grad_(True)
    model(case.image, case.latent, 2).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_batch_norm_statistics_move_in_training_only():
    model = UPLiFT(PRESETS["dinov3-splus16"])
    image, latent = torch.rand(2, 3, 32, 32), torch.randn(2, 384, 2, 2)
    before = model.decoder.block_0.blocks[0].conv[1].running_mean.clone()
    model.eval()(image, latent)
    assert torch.equal(before, model.decoder.block_0.blocks[0].conv[1].running_mean)
    model.train()(image, latent)
    assert not torch.equal(before, model.decoder.block_0.blocks[0].conv[1].running_mean)


def test_a_fresh_refiner_residual_changes_nothing():
    config = golden("small-vae_attender5").model.config
    ref = RefinerConfig(config.refiner.group, -1, residual=True)
    model = UPLiFT(ModelConfig(**{**config.__dict__, "refiner": ref})).eval()
    assert model.ref_outc.weight.abs().max() == 0
    case = golden("small-vae_attender5")
    out = model(case.image, case.latent, noise=None)
    assert out.max() <= case.latent.max() + 1e-5
    assert out.min() >= case.latent.min() - 1e-5


def test_latent_statistics_are_undone():
    config = golden("small-vae_no-refiner").model.config
    scaled = ModelConfig(**{**config.__dict__, "latent_mean": (1.0, 2.0, 3.0, 4.0), "latent_std": (2.0,) * 4})
    plain, other = ruled(config), ruled(scaled)
    image, latent = torch.rand(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    mean = torch.tensor(scaled.latent_mean).view(1, 4, 1, 1)
    assert torch.allclose(other(image, latent * 2 + mean, 2), plain(image, latent, 2) * 2 + mean, atol=1e-4)


class Counting:
    """A host's namespace: the same layers, but its own classes."""

    class Conv2d(nn.Conv2d):
        calls = 0

        def forward(self, x):
            Counting.Conv2d.calls += 1
            return super().forward(x)

    class ConvTranspose2d(nn.ConvTranspose2d):
        pass

    class LayerNorm(nn.LayerNorm):
        pass


class NoConv2d(nn.Module):
    """A host's layer that is no torch.nn.Conv2d."""

    def __init__(self, channels, out, kernel, stride=1, padding=0, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None
        self.stride, self.padding = (stride, stride), (padding, padding)

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Patched(nn.Conv2d):
    """A host's layer that changes its weights as it uses them."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * 1.5, self.bias)


@pytest.mark.parametrize("kind", [NoConv2d, Patched])
@pytest.mark.parametrize("name", ["small-vae_attender9", "sd15-vae_2x", "dinov3-splus16_16x"])
def test_every_form_calls_the_hosts_layers(name, kind):
    case = golden(name)
    operations = SimpleNamespace(Conv2d=kind, ConvTranspose2d=nn.ConvTranspose2d, LayerNorm=nn.LayerNorm)
    model = UPLiFT(case.model.config, operations).eval().requires_grad_(False)
    model.load_state_dict(case.model.state_dict())
    plain, fast = (model(case.image, case.latent, noise=case.noise(), form=form) for form in ("plain", "fast"))
    assert difference(fast, plain) < TOLERANCE
    same = difference(plain, case.model(case.image, case.latent, noise=case.noise(), form="plain"))
    assert same == 0 if kind is NoConv2d else same > 0.1


def test_a_parametrized_layer_is_used_as_it_is():
    case = golden("sd15-vae_2x")
    model = copy.deepcopy(case.model)
    nn.utils.parametrizations.weight_norm(model.encoder.block_4.blocks[-1].conv[0])
    assert difference(model(case.image, case.latent, form="fast"), model(case.image, case.latent, form="plain")) < 1e-4


def test_a_hook_on_a_layer_runs_in_every_form():
    case = golden("sd15-vae_2x")
    model = copy.deepcopy(case.model)
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda module, given, made: made * 1.1)
    assert difference(model(case.image, case.latent, form="fast"), model(case.image, case.latent, form="plain")) < 1e-4


def test_operations_are_the_hosts_own():
    case = golden("small-vae_attender9")
    model = UPLiFT(case.model.config, operations=Counting).eval().requires_grad_(False)
    model.load_state_dict(case.model.state_dict())
    kinds = {type(m) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.LayerNorm, nn.ConvTranspose2d))}
    assert kinds == {Counting.Conv2d, Counting.LayerNorm, Counting.ConvTranspose2d}
    assert difference(model(case.image, case.latent), case.model(case.image, case.latent)) < TOLERANCE
    assert Counting.Conv2d.calls > 0  # the host's forward ran, not only its weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    case = golden("small-vae_no-refiner")
    half = copy.deepcopy(case.model).to(dtype)
    if dtype == torch.float16 and not has_cpu_fp16():
        assert choose_dtype("fp16", "cpu") == torch.float32
        with pytest.raises(InputError, match="use fp32"):
            half(case.image, case.latent)
        return
    out = half(case.image, case.latent, noise=None)
    assert out.dtype == case.latent.dtype
    assert difference(out, case.model(case.image, case.latent, noise=None)) < 0.3


@pytest.mark.parametrize(("image", "latent", "steps", "says"), [
    ((1, 3, 64, 64), (1, 16, 8, 8), 1, "4 channels"), ((1, 4, 64, 64), (1, 4, 8, 8), 1, "b 3 H W"),
    ((2, 3, 64, 64), (1, 4, 8, 8), 1, "batch"), ((1, 3, 64, 64), (1, 4, 8, 8), 0, "steps"),
    ((1, 3, 64, 64), (1, 4, 2, 8, 8), 1, "shape"), ((1, 3, 0, 64), (1, 4, 0, 8), 1, "empty")])
def test_inputs_that_do_not_fit(image, latent, steps, says):
    with pytest.raises(InputError, match=says):
        golden("small-vae_attender5").model(torch.rand(image), torch.rand(latent), steps)


@pytest.mark.parametrize(("change", "says"), [
    ({"attender": 7}, "attender is 7"), ({"encoder": {}}, "down_steps"),
    ({"decoder": {"up_steps": 9, "block_0": {}}}, "up_steps"), ({"refiner": {"ref_con": 3}}, "block_0")])
def test_configs_that_make_no_model(change, says):
    section = {**PRESETS["sd15-vae"].to_published(), **change}
    with pytest.raises(ConfigError, match=says):
        ModelConfig.from_published(section, channels=4, patch=8)


def test_foreign_weights_are_no_uplift():
    with pytest.raises(ConfigError, match="not the weights of an UPLiFT"):
        ModelConfig.from_state_dict({"model.diffusion_model.out.2.weight": torch.zeros(4, 320, 3, 3)})


@pytest.mark.parametrize("outsize", [9, (0, 9), (-3, 9), (9, 9, 9), ("a", 2)])
def test_a_bad_outsize_is_said_before_any_work(outsize):
    case = golden("small-vae_attender9")
    with pytest.raises(InputError, match="expected .rows, columns."):
        case.model(case.image, case.latent, outsize=outsize)


@pytest.mark.parametrize("metadata", [{"latent_space": "dinov2-s14"}, {"patch": "14"}])
def test_metadata_tells_the_two_dino_models_apart(metadata):
    with torch.device("meta"):
        state = UPLiFT(PRESETS["dinov2-s14"]).state_dict()
    assert ModelConfig.from_state_dict(state) == PRESETS["dinov3-splus16"]
    assert ModelConfig.from_state_dict(state, metadata) == PRESETS["dinov2-s14"]
