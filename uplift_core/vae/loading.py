"""From a name, a file or a folder to a codec that is whole, or one error that says what does not fit.

Files never touch the hub: what diffusers would ask it for is read off the shapes. Of a full checkpoint only the
entries of the VAE are read.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .. import hub
from ..assets import asset
from ..checkpoints import read_torch
from ..devices import choose_device, choose_dtype
from ..errors import CheckpointError, ConfigError, DownloadError, InputError, MissingExtra
from ..foreign import SUFFIXES, has_uplift_keys, kind_of, looks_like, safetensors_header
from .building import build, make_codec
from .codec import Codec, KLCodec, PatchCodec, TinyCodec
from .layouts import NotAVae, Shape, kl_keys, recognise, tiny_half
from .patchnet import PatchNet, PatchNetConfig
from .spaces import BUNDLED_VAE, LATENT_SPACES, spaces_with
from .spaces import latent_space as space_of

log = logging.getLogger(__name__)

ALIASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5:vae",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0:vae",
    "taesd": "madebyollin/taesd",
    "taesdxl": "madebyollin/taesdxl",
}
"""Short names for VAEs on the hub, as ``owner/name`` or ``owner/name:subfolder``."""

"""The name of the codec that comes with the package."""

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
           "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin")

_KINDS = ("AutoencoderKL", "AutoencoderTiny")
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w./-]*))?")
# Words of names and of modelspec metadata that tell the family; "ae.safetensors" is what Flux's VAE is published as.
_HINTS = tuple((re.compile(pattern), space) for pattern, space in (
    (r"taef1|flux|(^|[\s/])ae\.(safetensors|sft)", "flux"), (r"sd3|stable-diffusion-v?3", "sd3"),
    (r"sd_?xl|stable-diffusion-xl|(^|[^a-z])xl([^a-z]|$)", "sdxl"),
    (r"sd_?v?1|sd_?v?2|stable-diffusion-v?[12]|840000|560000", "sd15")))


def named_space(name: str) -> str:
    """The latent space of a VAE of that name, known before anything is looked for; empty for files and others."""
    if Path(name).expanduser().exists():
        return ""
    if name == BUNDLED_VAE or (name in ALIASES and name in LATENT_SPACES):
        return name
    return {"taesd": "sd15", "taesdxl": "sdxl"}.get(name, "")


def load_vae(name_or_path: str | os.PathLike[str], *, device: str | torch.device = "cpu",
             dtype: str | torch.dtype = torch.float32, latent_space: str | None = None,
             offline: bool | None = None) -> Codec:
    """A codec from a file, a folder or the hub.

    - a file (``.safetensors``, or a torch file without code): a full Stable Diffusion checkpoint, a VAE alone in LDM
      or diffusers layout, or either half of a TAESD pair with the other beside it;
    - a diffusers folder: of a VAE, or of a pipeline with ``vae/`` in it;
    - ``tiny``, the codec that comes with the package;
    - ``sd15``, ``taesd`` (see ALIASES), ``owner/name`` or ``owner/name:subfolder`` on the hub, from the cache if there.

    ``latent_space``: one of LATENT_SPACES, for files that do not tell; the VAEs of SD1.5 and SDXL look alike. Four
    channels without any sign are taken for ``sd15``. For a VAE of one's own, of any channels, a name that begins with
    ``own``. ``offline`` True never asks the hub, None leaves it to HF_HUB_OFFLINE.

    Raises CheckpointError naming the file and the first thing that does not fit, DownloadError, InputError,
    MissingExtra without diffusers.
    """
    if latent_space is not None and not latent_space.startswith("own"):
        space_of(latent_space)
    where = choose_device(device)
    number = choose_dtype(dtype, where)
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name == BUNDLED_VAE and not path.is_file():
        found = from_file(asset("tiny-vae.safetensors"), latent_space)
    elif name in ALIASES and not path.is_file():
        found = from_hub(ALIASES[name], latent_space, offline=bool(offline))
    elif path.is_dir():
        found = from_folder(path, latent_space)
    elif not path.exists() and not name.lower().endswith(SUFFIXES) and _HUB_NAME.fullmatch(name):
        found = from_hub(name, latent_space, offline=bool(offline))
    elif not path.exists():
        raise CheckpointError(f"{name} does not exist. Expected a VAE file ({', '.join(SUFFIXES)}), a diffusers "
                              f"folder, {', '.join(ALIASES)}, or owner/name on the Hugging Face hub")
    else:
        found = from_file(path, latent_space)
    return found.to(where, number)


# -- a single file -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _File:
    """The shapes of all entries of a weights file, and a way to read some of them."""

    path: Path
    shapes: dict[str, Shape]
    hint: str
    read: Callable[[Iterable[str]], dict[str, Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)


def _open(path: Path) -> _File:
    if kind_of(path) == "safetensors":
        entries, metadata = safetensors_header(path)
        try:
            shapes = {key: tuple(int(n) for n in entry["shape"]) for key, entry in entries.items()}
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path} has a damaged safetensors header. Download it again") from None

        def read(keys: Iterable[str]) -> dict[str, Tensor]:
            try:
                with safetensors.safe_open(str(path), framework="pt") as file:
                    return {key: file.get_tensor(key) for key in keys}
            except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as bad:
                raise CheckpointError(f"{path} cannot be read as safetensors ({bad}). Download it again") from None

        return _File(path, shapes, f"{path.name} {metadata.get('modelspec.architecture', '')}", read, metadata)
    state = read_torch(path, mapped=kind_of(path) == "zip")
    return _File(path, {key: tuple(value.shape) for key, value in state.items()}, path.name,
                 lambda keys: {key: state[key] for key in keys})


def from_file(path: Path, asked: str | None) -> Codec:
    file = _open(path)
    if file.metadata.get("codec") == "patchnet":
        return _patch_codec(file, asked)
    if half := tiny_half(file.shapes):
        return _from_pair(file, half, asked)
    try:
        layout = recognise(file.shapes)
    except NotAVae as bad:
        raise _not_a_vae(file, str(bad)) from None
    space = file.metadata.get("latent_space", "")  # of one that was trained here
    if space and asked not in (None, space):
        raise InputError(f"{path} makes '{space}' latents, not '{asked}'")
    if not space:
        space = _choose_space(path, layout.config["latent_channels"], None, f"{file.hint} {layout.family}", asked)
    state = file.read(layout.source.values())
    module = build(path, layout.kind, layout.config, {new: state[old] for new, old in layout.source.items()})
    return make_codec(module, layout.kind, space)


def _patch_codec(file: _File, asked: str | None) -> PatchCodec:
    try:
        net = PatchNet(PatchNetConfig.from_metadata(file.metadata))
        net.load_state_dict(file.read(file.shapes))
    except (ConfigError, RuntimeError) as bad:
        raise CheckpointError(f"{file.path} does not fit a tiny codec: {bad}") from None
    space = file.metadata.get("latent_space", "")
    if asked is not None and asked != space:
        raise InputError(f"{file.path} makes '{space}' latents, not '{asked}'")
    return PatchCodec(net, space)


def _from_pair(file: _File, half: str, asked: str | None) -> TinyCodec:
    other = "decoder" if half == "encoder" else "encoder"
    partner = file.path.with_name(file.path.name.replace(half, other))
    if partner == file.path:
        raise CheckpointError(f"{file.path} is the {half} of a TAESD pair, and its name does not say which file the "
                              f"{other} is. Call them NAME_encoder.safetensors and NAME_decoder.safetensors")
    if not partner.is_file():
        raise CheckpointError(f"{file.path} is the {half} of a TAESD pair; put its {other} beside it as {partner.name}")
    second = _open(partner)
    if tiny_half(second.shapes) != other:
        raise CheckpointError(f"{partner} is not the {other} that belongs to {file.path.name}"
                              + (f" (its first entry is '{next(iter(second.shapes))}')" if second.shapes else ""))
    shapes = {f"{part}.{key}": shape for part, its in ((half, file), (other, second))
              for key, shape in its.shapes.items()}
    try:
        layout = recognise(shapes)
    except NotAVae as bad:
        raise _not_a_vae(file, str(bad)) from None
    space = _choose_space(file.path, layout.config["latent_channels"], None, file.hint, asked)
    state = {f"{part}.{key}": value for part, its in ((half, file), (other, second))
             for key, value in its.read(its.shapes).items()}
    module = build(file.path, layout.kind, layout.config, {new: state[old] for new, old in layout.source.items()})
    codec = make_codec(module, layout.kind, space)
    assert isinstance(codec, TinyCodec)
    return codec


def _not_a_vae(file: _File, why: str) -> CheckpointError:
    ours = has_uplift_keys(file.shapes)
    family = "an UPLiFT, which is a model and no VAE" if ours else looks_like(file.shapes)
    first = f"; its first of {len(file.shapes)} entries is '{next(iter(file.shapes))}'" if file.shapes else \
        "; it has no entries"
    looks = f", it looks like {family}" if family and (ours or "VAE" not in family) and "full" not in family else ""
    return CheckpointError(f"{file.path} is not a VAE{looks}: {why}{first}. Choose a Stable Diffusion VAE or a full "
                           "checkpoint that includes one")


# -- a folder ------------------------------------------------------------------------------------------------------

def from_folder(folder: Path, asked: str | None, hint: str = "") -> KLCodec | TinyCodec:
    """A diffusers folder, of a VAE or with one in ``vae/``."""
    home = next((place for place in (folder, folder / "vae") if (place / "config.json").is_file()), None)
    if home is None:
        inside = sorted(p.name for p in folder.iterdir())[:3] if os.access(folder, os.R_OK) else []
        raise CheckpointError(f"{folder} has no config.json, neither itself nor in vae/"
                              + (f"; it holds {', '.join(inside)}" if inside else "; it is empty")
                              + ". Choose the folder of a diffusers VAE or pipeline, or a single file")
    config = _read_config(home / "config.json")
    weights = next((home / name for name in WEIGHTS if (home / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{home} has a config.json and no weights; expected {WEIGHTS[0]} beside it")
    file = _open(weights)
    state = file.read(file.shapes)
    if config["_class_name"] == "AutoencoderKL":
        state = {new: state[old] for new, old in kl_keys({key: key for key in state}).items()}
    module = build(weights, config["_class_name"], config, state)
    factor = config.get("scaling_factor") if config["_class_name"] == "AutoencoderKL" else None
    named = hint or f"{home.parent.name}/{home.name} {config.get('_name_or_path', '')}"
    space = _choose_space(home, module.config.latent_channels, factor, named, asked)
    return make_codec(module, config["_class_name"], space, factor, config.get("shift_factor"))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as bad:
        raise CheckpointError(f"{path} cannot be read as JSON ({bad})") from None
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in _KINDS:
        raise CheckpointError(f"{path} describes {kind or 'no model of diffusers'}; expected {' or '.join(_KINDS)}")
    return dict(config)


# -- the hub -------------------------------------------------------------------------------------------------------

def from_hub(name: str, asked: str | None, *, offline: bool = False) -> KLCodec | TinyCodec:
    """``owner/name[:subfolder]``: from the hub's cache, else downloaded into it."""
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise InputError(f"{name!r} is no name on the hub; expected owner/name or owner/name:subfolder")
    repo, subfolder = match[1], (match[2] or "").strip("/")
    places = [subfolder] if subfolder else ["", "vae"]
    for place in places:
        at = f"{place}/" if place else ""
        config = hub.cached(repo, f"{at}config.json")
        if config and (place or _is_vae(config)) and any(hub.cached(repo, at + weights) for weights in WEIGHTS):
            return from_folder(config.parent, asked, f"{repo} {place}")
    if offline:
        raise _out_of_reach(repo, f"{places[-1]}/config.json", "offline mode was asked for")
    for place in places:
        at = f"{place}/" if place else ""
        config = _download(repo, f"{at}config.json")
        if config is None or not (place or _is_vae(config)):
            continue
        if any(_download(repo, at + weights) for weights in (WEIGHTS[0], WEIGHTS[2])):
            return from_folder(config.parent, asked, f"{repo} {place}")
    raise DownloadError(f"{_address(repo)} holds no VAE in diffusers layout: no config.json with {WEIGHTS[0]} in "
                        f"{' or in '.join(place + '/' if place else 'its top folder' for place in places)}. "
                        "Name the folder as owner/name:folder, or pass the path of a VAE file")


def _is_vae(config: Path) -> bool:
    try:
        _read_config(config)
    except CheckpointError:
        return False
    return True


def _address(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def _download(repo: str, filename: str) -> Path | None:
    """The file, from the network or the cache; None when the repository has no such file."""
    try:
        import huggingface_hub
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "Downloading a VAE") from None
    try:
        return Path(huggingface_hub.hf_hub_download(repo, filename))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            return None
        raise _out_of_reach(repo, filename, hub.cause(error, _address(repo))) from error
    except Exception as error:  # whatever http library and version huggingface_hub brings
        raise _out_of_reach(repo, filename, hub.cause(error, _address(repo))) from error


def _out_of_reach(repo: str, filename: str, cause: str) -> DownloadError:
    folder = f"the files of its folder {filename.rpartition('/')[0]}/" if "/" in filename else "its files"
    return DownloadError(
        f"the VAE {repo} is not on this machine and could not be downloaded from {_address(repo)}: "
        f"{cause}. Pass the path of a VAE file or checkpoint that you have, or get "
        f"{folder} config.json and {WEIGHTS[0]} with a browser, put both into one folder, and pass that folder's path")


# -- which latent space ---------------------------------------------------------------------------------------------

def _choose_space(path: Path, channels: int, factor: float | None, hint: str, asked: str | None) -> str:
    """The latent space: what the caller says, else the configured scaling, else names, else 4 channels are sd15."""
    told = next((name for name, space in LATENT_SPACES.items() if factor is not None
                 and space.channels == channels and abs(space.scaling_factor - factor) < 1e-4), "")
    if asked is not None and asked.startswith("own"):
        return asked
    if asked is not None:
        want = LATENT_SPACES[asked]
        if want.channels != channels:
            looks = spaces_with(channels)
            raise InputError(f"{path} makes {channels}-channel latents and latent_space='{asked}' has {want.channels}"
                             + (f": this looks like {looks}" if looks else ""))
        if told and told != asked:
            log.warning("%s says it is of the latent space '%s'; taken as '%s' as asked", path, told, asked)
        return asked
    if factor is not None:
        return told
    for pattern, name in _HINTS:
        if pattern.search(hint.lower()) and LATENT_SPACES[name].channels == channels:
            return name
    if channels == 4:
        return "sd15"
    fitting = [name for name, space in LATENT_SPACES.items() if space.channels == channels]
    if fitting:
        raise InputError(f"{path} makes {channels}-channel latents, which may be {' or '.join(fitting)}: say which "
                         f"with latent_space='{fitting[0]}'")
    raise CheckpointError(f"{path} makes {channels}-channel latents; known are 4 (SD1.5, SDXL) and 16 (SD3, Flux). "
                          "Is it a VAE of your own? Then say so: latent_space='own'")
