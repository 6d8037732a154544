"""How good the pictures are: measurements against originals, always beside the plain alternatives."""

from .sr import METHODS, SuperResolution, evaluate_sr

__all__ = ["METHODS", "SuperResolution", "evaluate_sr"]
