"""Reading and writing weight files: a file in, a whole model out, or one error that says what is wrong with the file.

Formats are told by content. Files that hold code are never run: torch files are read with ``weights_only=True``.
"""

from __future__ import annotations

import logging
import os
import pickle
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .config import PRESETS, ModelConfig
from .errors import CheckpointError, ConfigError, InputError
from .foreign import OWN_KEY, called_in, has_uplift_keys, kind_of, not_uplift, safetensors_header

if TYPE_CHECKING:
    from .model import UPLiFT

log = logging.getLogger(__name__)

AVERAGED = ("state_dict_ema", "ema_state_dict", "model_ema", "ema")
PLAIN = ("state_dict", "model", "net", "uplift", "weights")


@dataclass(frozen=True)
class Weights:
    """What a weights file holds: the state dict under the published names, the file's metadata, and its path."""

    state: dict[str, Tensor]
    metadata: dict[str, str]
    path: Path


# -- reading -------------------------------------------------------------------------------------------------------

def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a ``.safetensors`` or torch file; wrappers and prefixes of trainers are taken off.

    The tensors are copies on the CPU in the dtypes of the file. Raises CheckpointError naming the file, the cause
    and what to do.
    """
    path = Path(path).expanduser()
    kind = kind_of(path)
    metadata: dict[str, str] = {}
    if kind == "safetensors":
        entries, metadata = safetensors_header(path)
        if not has_uplift_keys(entries):
            raise not_uplift(path, entries)
        state = _read_safetensors(path)
    else:
        state = read_torch(path, mapped=kind == "zip")
        if not has_uplift_keys(state):
            raise not_uplift(path, state)
    # Copies: what the libraries return is a window onto the file, which somebody may overwrite.
    state = {key: value.clone() for key, value in strip_prefixes(state).items()}
    _check_finite(path, state)
    return Weights(state, metadata, path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            names = file.keys()
            return {key: file.get_tensor(key) for key in names}
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as bad:
        raise CheckpointError(f"{path} cannot be read as safetensors ({bad}). Download it again") from None


def read_torch(path: Path, mapped: bool) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # remarks on pickle protocols; what cannot be read raises anyway
            # Mapping needs a path, and a new torch would take a path in .safetensors for what its name says.
            mapped = mapped and path.suffix != ".safetensors"
            loaded = torch.load(str(path) if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        if called := called_in(path):
            raise CheckpointError(f"{path} holds code or objects beside weights ('{called[0]}') and is not loaded, "
                                  "since that would run it. Save only the state dict, best as .safetensors") from None
        raise _damaged(path, ValueError("its pickle cannot be read")) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
            MemoryError, ImportError, UnicodeError) as bad:
        raise _damaged(path, bad) from None
    return _unwrap(path, loaded)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return CheckpointError(f"{path} is cut short, damaged or no torch weights ({reason}). Copy or download it again")


def _unwrap(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The state dict inside a trainer's checkpoint: averaged weights before plain ones."""
    for _ in range(4):
        if not isinstance(loaded, Mapping):
            break
        inner = next((loaded[name] for name in (*AVERAGED, *PLAIN) if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if isinstance(loaded, Tensor):
        raise CheckpointError(f"{path} holds a single tensor of shape {tuple(loaded.shape)}; expected a state dict")
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; expected a state dict: names and tensors")
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        shown = ", ".join(map(str, list(loaded)[:4])) or "nothing"
        raise CheckpointError(f"{path} holds no state dict: it has {shown}; expected names and tensors, possibly "
                              f"under {', '.join((*AVERAGED, *PLAIN))}")
    return tensors


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off what wrappers put before the published names (``module.``, ``_orig_mod.``, ``model.``, ``uplift.``).

    The chain of prefixes is the one most of the model's own keys carry (the shorter of two equally frequent). Entries
    without it belong to other parts of the training and are left out; without any prefix nothing is left out.
    """
    count: dict[str, int] = {}
    for key in state:
        if own := OWN_KEY.match(key):
            count[own[1]] = count.get(own[1], 0) + 1
    prefix = min(count, key=lambda chain: (-count[chain], len(chain), chain), default="")
    if not prefix:
        return dict(state)
    others = [key for key in state if not key.startswith(prefix)]
    if others:
        log.warning("left out %d entries that are not under '%s', the first is '%s'", len(others), prefix, others[0])
    return {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if value.is_floating_point():
            probe = value.float() if value.element_size() < 2 else value
            if not torch.isfinite(probe).all():
                raise CheckpointError(f"{path} is damaged: '{key}' holds NaN or infinite numbers. If you trained it, "
                                      "take an earlier checkpoint; else download it again")


# -- building ------------------------------------------------------------------------------------------------------

def config_and_source(weights: Weights) -> tuple[ModelConfig, str]:
    """The configuration of the weights, and where it came from: ``metadata``, ``known model NAME`` or ``shapes``.

    The two published DINO models have equal shapes: metadata decides between them, then the file's name.
    """
    try:
        config = ModelConfig.from_metadata(weights.metadata)
        if config is not None:
            return config, "metadata"
        config = ModelConfig.from_state_dict(weights.state, weights.metadata)
    except (ConfigError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as bad:
        raise CheckpointError(f"{weights.path} does not fit: {bad}. Save it again in full, or choose a file made for "
                              "UPLiFT") from None
    told = weights.metadata.get("patch") or weights.metadata.get("latent_space")
    if config == PRESETS["dinov3-splus16"] and not told and "dinov2" in weights.path.name.lower():
        config = PRESETS["dinov2-s14"]
    nearest = sorted(PRESETS.items(), key=lambda known: known[1] != config)  # the DINO models have equal shapes
    source = next((f"known model {name}" for name, preset in nearest
                   if config == replace(preset, patch=config.patch, latent_space=config.latent_space)), "shapes")
    return config, source


def config_for(weights: Weights) -> ModelConfig:
    """The configuration of the weights: from metadata, a known model, or shapes. Raises CheckpointError."""
    return config_and_source(weights)[0]


def build(weights: Weights, *, operations: Any = nn, config: ModelConfig | None = None) -> UPLiFT:
    """A model in eval mode that holds exactly these weights, in the dtypes of the file, on the CPU.

    The weights are checked before the first is taken over, so there is never a half-loaded model. Raises
    CheckpointError naming the first entry that does not fit.
    """
    from .model import UPLiFT

    if config is None:
        config = config_for(weights)
    try:
        with torch.device("meta"):
            model = UPLiFT(config, operations)
    except (ConfigError, RuntimeError) as bad:
        raise CheckpointError(f"{weights.path} describes a model that cannot be built: {brief(bad)}") from None
    state = _fitting(weights, model.state_dict())
    for attempt in range(2):
        try:
            model.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as bad:  # torch lists every entry, a page of them
            raise CheckpointError(f"{weights.path} does not fit: {brief(bad)}") from None
        if attempt or not _has_meta(model):
            break
        model = UPLiFT(config, operations)  # it has constants that no state dict carries
    return model.eval()


def brief(error: Exception, lines: int = 3, width: int = 300) -> str:
    """The first lines of an error's message as one line, with a note of how many more there are."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(said[:lines])
    text = text if len(text) <= width else text[:width].rstrip() + " ..."
    return text + (f" (and {len(said) - lines} more lines)" if len(said) > lines else "")


def _has_meta(model: nn.Module) -> bool:
    return any(isinstance(value, Tensor) and value.is_meta for module in model.modules()
               for part in (vars(module), module._parameters, module._buffers) for value in part.values())


def _fitting(weights: Weights, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in full, or a CheckpointError with the first thing that does not fit."""
    state, path = dict(weights.state), weights.path
    for key in expected:
        if key.endswith("num_batches_tracked") and key not in state:
            state[key] = torch.zeros((), dtype=torch.long)  # bookkeeping that some exporters drop
    for key, want in expected.items():
        got = state.get(key)
        if got is not None and got.shape != want.shape:
            raise CheckpointError(f"{path} does not fit: '{key}' should be {tuple(want.shape)} and is "
                                  f"{tuple(got.shape)}. Another number of channels, or another kind of model")
        if got is not None and got.is_floating_point() != want.is_floating_point():
            raise CheckpointError(f"{path} does not fit: '{key}' is {got.dtype}; expected floating point numbers "
                                  "(quantised files are not supported)")
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"{len(missing)} of {len(expected)} entries are missing, the first is '{missing[0]}'")
        if extra:
            parts.append(f"{len(extra)} entries have no place in the model, the first is '{extra[0]}'")
        raise CheckpointError(f"{path} does not fit: {'; '.join(parts)}. It was saved from another model or only "
                              "in part")
    return state


# -- writing -------------------------------------------------------------------------------------------------------

def save(model_or_state: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], *,
         config: ModelConfig | None = None, extra_metadata: Mapping[str, Any] | None = None,
         dtype: torch.dtype | None = None) -> Path:
    """Write a ``.safetensors`` file with the configuration in its metadata; whole or not at all.

    ``config`` may be left out for a model that has one; ``dtype`` casts the floating point tensors. Raises InputError
    for a call that cannot work, CheckpointError when the file cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path} should end in .safetensors, the format that is written")
    config = config or getattr(model_or_state, "config", None)
    if not isinstance(config, ModelConfig):
        raise InputError("a state dict is saved together with its configuration: pass config=ModelConfig(...)")
    metadata = config.to_metadata()
    for key, value in (extra_metadata or {}).items():
        if key in (*metadata, "latent_space", "image_norm"):
            raise InputError(f"'{key}' in extra_metadata is taken by the configuration; choose another name")
        metadata[key] = str(value)
    source = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    state = {key: value.detach().to(device="cpu", dtype=dtype if value.is_floating_point() else None,
                                    copy=True, memory_format=torch.contiguous_format)
             for key, value in strip_prefixes(source).items()}
    write_safetensors(state, path, metadata)
    return path


def write_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A file that is there whole or not at all. Raises CheckpointError when it cannot be written."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)
        mode = part.stat().st_mode & 0o777  # as every new file here; safetensors would let nobody else read it
        whole = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        safetensors.torch.save_file(whole, str(part), metadata=dict(metadata))
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, safetensors.SafetensorError) as bad:
        raise CheckpointError(f"{path} cannot be written: {getattr(bad, 'strerror', None) or bad}") from None
    finally:
        part.unlink(missing_ok=True)
