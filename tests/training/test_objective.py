"""The objective: what is added up, and how errors count."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training_runs import SMALL
from uplift_core.config import ModelConfig
from uplift_core.model import UPLiFT
from uplift_core.training.objective import MultiDepth, distance, pyramid


def test_objective_is_the_sum_over_depths_and_steps():
    torch.manual_seed(0)
    config = ModelConfig.from_published(SMALL, channels=6, patch=4)
    model = UPLiFT(config).eval()
    nn.init.normal_(model.ref_outc.weight)
    image = torch.rand(2, 3, 64, 64)
    guides = pyramid(image, 2)
    maps = [torch.randn(2, 6, 16 >> level, 16 >> level) for level in range(3)]
    got = MultiDepth(model, (1, 2))(guides, maps, 3)
    generator = torch.Generator().manual_seed(3)

    def noise(shape, step, site):
        return torch.randn(shape, generator=generator)
    one = model(guides[1], maps[1], 1, noise=noise, return_steps=True)
    two = model(guides[2], maps[2], 2, noise=noise, return_steps=True)
    expected = F.mse_loss(one[0], maps[0]) + F.mse_loss(two[0], maps[1]) + F.mse_loss(two[1], maps[0])
    assert abs((got - expected).item()) < 1e-5
    kept = [m.clone() for m in maps]
    MultiDepth(model, (1, 2), augment=1.0)(guides, maps, 3)
    assert all(torch.equal(a, b) for a, b in zip(maps, kept, strict=True))  # noised latents are no targets


@pytest.mark.parametrize("loss", ["l1", "cosine"])
def test_other_losses_are_zero_for_the_same(loss):
    from uplift_core.training.objective import distance

    x = torch.randn(2, 6, 4, 4)
    assert float(distance(x, x, loss)) < 1e-6 < float(distance(x, x + torch.randn_like(x), loss))


def test_the_log_loss_weighs_pictures_by_their_own_error():
    """Halving a small error counts as much as halving a large one."""
    target = torch.zeros(2, 3, 4, 4)
    error = torch.stack([torch.full((3, 4, 4), 1.0), torch.full((3, 4, 4), 0.01)])

    def loss(factors):
        return distance(error * torch.tensor(factors).view(2, 1, 1, 1), target, "log", 1e-12)

    torch.testing.assert_close(loss([0.5, 1.0]), loss([1.0, 0.5]))
    assert loss([0.5, 1.0]) < loss([1.0, 1.0])
