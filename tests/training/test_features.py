"""Training for the features of a vision transformer."""

import json
import signal

import pytest
import torch

from training_runs import SMALL, end, logged, losses_fall, recipe, same, start
from uplift_core import dense_features, load
from uplift_core.errors import InputError
from uplift_core.model import imagenet_normalise
from uplift_core.training import Trainer
from uplift_core.training.objective import pyramid

timm = pytest.importorskip("timm", reason="timm is not installed")

from uplift_core.backbones import Backbone  # noqa: E402


@pytest.fixture(scope="module")
def vit():
    """Patch 14, as DINOv2, and untrained."""
    torch.manual_seed(0)
    return Backbone(timm.models.VisionTransformer(img_size=28, patch_size=14, embed_dim=24, depth=1, num_heads=2,
                                                  num_classes=0, dynamic_img_size=True), "small")


def features_recipe(**changes):
    return recipe(**{"teacher": {"backbone": "small"}, "model__channels": 24, "model__patch": 14,
                     "model__latent_space": "", "data__size": 56, "latents": {}, **changes})


def test_features_of_a_vision_transformer(photos, tmp_path, caplog):
    """Its file names the network whose features it enlarges, and those of another are told apart."""
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    backbone = Backbone(timm.create_model(name, pretrained=False, num_classes=0, depth=1, dynamic_img_size=True), name)
    plain = {**{part: SMALL[part] for part in ("attender", "enc_share", "encoder")},
             "decoder": {**SMALL["decoder"], "ncat_c": 0}}
    run = recipe(teacher={"backbone": name}, model__uplift=plain, model__channels=192, model__patch=16, data__size=64,
                 data__depths=[1], run__steps=3, latents={}, model__latent_space="")
    path = Trainer(run, photos, tmp_path / "out", teacher=backbone, cpu=True).run()
    with pytest.raises(InputError, match="latent_space is 'sd15', which is of a VAE.*leave it empty"):
        Trainer(features_recipe(model__latent_space="sd15"), photos, tmp_path / "x", teacher=backbone, cpu=True)
    config = load(path).config
    assert (config.channels, config.image_norm) == (192, "imagenet")  # the guide it was trained on
    assert config.latent_space == name
    image = torch.rand(3, 32, 32)
    dense_features(image, backbone=backbone, model=path)
    assert "was trained on" not in caplog.text
    backbone.name = "vit_tiny_r_s16_p8_224"
    dense_features(image, backbone=backbone, model=path)
    assert f"trained on features of {name}, not of vit_tiny_r_s16_p8_224" in caplog.text


@pytest.mark.parametrize("loss", ["l2", "cosine"])
def test_it_learns_the_features_of_larger_pictures(photos, vit, tmp_path, loss):
    run = features_recipe(loss=loss, run__steps=40, optimizer__lr=1e-2, run__save_every=0)
    trainer = Trainer(run, photos, tmp_path, teacher=vit, cpu=True)
    guides = []
    trainer.task.network.register_forward_pre_hook(lambda module, given: guides.append(given[0]))
    model = load(trainer.run(), device="cpu")
    first = torch.stack([trainer.photos[n]["image"] for n in range(2)])
    torch.testing.assert_close(guides[0], imagenet_normalise(pyramid(first, 1)[1]))
    assert losses_fall(tmp_path) and (model.config.channels, model.config.patch) == (24, 14)
    assert json.loads((tmp_path / "step-00000040" / "training.json").read_text())["recipe"]["loss"] == loss
    images = torch.stack([trainer.photos[n]["image"] for n in range(3)])
    small = pyramid(images, 1)[1]
    target, start = vit.encode(images), vit.encode(small)
    with torch.no_grad():
        ours = model(imagenet_normalise(small), start, 1, noise=0)
    bilinear = torch.nn.functional.interpolate(start, scale_factor=2, mode="bilinear")
    error = [float((1 - torch.cosine_similarity(made, target)).mean()) for made in (ours, bilinear)]
    assert error[0] < 0.8 * error[1]


def test_a_killed_run_for_features_ends_like_an_uninterrupted_one(photos, vit, tmp_path):
    run = features_recipe()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Trainer(run, photos, whole, teacher=vit, cpu=True).run()
    torch.save(vit, tmp_path / "vit")
    code = """
teacher = torch.load(vit, weights_only=False)
trainer = Trainer(recipe, photos, out, teacher=teacher, cpu=True)
trainer.run(progress=lambda p: die() if p.step == 5 else None)
"""
    child = start(code, recipe=run, photos=photos, out=cut, vit=tmp_path / "vit")
    assert end(child) == [-signal.SIGKILL]
    assert [path.name for path in sorted(cut.glob("step-*"))] == ["step-00000002", "step-00000004"]
    path = Trainer(run, photos, cut, teacher=vit, cpu=True).run(resume=True)
    assert same(path, whole / "small.safetensors")
    assert [row["loss"] for row in logged(cut)] == [row["loss"] for row in logged(whole)]
