"""The package against an independent implementation of the definition, over the published config language."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golden_cases import TOLERANCE, difference, golden
from plain_uplift import PlainUplift
from rule_weights import golden_metadata, rule_state
from uplift_core import ModelConfig, UPLiFT
from uplift_core.tiling import Job, run

SAMPLINGS = ["nearest", "bilinear"]


def drawn(shape, step, site):
    """Noise that tells steps and sites apart."""
    seed = 100 * step + sum(map(ord, site))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Drawn:
    """The same as a source that windows can be cut out of."""

    def window(self, step, site, channels, batch, y, x):
        whole = drawn((batch, channels, y.size, x.size), step, site)
        return whole[:, :, y.lo:y.hi, x.lo:x.hi]


@st.composite
def groups(draw, residual=True, strides=(1,)):
    widths = draw(st.lists(st.sampled_from([9, 16, 25]), min_size=1, max_size=2))
    section = {"block": draw(st.sampled_from(["SingleConv", "DoubleConv"])), "count": len(widths), "hc": widths}
    section["stride"] = draw(st.sampled_from(strides)) if section["block"] == "SingleConv" and len(widths) == 1 else 1
    for name, values in (("norm", ["batch", "layer"]), ("residual", [True, False]), ("one_by", [True, False])):
        if draw(st.booleans()):
            section[name] = draw(st.sampled_from(values))
    return section


@st.composite
def sections(draw):
    levels = draw(st.integers(0, 4))
    ups = draw(st.integers(0, min(levels, 2)))
    encoder = {"down_steps": levels, "block_0": draw(groups(strides=(1, 2)))}
    for g in range(1, levels + 1):
        encoder[f"block_{g}"] = draw(groups())
        encoder[f"down_{g}"] = draw(st.sampled_from([
            {"down_op": "none"}, {"down_op": "none"}, {"down_op": "conv", "factor": 0.5},
            {"down_op": "conv", "factor": 0.5, "residual": "bilinear"}, {"down_op": "max"},
            {"down_op": "max", "factor": 0.5, "residual": "bilinear"}]) if g < 3 else st.just({"down_op": "none"}))
    decoder = {"up_steps": ups, "enc_resample": draw(st.sampled_from(SAMPLINGS)), "ncat_c": draw(st.sampled_from(
        [0, 3])), "ncat_s": draw(st.sampled_from([1, 0.3]))}
    for s in range(ups + 1):
        decoder[f"block_{s}"] = draw(groups())
        if s:
            decoder[f"up_{s}"] = draw(st.sampled_from([
                {"up_op": "tconv", "factor": 2, "residual": "bilinear"}, {"up_op": "tconv", "factor": 2},
                {"up_op": "tconv", "factor": 3, "residual": "bilinear"}, {"up_op": "none"}]))
    section = {"encoder": encoder, "decoder": decoder, "enc_share": draw(st.booleans()),
               "attender": draw(st.sampled_from([-1, 5, 9, 13, 17, 25]))}
    if section["attender"] == -1 and draw(st.booleans()):
        decoder["residual_outc"] = False
    if draw(st.booleans()):
        refiner = {"block_0": draw(groups()), "enc_resample": draw(st.sampled_from(SAMPLINGS)),
                   "ncat_c": draw(st.sampled_from([0, 2])), "ncat_s": 0.5, "residual": draw(st.booleans())}
        if draw(st.booleans()) or ups + 1 > levels + 1:
            refiner["ref_con"] = draw(st.integers(-levels - 1, levels))
        section["refiner"] = refiner
    return section


def agree(section, channels, patch, h, w, batch, steps, outsize=None, tile=None):
    config = ModelConfig.from_published(section, channels=channels, patch=patch)
    model = UPLiFT(config).eval().requires_grad_(False)
    state = rule_state({key: tuple(value.shape) for key, value in model.state_dict().items()})
    model.load_state_dict(state)
    generator = torch.Generator().manual_seed(h * 31 + w)
    image = torch.rand(batch, 3, patch * h, patch * w, generator=generator)
    latent = torch.randn(batch, channels, h, w, generator=generator) * 3
    expected = PlainUplift(section, state, patch)(image, latent, steps, drawn, outsize)
    options = {"noise": drawn, "return_steps": True, "outsize": outsize}
    plain = model(image, latent, steps, form="plain", **options)
    fast = model(image, latent, steps, form="fast", **options)
    assert len(plain) == len(fast) == steps
    exact = model.double()(image.double(), latent.double(), steps, form="plain", **options)
    for i, want in enumerate(expected):
        assert difference(exact[i], want) < 1e-6  # one definition, to the last digits
        # A norm over a few nearly equal channels magnifies rounding in any form: allow what the plain one has.
        bound = max(TOLERANCE, 4 * difference(plain[i].double(), want))
        assert difference(fast[i].double(), want) < bound
    if tile and outsize is None and config.step_factor == 2:
        tiled = run(Job(model.float(), image, latent, steps, Drawn()), tile)
        assert difference(tiled.double(), expected[-1]) < bound


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sections(), st.integers(1, 5), st.integers(2, 6), st.integers(1, 3), st.integers(1, 2),
       st.sampled_from([None, (7, 9), (33, 12)]), st.sampled_from([4, 20]), st.sampled_from([8, 24]))
def test_every_option_of_the_language(section, h, w, batch, steps, outsize, channels, tile):
    agree(section, channels, 8, h, w, batch, steps, outsize, tile)


@pytest.mark.parametrize("patch", [14, 16])
def test_feature_models_at_odd_sizes(patch):
    meta = golden_metadata("dinov2-s14_16x" if patch == 14 else "dinov3-splus16_16x")
    agree(json.loads(meta["config"]), 20, patch, 5, 3, 2, 2, (37, 51))


def test_maps_taken_as_they_are():
    one = {"block": "SingleConv", "count": 1, "hc": [16]}
    section = {"encoder": {"down_steps": 1, "block_0": one, "down_1": {"down_op": "conv", "factor": 0.5,
                                                                       "residual": "none"}, "block_1": one},
               "decoder": {"up_steps": 1, "block_0": one, "up_1": {"up_op": "tconv", "factor": 2}, "block_1": one},
               "attender": 9}
    agree(section, 5, 2, 6, 5, 2, 1)


def test_legacy_blocks():
    """LiFT: a doubling by a bare transpose convolution, no attender."""
    one = {"block": "DoubleConv", "count": 1, "hc": [16]}
    section = {"encoder": {"down_steps": 0, "block_0": one},
               "decoder": {"up_steps": 0, "enc_resample": "nearest",
                           "block_0": {"block": "TransposeConv", "count": 1, "hc": [16]}}, "attender": -1}
    agree(section, 6, 8, 3, 5, 1, 2)
    section["decoder"]["block_0"] = {"block": "IdentityBlock", "count": 0, "hc": [22]}
    agree(section, 6, 8, 3, 5, 1, 1)


def test_the_independent_one_gives_the_published_numbers():
    case, meta = golden("small-vae_8x_batch2"), golden_metadata("small-vae_8x_batch2")
    ours = PlainUplift(json.loads(meta["config"]), case.model.state_dict(), 8)(case.image, case.latent, case.steps,
                                                                             case.noise())
    for step, want in case.expected.items():
        assert difference(ours[step - 1], want.double()) < TOLERANCE
