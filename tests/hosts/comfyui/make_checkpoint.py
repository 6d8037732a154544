"""Run with ComfyUI's python from its tree: writes a checkpoint that is detected as SD1.5, made of random weights, and
TAESD in three latent spaces.

    python make_checkpoint.py FOLDER

The checkpoint's UNet has one level, its CLIP and VAE the full shapes. Every weight is a view of one of a few small
tensors, which torch stores once.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, ".")
sys.argv, folder = [sys.argv[0], "--cpu"], Path(sys.argv[1])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.ops  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.taesd.taesd import Decoder, Encoder  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

SIZE = 1 << 20
NOISE = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
SCALED = {}


def light(name, tensor):
    """Random values of about the size that keeps activations at one; rows are overlapping views of the same numbers."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    if tensor.ndim < 2:
        return torch.ones(1).expand(tensor.shape) if name.endswith("weight") else torch.zeros(1).expand(tensor.shape)
    inside = tensor[0].numel()
    power = inside.bit_length()
    values = SCALED.setdefault(power, (NOISE * 0.7 * 2 ** (-power / 2)).half())
    step = max(1, (SIZE - inside) // tensor.shape[0])
    return values.as_strided(tensor.shape, [step, *tensor[0].contiguous().stride()])


def shapes(module, prefix):
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


with torch.device("meta"):
    unet = UNetModel(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1],
                     channel_mult=[1], transformer_depth=[1], transformer_depth_output=[1, 1],
                     transformer_depth_middle=-1, context_dim=768, num_heads=8, use_spatial_transformer=True,
                     legacy=False, operations=comfy.ops.disable_weight_init)
    vae = AutoencoderKL(embed_dim=4, ddconfig={
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0})
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                        num_attention_heads=12, max_position_embeddings=77))
text = {name if "text_model." in name else f"cond_stage_model.transformer.text_model.{name.split('.', 2)[2]}": value
        for name, value in shapes(clip, "cond_stage_model.transformer.").items()}
state = shapes(unet, "model.diffusion_model.") | shapes(vae, "first_stage_model.") | text
(folder / "checkpoints").mkdir(parents=True)
torch.save({"state_dict": {name: light(name, tensor) for name, tensor in state.items()}},
           folder / "checkpoints" / "random_sd15.ckpt")

(folder / "vae_approx").mkdir()
torch.manual_seed(0)
for name, channels in (("taesd", 4), ("taesdxl", 4), ("taef1", 16)):
    for half, make in (("encoder", Encoder), ("decoder", Decoder)):
        module = make(channels)
        for part in module.modules():
            if isinstance(part, torch.nn.Conv2d):
                torch.nn.Conv2d.reset_parameters(part)  # ComfyUI's own layers leave memory as it was
        save_file(module.state_dict(), str(folder / "vae_approx" / f"{name}_{half}.safetensors"))
