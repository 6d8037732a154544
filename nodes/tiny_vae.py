"""UPLiFT Tiny VAE: the bundled codec as a VAE of ComfyUI."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management as management
import comfy.sd
import torch
from comfy_api.latest import io

from ..uplift_core import load_vae
from . import host
from .vaes import TAG


class UPLiFTTinyVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="UPLiFTTinyVAE", display_name="UPLiFT Tiny VAE", category=host.CATEGORY,
            description="The small VAE that comes with this pack, for the bundled UPLiFT model. Works with VAE Encode "
                        "and VAE Decode. Its latents (32 channels) are not for diffusion models.",
            search_aliases=["tiny vae", "vae loader", "offline vae"],
            inputs=[], outputs=[io.Vae.Output(display_name="VAE")])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(tiny_vae())


def tiny_vae() -> Any:
    """A ``comfy.sd.VAE`` around the bundled codec, so that the host's own memory handling and tiles apply."""
    with torch.inference_mode(False):
        codec: Any = load_vae("tiny", device="cpu", dtype=torch.float32)
        vae = _empty_vae()
        vae.first_stage_model = codec.module
        vae.latent_channels, vae.output_channels = codec.channels, 3
        vae.downscale_ratio = vae.upscale_ratio = codec.patch
        vae.process_input = lambda image: image
        vae.process_output = lambda image: image.clamp(0, 1)
        vae.memory_used_encode = lambda shape, dtype: codec.encode_bytes * shape[2] * shape[3]
        vae.memory_used_decode = lambda shape, dtype: codec.decode_bytes * shape[2] * shape[3] * codec.patch**2
        vae.device = management.vae_device()
        vae.vae_dtype = torch.float32  # 4 MB; the linear part is to be exact
        vae.working_dtypes = [torch.float32]
        vae.output_device = management.intermediate_device()
        vae.patcher = host.patcher_class()(codec.module, load_device=vae.device,
                                           offload_device=management.vae_offload_device())
        vae.size = management.module_size(codec.module)
    setattr(vae, TAG, codec.latent_space)
    return vae


def _empty_vae() -> Any:
    """The host's object with all its defaults, made of no weights. That it says so is of no use to anybody."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return comfy.sd.VAE(sd={})
    finally:
        logging.disable(before)
