"""UPLiFT Upscale Image."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..uplift_core import upscale_image
from ..uplift_core.color import COLOR_METHODS
from . import host, options
from .models import HostModel
from .pictures import room, to_core
from .run import Tile, carry_out, run_options
from .vaes import HostCodec, check_vae

SCALES = ["2x", "3x", "4x", "6x", "8x"]


class UPLiFTImageUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="UPLiFTImageUpscale", display_name="UPLiFT Upscale Image", category=host.CATEGORY,
            description="Enlarges pictures by way of their latents: encode, UPLiFT, decode, colours.",
            search_aliases=["upscale image", "super resolution", "enlarge photo", "image upscaler", "uplift"],
            inputs=[
                options.model(),
                io.Image.Input("image", tooltip="Pictures of any size."),
                io.Vae.Input("vae", tooltip="The VAE of the model: one of SD1.5 for the published model, UPLiFT Tiny "
                                            "VAE for the bundled one."),
                options.scale(SCALES), options.seed(), options.noise_strength(), options.tile(),
                io.Combo.Input("color_fix", options=list(COLOR_METHODS), default="mean",
                               tooltip="Brings the colours back to those of the small picture. mean: each channel's "
                                       "mean; adain: mean and contrast; wavelet: all that is coarse."),
                io.Boolean.Input("consistency", default=True,
                                 tooltip="Pin the result to the given pixels: shrunk again, it is the small picture. "
                                         "For good photographs; switch it off for noisy or badly compressed ones."),
            ],
            outputs=[io.Image.Output(display_name="IMAGE")])

    @classmethod
    def execute(cls, model: HostModel, image: Any, vae: Any, scale: str, seed: int, noise_strength: float, tile: str,
                color_fix: str, consistency: bool) -> io.NodeOutput:
        factor = int(options.chosen_scale(scale, SCALES))
        side = options.chosen_tile(tile)
        options.check_noise(seed, noise_strength)
        host.choice("color_fix", color_fix, list(COLOR_METHODS))
        check_vae(model, vae)
        low = to_core(image)
        count, _, height, width = low.shape
        power = 2 ** (factor - 1).bit_length()
        # The results, and for one picture at a time: decoded, resized, corrected.
        host.room_for(4 * 3 * height * width * (count * factor**2 + 3 * power**2),
                      f"{count} pictures of {width * factor}x{height * factor}")
        out = room(count, height * factor, width * factor)
        bar = host.Bar(count)
        codec = HostCodec(vae, encoded=lambda: model.ready(height + -height % model.patch, width + -width % model.patch,
                                                           power, side))
        for i in range(count):
            told = run_options(model, seed + i, noise_strength, bar.item(i))

            def work(tile: Tile, picture: Tensor = low[i:i + 1], told: dict[str, Any] = told) -> Tensor:
                return upscale_image(model.model, codec, picture, scale=factor, tile=tile, color_fix=color_fix,
                                     consistency=consistency, **told)

            out[i] = carry_out(work, side)[0].movedim(0, -1)
        return io.NodeOutput(out)
