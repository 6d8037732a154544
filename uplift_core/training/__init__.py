"""Training of an UPLiFT for a VAE's latents or a backbone's features, and of the tiny codec (paper 3.3, B.1, C.1)."""

from .recipe import Recipe, load_recipe, named_recipes
from .trainer import Trainer

__all__ = ["Recipe", "Trainer", "load_recipe", "named_recipes"]
