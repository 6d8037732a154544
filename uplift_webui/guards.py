"""When UPLiFT must not touch a picture, and how that is said."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_KINDS = (("is_sdxl", "SDXL"), ("is_ssd", "SSD"), ("is_sd3", "Stable Diffusion 3"), ("is_sd2", "Stable Diffusion 2"),
          ("is_flux", "Flux"))


def not_sd1(sd_model: Any) -> str:
    """Why latents of this checkpoint cannot be enlarged; empty if they can."""
    if getattr(sd_model, "is_sd1", False):
        return ""
    kind = next((name for flag, name in _KINDS if getattr(sd_model, flag, False)), type(sd_model).__name__)
    return f"it works on Stable Diffusion 1.5 latents and this checkpoint is {kind}"


def not_latents(samples: Any) -> str:
    """Why this is no batch of SD 1.5 latents; empty if it may be one."""
    if getattr(samples, "already_decoded", False):
        return "the picture is decoded already"
    if not isinstance(samples, Tensor):
        return f"there are no latents but {type(samples).__name__}"
    if samples.ndim != 4 or samples.shape[1] != 4 or 0 in samples.shape:
        return f"the latents have shape {tuple(samples.shape)}, expected batch x 4 x height x width"
    return ""


def not_direct(p: Any) -> str:
    """Why the direct route must not enlarge the pictures of this job; empty if it may."""
    if getattr(p, "enable_hr", False):
        return "Hires. fix is on: choose UPLiFT as its upscaler instead"
    if any(getattr(p, name, None) is not None for name in ("image_mask", "mask_for_overlay", "latent_mask")):
        return "inpainting pastes the result back at its own size"
    if selected_script(p):
        return f"the script '{selected_script(p)}' is selected, which may work in parts of a picture"
    return not_sd1(p.sd_model)


def selected_script(p: Any) -> str:
    """The name of the script chosen in the drop-down of scripts; empty if none is."""
    args = getattr(p, "script_args", None)
    index = args[0] if isinstance(args, (list, tuple)) and len(args) else 0
    if not isinstance(index, int) or isinstance(index, bool) or index <= 0:
        return ""
    listed = getattr(getattr(p, "scripts", None), "selectable_scripts", None) or []
    return str(listed[index - 1].title()) if index <= len(listed) else "?"
