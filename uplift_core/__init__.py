"""UPLiFT: sharp 2x, 4x and 8x enlargement of latents and features, guided by the image (arXiv 2601.17950)."""

from .config import PRESETS, ModelConfig
from .errors import UpliftError
from .model import UPLiFT

__version__ = "0.1.0"
__all__ = ["PRESETS", "ModelConfig", "UPLiFT", "UpliftError", "__version__"]
