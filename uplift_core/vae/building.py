"""An autoencoder of diffusers, made from a configuration and exactly the weights that belong to it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, MissingExtra, UpliftError
from .codec import KLCodec, TinyCodec
from .spaces import LATENT_SPACES


def build(path: Path, kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """A diffusers autoencoder with exactly these weights. Everything is checked before the first is taken over."""
    cls = autoencoder(kind)
    known = set(inspect.signature(cls.__init__).parameters)
    options = {key: value for key, value in config.items() if key in known}
    lost = [key for key in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
            if config.get(key) is False and key not in known]
    if lost:
        raise CheckpointError(f"{path} needs the option '{lost[0]}', which this version of diffusers does not have; "
                              "install a newer one")
    try:
        with torch.device("meta"):
            module = cls(**options)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as bad:
        raise CheckpointError(f"{path} describes a VAE that cannot be built: {bad}") from None
    expected = module.state_dict()
    ready = {key: _fitting(path, key, state[key], want) for key, want in expected.items() if key in state}
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    if missing:
        raise CheckpointError(f"{path} is not a whole VAE: {len(missing)} of {len(expected)} entries are missing, the "
                              f"first is '{missing[0]}'. It was saved from another model or only in part")
    if extra:
        raise CheckpointError(f"{path} does not fit: {len(extra)} entries have no place in an {kind}, the first is "
                              f"'{extra[0]}'")
    module.load_state_dict(ready, strict=True, assign=True)
    return module


def _fitting(path: Path, key: str, value: Tensor, want: Tensor) -> Tensor:
    """A copy of the entry as fp32. Attention was stored as 1 x 1 convolutions once."""
    if not value.is_floating_point():
        raise CheckpointError(f"{path} does not fit: '{key}' is {value.dtype}; expected floating point numbers "
                              "(quantised files are not supported)")
    if ".attentions." in key and value.ndim == 4 and want.ndim == 2 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]
    if value.shape != want.shape:
        raise CheckpointError(f"{path} does not fit: '{key}' should be {tuple(want.shape)} and is "
                              f"{tuple(value.shape)}")
    value = value.to(torch.float32, copy=True)
    if not torch.isfinite(value).all():
        raise CheckpointError(f"{path} is damaged: '{key}' holds NaN or infinite numbers. Download it again")
    return value


def autoencoder(kind: str) -> type[nn.Module]:
    """The class of diffusers. Raises MissingExtra, or UpliftError when diffusers is there but broken."""
    try:
        import diffusers
    except ImportError as error:
        if error.name and error.name.partition(".")[0] != "diffusers":
            raise UpliftError(f"diffusers is installed but cannot be imported ({error}); bring diffusers and "
                              "huggingface_hub to versions that fit each other") from error
        raise MissingExtra("diffusers", "vae", "Encoding and decoding pictures") from error
    found: type[nn.Module] = getattr(diffusers, kind)
    return found


def make_codec(module: Any, kind: str, space: str, factor: float | None = None, shift: float | None = None,
           ) -> KLCodec | TinyCodec:
    """The codec with the scaling of its space, or of its own configuration where the space is not known."""
    known = LATENT_SPACES.get(space)
    scaling = known.scaling_factor if known else float(factor or 1.0)
    offset = known.shift if known else float(shift or 0.0)
    make = KLCodec if kind == "AutoencoderKL" else TinyCodec
    return make(module, space, scaling_factor=scaling, shift=offset)
