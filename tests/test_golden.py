"""Agreement with the published code, for the plain form and every fast form."""

import pytest
import torch

from golden_cases import CASES, TOLERANCE, difference, golden
from uplift_core import PRESETS, UPLiFT
from uplift_core.forms import fast_forms

SHORTCUTS = {
    "plain": {}, "fast": {}, "no winograd": {"winograd": False}, "winograd everywhere": {"winograd_gain": 0},
    "dense encoder": {"sampled_encoder": False}, "unfolded": {"fold_batch_norm": False},
    "contiguous": {"channels_last": False}, "reference attender": {"block_attender": False},
    "small bands": {"band_pixels": 512},
}


@pytest.mark.parametrize("form", SHORTCUTS)
@pytest.mark.parametrize("name", CASES)
def test_golden(name, form):
    case = golden(name)
    with fast_forms(**SHORTCUTS[form]):
        results = case.model(case.image, case.latent, case.steps, noise=case.noise(), return_steps=True,
                             outsize=case.outsize, form="plain" if form == "plain" else "fast")
    assert len(results) == case.steps
    for step, expected in case.expected.items():
        assert difference(results[step - 1], expected) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_parameter_count(name):
    case = golden(name)
    assert sum(p.numel() for p in case.model.parameters()) == case.parameters


@pytest.mark.parametrize("name", PRESETS)
def test_published_keys_load_strictly(name):
    from rule_weights import published_shapes

    with torch.device("meta"):
        state = UPLiFT(PRESETS[name]).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published_shapes(name)


def test_only_the_last_step_is_returned_unless_asked():
    case = golden("small-vae_no-refiner")
    one = case.model(case.image, case.latent, 2, noise=None)
    both = case.model(case.image, case.latent, 2, noise=None, return_steps=True)
    assert torch.equal(one, both[1])
    assert tuple(both[0].shape[2:]) == (16, 16)
