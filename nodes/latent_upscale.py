"""UPLiFT Latent Upscale."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..uplift_core.errors import InputError
from . import host, options
from .latents import item_seeds, samples_for
from .models import HostModel
from .pictures import crop_like_vae, to_core
from .run import larger_latents
from .vaes import HostCodec, check_vae

SCALES = ["2x", "4x", "8x"]


class UPLiFTLatentUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="UPLiFTLatentUpscale", display_name="UPLiFT Latent Upscale", category=host.CATEGORY,
            description="Enlarges a latent 2, 4 or 8 times, sharply, without a second diffusion pass. Decode the "
                        "result, or sample it again at a low denoise.",
            search_aliases=["upscale latent", "hires fix", "latent upscale", "super resolution", "enlarge", "2x", "4x"],
            inputs=[
                options.model(),
                io.Latent.Input("samples", tooltip="The latent to enlarge, from a sampler or VAE Encode, made with the "
                                                   "VAE below."),
                io.Vae.Input("vae", lazy=True, tooltip="The VAE of the latent: decodes the picture that guides the "
                                                       "model. Not used when an image is connected."),
                options.scale(SCALES), options.seed(), options.noise_strength(), options.tile(),
                io.Image.Input("image", optional=True, tooltip="The picture the latent was made from, of the same "
                                                               "size. Saves decoding it."),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The larger latent; other entries are kept."),
                     io.Image.Output(display_name="guide", tooltip="The small picture that guided the model: a "
                                                                   "reference for UPLiFT Color Match.")])

    @classmethod
    def check_lazy_status(cls, vae: Any = None, image: Any = None, **others: Any) -> list[str]:
        return ["vae"] if vae is None and image is None else []

    @classmethod
    def execute(cls, model: HostModel, samples: dict[str, Any], scale: str, seed: int, noise_strength: float,
                tile: str, vae: Any = None, image: Any = None) -> io.NodeOutput:
        factor = int(options.chosen_scale(scale, SCALES))
        side = options.chosen_tile(tile)
        options.check_noise(seed, noise_strength)
        latent = samples_for(model, samples)
        if vae is not None:
            check_vae(model, vae)
        count, channels, height, width = latent.shape
        host.room_for(2 * 4 * count * channels * height * width * factor**2,
                      f"{count} latents of {width * factor}x{height * factor}")
        guide = _given(image, latent, model.patch) if image is not None else HostCodec(vae).decode(latent)
        larger = larger_latents(model, latent, guide, factor, item_seeds(samples, seed, len(latent)), noise_strength,
                                side)
        return io.NodeOutput({**samples, "samples": larger.to(latent.dtype)}, guide.movedim(1, -1))


def _given(image: Any, latent: Tensor, patch: int) -> Tensor:
    guide = to_core(image)
    if len(guide) not in (1, len(latent)):
        raise InputError(f"there are {len(latent)} latents and {len(guide)} pictures; connect as many, or one")
    height, width = latent.shape[2] * patch, latent.shape[3] * patch
    fitting = crop_like_vae(guide, height, width, patch)
    if fitting is None:
        raise InputError(f"the image is {guide.shape[3]}x{guide.shape[2]} and the latent covers {width}x{height} "
                         "pixels; connect the picture the latent was made from, or no image: then the latent is "
                         "decoded")
    return fitting
