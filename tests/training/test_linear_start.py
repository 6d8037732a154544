"""A linear start: at the optimum of what is linear, before training."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from training_runs import recipe
from uplift_core.errors import ConfigError
from uplift_core.model import UPLiFT
from uplift_core.training import Trainer
from uplift_core.training.linear_start import begin
from uplift_core.training.objective import pyramid

CARRYING = {"attender": 9, "enc_share": True,
            "encoder": {"down_steps": 2, "block_0": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [12]},
                        "down_1": {"down_op": "conv"},
                        "block_1": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [12]},
                        "down_2": {"down_op": "max"},
                        "block_2": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [16]}},
            "decoder": {"up_steps": 1, "ncat_c": 1, "enc_resample": "nearest",
                        "block_0": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [24]},
                        "up_1": {"up_op": "tconv", "residual": "bilinear"},
                        "block_1": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [24]}},
            "refiner": {"enc_resample": "bilinear", "ncat_c": 1, "ref_con": -2, "residual": True,
                        "block_0": {"block": "SingleConv", "norm": "layer", "count": 1, "hc": [20]}}}
"""Room for all of a linear start: 2x2 pixels of 3 colours, and a constant for the attender."""


def linear_recipe(**changes):
    return recipe(model__uplift=CARRYING, model__linear_start=True, model__fixed_norm=True, **changes)


def test_a_linear_start_pools_bilinearly_and_carries_pixels():
    torch.manual_seed(0)
    model = UPLiFT(linear_recipe().model_config()).eval()
    begin(model)
    image, latent = torch.rand(1, 3, 16, 24), torch.randn(1, 6, 4, 6)
    seen = []
    model.attender.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        maps = model.encoder(image)
        model(image, latent, noise=None, form="plain")
    bilinear = F.interpolate(latent, scale_factor=2, mode="bilinear", align_corners=False)
    assert (seen[0] - bilinear).abs().max() < 9 * 2e-3 * latent.abs().max() * 2
    torch.testing.assert_close(maps[1][:, :12], F.pixel_unshuffle(image, 2).view(1, 3, 4, 8, 12).transpose(1, 2)
                               .reshape(1, 12, 8, 12), atol=1e-4, rtol=0)


def test_a_linear_start_beats_bilinear_latents_before_training(photos, codec, tmp_path):
    trainer = Trainer(linear_recipe(data__depths=[1]), photos, tmp_path / "out", teacher=codec, cpu=True)
    trainer.task.measured_crops = 64
    trainer.task.prepare(trainer._first_images)
    model, picture = trainer.task.network.eval(), trainer.photos[5]["image"][None]
    low = pyramid(picture, 1)[1]
    with torch.no_grad():
        target, latent = codec.encode(picture), codec.encode(low)
        ours = F.mse_loss(model(low, latent, noise=None), target)
    bilinear = F.mse_loss(F.interpolate(latent, scale_factor=2, mode="bilinear", align_corners=False), target)
    assert ours < 0.5 * bilinear


def test_fixed_norms_keep_their_statistics(photos, codec, tmp_path):
    trainer = Trainer(linear_recipe(run__steps=2), photos, tmp_path / "out", teacher=codec, cpu=True)
    trainer.task.measured_crops = 4
    weights = load_file(trainer.run())
    assert (weights["encoder.down_1.down.1.running_mean"] == 0).all()
    assert (weights["encoder.down_1.down.1.running_var"] == 1).all()


@pytest.mark.parametrize("changes, says", [
    ({"refiner": {**CARRYING["refiner"], "residual": False}}, "refiner with residual"),
    ({"encoder": {**CARRYING["encoder"], "down_1": {"down_op": "max"}}}, "down_1 must be conv"),
    ({"encoder": {**CARRYING["encoder"], "block_1": {**CARRYING["encoder"]["block_1"], "hc": [8]}}}, "takes 12"),
    ({"encoder": {**CARRYING["encoder"], "block_2": {**CARRYING["encoder"]["block_2"], "hc": [12]}}},
     "4 channels wider"),
    ({"decoder": {**CARRYING["decoder"], "block_1": {**CARRYING["decoder"]["block_1"], "hc": [12]}}}, "needs 22"),
])
def test_a_model_without_room_for_a_linear_start_is_refused(changes, says):
    model = UPLiFT(recipe(model__uplift={**CARRYING, **changes}).model_config())
    with pytest.raises(ConfigError, match=says):
        begin(model)
