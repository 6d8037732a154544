"""Feature upsamplers of others, run from the user's own copies of their repositories or from installed packages.

None of their code is part of this package: a repository is looked for in the folder of torch.hub
(``torch.hub.get_dir()``), where ``git clone`` or ``torch.hub.load`` puts it, and AnyUp and FeatUp, whose repositories
install a package, among the installed ones too. AnyUp's, LoftUp's and FeatUp's weights are then fetched from where they
were published. Run with random weights: AnyUp (commit 351807a), LoftUp (6620d9b), JAFAR (94d4d54), LiFT. FeatUp has to
be compiled and was not; no published weights of any were at hand.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DownloadError, InputError, UpliftError


@dataclass(frozen=True)
class Features:
    """What is to be enlarged: ``channels`` of patch ``patch``, made by the timm model ``backbone`` ("" if unknown)."""

    channels: int
    patch: int
    backbone: str = ""


@dataclass(frozen=True)
class Package:
    """What a repository installs: the module ``name`` has the network, ``build(features, weights)`` gives it."""

    name: str
    build: Callable[[Features, bool], nn.Module]

    @property
    def folder(self) -> Path | None:
        """Where it is installed; not what only happens to have the name, such as a folder without a package."""
        top, _, module = self.name.partition(".")
        try:
            spec = importlib.util.find_spec(top)
        except ValueError:  # a module without a specification, as some hosts make
            return None
        folder = Path(spec.origin).parent if spec and spec.origin else None
        return folder if folder and (folder / f"{module}.py").is_file() else None


@dataclass(frozen=True)
class Peer:
    """``build(folder, features, weights)`` gives the network, ``call(network, guide, low, size)`` runs it: the guide
    ``1 3 H W`` is normalised as for ImageNet, ``size`` is what the result should come close to."""

    repository: str
    build: Callable[[Path, Features, bool], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor, tuple[int, int]], Tensor]
    package: Package | None = None

    @property
    def copy(self) -> Path | None:
        """The user's copy of the repository, if there is one."""
        wanted = self.repository.replace("/", "_").lower()
        found = sorted(p for p in Path(torch.hub.get_dir()).glob("*") if p.is_dir() and
                       p.name.lower().startswith(wanted))
        return found[-1] if found else None


def folder_of(name: str) -> Path:
    """Where a peer is: the user's copy of its repository, else the installed package. Raises UpliftError."""
    peer, hub = PEERS[name], Path(torch.hub.get_dir())
    if found := peer.copy or (peer.package and peer.package.folder):
        return found
    folder = peer.repository.replace("/", "_")
    package = f" and no installed package {peer.package.name.partition('.')[0]}" if peer.package else ""
    raise UpliftError(f"{name} is not on this machine: no folder {folder}_* in {hub}{package}. It is not part of this "
                      f"package; fetch it with: git clone https://github.com/{peer.repository} {hub / folder}_main")


def installed() -> list[str]:
    """The peers that are on this machine."""
    return [name for name, peer in PEERS.items() if peer.copy or (peer.package and peer.package.folder)]


def load_peer(name: str, features: Features, *, weights: bool = True, offline: bool = False) -> nn.Module:
    """A peer's network for such features, its own weights in it unless ``weights`` is off (then random ones).
    ``offline``: only weights that are on this machine.

    Raises UpliftError when it is not there or cannot be loaded, InputError when it has no such network, DownloadError
    when its weights are out of reach."""
    peer, folder = PEERS[name], folder_of(name)
    try:
        with _no_downloads() if offline else nullcontext():
            if peer.package and folder == peer.package.folder:
                network = peer.package.build(features, weights)
            else:
                network = peer.build(folder, features, weights)
        return network.eval().requires_grad_(False)
    except UpliftError:
        raise
    except Exception as error:  # code of others: anything may happen
        raise UpliftError(f"{name} in {folder} cannot be loaded ({type(error).__name__}: {error})") from error


@contextmanager
def _no_downloads() -> Iterator[None]:
    """torch.hub and the Hugging Face hub, which code of others downloads with, give what is in their caches only."""
    def refuse(address: str, path: str, *given: Any, **more: Any) -> None:
        raise DownloadError(f"{Path(path).name} is not on this machine, and nothing is downloaded offline. Get it from "
                            f"{address} and put it into {Path(path).parent}")

    changed: list[tuple[Any, str, Any]] = [(torch.hub, "download_url_to_file", refuse)]
    with suppress(ImportError):
        changed.append((importlib.import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True))
    before = [getattr(module, name) for module, name, _ in changed]
    try:
        for module, name, value in changed:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(changed, before, strict=True):
            setattr(module, name, value)


@contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """Imports come from ``folder`` first. Its packages have names such as ``utils``, which a host may have too: they
    are put aside for the time and are back in the end."""
    tops = {p.stem for p in folder.iterdir() if p.suffix == ".py" or (p.is_dir() and p.name.isidentifier())}
    aside = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] in tops}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for key in [key for key in sys.modules if key.split(".")[0] in tops]:
            del sys.modules[key]
        sys.modules.update(aside)


def _read(path: Path, entry: str = "") -> Any:
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state[entry] if entry else state
    return {key.removeprefix("module."): value for key, value in state.items()}


def _weights(places: list[Path], address: str) -> Path:
    for path in places:
        if path.is_file():
            return path
    raise InputError(f"its weights are not here: expected {' or '.join(map(str, places))}, from {address}")


def _fetched(address: str) -> Path:
    """The file in the folder where torch.hub keeps weights, downloaded if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), progress=False)
        except OSError as error:
            raise DownloadError(f"{path.name} could not be downloaded ({error}). Get it from {address} with a browser "
                                f"or on another machine and put it into {path.parent}") from error
    return path


def _anyup(folder: Path, features: Features, weights: bool) -> nn.Module:
    return torch.hub.load(str(folder), "anyup", source="local", pretrained=weights)


def _anyup_package(features: Features, weights: bool) -> nn.Module:
    network: nn.Module = importlib.import_module("anyup.model").AnyUp()
    if weights:
        network.load_state_dict(_read(_fetched(
            "https://github.com/wimmerth/anyup/releases/download/checkpoint/anyup_paper.pth")))
    return network


def _loftup(folder: Path, features: Features, weights: bool) -> nn.Module:
    sizes = {384: "s", 768: "b"}
    if features.channels not in sizes or (weights and "dinov2" not in features.backbone):
        raise InputError(f"LoftUp's networks here are for DINOv2 small and base, not for {features.channels} channels "
                         f"of {features.backbone or 'an unknown backbone'}")
    registers = "_reg" if "reg4" in features.backbone else ""
    entry = f"loftup_dinov2{sizes[features.channels]}{registers}"
    return torch.hub.load(str(folder), entry, source="local", pretrained=weights)


def _jafar(folder: Path, features: Features, weights: bool) -> nn.Module:
    with _importing(folder):
        module: Any = importlib.import_module("src.upsampler.jafar")
    network = module.JAFAR(v_dim=features.channels)
    coordinates = module.create_coordinate  # on "cuda" unless told otherwise
    module.create_coordinate = lambda h, w: coordinates(h, w, device=next(network.parameters()).device)
    if weights:
        file = f"{features.backbone}.pth"
        address = f"https://github.com/PaulCouairon/JAFAR/releases/download/Weights/{file}"
        places = [folder / file, Path(torch.hub.get_dir()) / "checkpoints" / file]
        network.load_state_dict(_read(_weights(places, address), "jafar"), strict=False)
    return network


def _lift(folder: Path, features: Features, weights: bool) -> nn.Module:
    if features.patch not in (8, 16):
        raise InputError(f"LiFT is for patches of 8 and 16 pixels, not {features.patch}")
    with _importing(folder):
        network = importlib.import_module("lift").LiFT(features.channels, features.patch, False, False)
    if weights:
        found = sorted((folder / "pretrained").glob(f"*{features.patch}.pth"))
        size = "s" if features.channels == 384 else "b"
        wanted = folder / "pretrained" / f"lift_dino_vit{size}{features.patch}.pth"
        network.load_state_dict(_read(_weights([wanted, *found], "https://github.com/saksham-s/lift")))
    return network


def _featup(folder: Path, features: Features, weights: bool) -> nn.Module:
    if not weights:
        with _importing(folder):
            return importlib.import_module("featup.upsamplers").get_upsampler("jbu_stack", features.channels)
    _check_featup(features)
    network = torch.hub.load(str(folder), "dinov2", source="local")
    return nn.Sequential(network.model[1], network.upsampler)  # the norm it was trained behind, not its own backbone


def _featup_package(features: Features, weights: bool) -> nn.Module:
    if weights:
        _check_featup(features)
    upsampler = importlib.import_module("featup.upsamplers").get_upsampler("jbu_stack", features.channels)
    if not weights:
        return upsampler
    network = nn.Sequential(importlib.import_module("featup.layers").ChannelNorm(features.channels), upsampler)
    state = _read(_fetched("https://marhamilresearch4.blob.core.windows.net/feature-upsampling-public/pretrained/"
                           "dinov2_jbu_stack_cocostuff.ckpt"), "state_dict")
    own = {"model.1.": "0.", "upsampler.": "1."}  # what else is in it is its backbone and the other half of training
    network.load_state_dict({new + key.removeprefix(old): value for key, value in state.items()
                             for old, new in own.items() if key.startswith(old)})
    return network


def _check_featup(features: Features) -> None:
    if "dinov2" not in features.backbone or features.channels != 384:
        raise InputError(f"FeatUp's network here is for DINOv2 small, not for {features.backbone or 'this backbone'}")


def _call_featup(network: nn.Module, guide: Tensor, low: Tensor, size: tuple[int, int]) -> Tensor:
    if isinstance(network, nn.Sequential):
        return network[1](network[0](low), guide)
    return network(low, guide)


def _call_loftup(network: nn.Module, guide: Tensor, low: Tensor, size: tuple[int, int]) -> Tensor:
    return network(low, F.interpolate(guide, size=size, mode="bilinear", align_corners=False))


def _call_lift(network: nn.Module, guide: Tensor, low: Tensor, size: tuple[int, int]) -> Tensor:
    # Twice the size a run; as its own extractor does, the next run sees the picture enlarged with it.
    while low.shape[2] < size[0]:
        grid = (low.shape[2] * int(network.patch_size), low.shape[3] * int(network.patch_size))  # type: ignore[arg-type]
        low = network(F.interpolate(guide, size=grid, mode="bilinear", align_corners=False), low)
    return low


PEERS: dict[str, Peer] = {
    "lift": Peer("saksham-s/lift", _lift, _call_lift),
    "featup": Peer("mhamilton723/FeatUp", _featup, _call_featup,
                   Package("featup.upsamplers", _featup_package)),
    "loftup": Peer("andrehuang/loftup", _loftup, _call_loftup),
    "jafar": Peer("PaulCouairon/JAFAR", _jafar, lambda network, guide, low, size: network(guide, low, size)),
    "anyup": Peer("wimmerth/anyup", _anyup, lambda network, guide, low, size: network(guide, low, size),
                  Package("anyup.model", _anyup_package)),
}
