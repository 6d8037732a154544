"""Recipes: those that come along are the published ones, wrong ones name the entry."""

from collections import Counter

import pytest
import torch

from training_runs import logged, recipe
from uplift_core import PRESETS
from uplift_core.errors import ConfigError
from uplift_core.model import UPLiFT
from uplift_core.training import Trainer, load_recipe, named_recipes
from uplift_core.training.recipe import LatentPart, OptimizerPart, TeacherPart, from_dict


def test_the_recipes_that_come_along_can_be_built():
    assert {"sd15-vae", "dinov2-s14", "dinov3-splus16", "tiny-vae", "uplift-mini"} <= set(named_recipes())
    for name in named_recipes():
        loaded = load_recipe(name)
        assert from_dict(loaded.to_dict()) == loaded
        if not loaded.is_codec:
            with torch.device("meta"):
                UPLiFT(loaded.model_config())


@pytest.mark.parametrize("changes, says", [
    ({"data__depths": [9]}, "multiple of 2048"), ({"data__sise": 3}, "did you mean 'size'"),
    ({"loss": "l3"}, "l2, l1, log, cosine"), ({"data__batch": "many"}, "batch: expected int"),
    ({"optimizer__ema": 1.0}, "below 1"), ({"teacher__backbone": "x"}, "one of them"),
    ({"run__steps": 0}, "run.epochs"),
    ({"model__uplift": {"encoder": {}}}, "'decoder'"),
    ({"data__size": 20}, "a multiple of 16"),
    ({"run__seed": -1}, "run.seed is -1"), ({"run__save_keep": 0}, "save_keep is 0"),
    ({"run__log_every": -1}, "log_every"), ({"run__steps": -5}, "run.steps"),
    ({"optimizer__clip": -1.0}, "clip"), ({"optimizer__warmup": -1}, "warmup"),
    ({"latents__augment": -0.1}, "augment is -0.1"), ({"data__workers": -1}, "workers"),
])
def test_wrong_recipes_name_the_entry(changes, says):
    with pytest.raises(ConfigError, match=says):
        recipe(**changes).model_config()


@pytest.mark.parametrize("name, size, depths, batch, epochs, augment", [
    ("sd15-vae", 1024, (1, 2, 3, 4), 1, 5, 1.0),
    ("dinov2-s14", 448, (1, 2, 3), 32, 1, 0.0),
    ("dinov3-splus16", 448, (1, 2), 32, 1, 0.0),
])
def test_the_published_recipes_are_the_papers(name, size, depths, batch, epochs, augment):
    """Sections B.1 and C.1: Adam at a constant rate of 1e-3, mean squared error, no average and no clipping."""
    made = load_recipe(name)
    assert (made.name, made.model.preset) == (name, name) and made.model_config() == PRESETS[name]
    assert (made.data.size, made.data.depths, made.data.batch) == (size, depths, batch)
    assert (made.run.epochs, made.run.steps) == (epochs, 0)
    assert made.optimizer == OptimizerPart(name="adam", lr=1e-3, weight_decay=0, warmup=0, decay=0, clip=0, ema=0)
    assert made.loss == "l2" and made.latents == LatentPart(augment=augment, normalise=False)
    assert made.teacher == (TeacherPart(vae="sd15") if name == "sd15-vae" else TeacherPart(backbone=name))


@pytest.mark.parametrize("epochs, batch, steps", [(5, 1, 15), (1, 32, 1), (1, 2, 2), (0.5, 1, 2), (4, 3, 4)])
def test_epochs_are_as_many_steps_as_show_every_picture_so_often(photos, codec, tmp_path, epochs, batch, steps):
    run = recipe(run={"epochs": epochs}, data__batch=batch)
    assert Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True).steps == steps
    run = recipe(run={"epochs": epochs, "steps": 7}, data__batch=batch)
    assert Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True).steps == 7


def test_the_published_schedule_on_a_small_model(photos, codec, tmp_path):
    """Five epochs of three pictures, one at a time, four depths; noise of std 1 on the latents a depth begins with."""
    small = vars(recipe().model)
    run = load_recipe("sd15-vae", {"model": small, "data.size": 64, "data.workers": 0, "run.log_every": 1,
                                   "run.preview_every": 0})
    trainer = Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True)
    assert type(trainer.make_optimizer()) is torch.optim.Adam
    seen, begun = [], []
    inputs = trainer.task.inputs

    def watched(images, keys, *given, **more):
        seen.extend(key.partition(":")[0] for key in keys)
        made = inputs(images, keys, *given, **more)
        begun.append(made[1])
        return made

    noise = []
    trainer.task.inputs = watched
    trainer.task.network.register_forward_pre_hook(
        lambda module, given: noise.append((given[2], (given[1] - begun[-1][given[2]]).flatten())))
    trainer.run()
    assert Counter(seen) == {"astronaut.png": 5, "coffee.png": 5, "chelsea.png": 5}
    assert [depth for depth, _ in noise] == [1, 2, 3, 4] * 15
    assert torch.cat([values for _, values in noise]).std() == pytest.approx(1, abs=0.03)
    assert [float(row["rate"]) for row in logged(tmp_path / "out")] == [1e-3] * 15
