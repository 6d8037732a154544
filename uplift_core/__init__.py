"""UPLiFT: sharp 2x, 4x and 8x enlargement of latents and features, guided by the image (arXiv 2601.17950)."""

from .color import match_color
from .config import PRESETS, ModelConfig
from .consistency import back_project
from .dense import DenseFeatures, dense_features, load_features
from .errors import UpliftError
from .loading import load
from .model import UPLiFT
from .tiling import estimate_memory
from .upscaling import upscale_image, upscale_latents
from .vae import load_vae
from .version import __version__

__all__ = ["PRESETS", "DenseFeatures", "ModelConfig", "UPLiFT", "UpliftError", "__version__", "back_project",
           "dense_features", "estimate_memory", "load", "load_features", "load_vae", "match_color", "upscale_image",
           "upscale_latents"]
