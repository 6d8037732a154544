"""Image <-> latent codecs (AutoencoderKL, AutoencoderTiny), and the scaling conventions of latents."""

from .codec import Codec, KLCodec, TinyCodec
from .loading import ALIASES, load_vae, named_space
from .spaces import LATENT_SPACES, LatentSpace, check_pair, scale_latent, unscale_latent

__all__ = ["ALIASES", "LATENT_SPACES", "Codec", "KLCodec", "LatentSpace", "TinyCodec", "check_pair", "load_vae",
           "named_space", "scale_latent", "unscale_latent"]
