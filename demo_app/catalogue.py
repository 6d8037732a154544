"""What the Models tab lists, and what it can download: the published weights and what they work with, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .jobs import Job
from .weights import VAES, Shelf, is_backbone, vae_is_here


@dataclass(frozen=True)
class Other:
    """Weights of others that UPLiFT works with. ``files``: where they are on the hub, config first."""

    name: str
    kind: str
    space: str
    repo: str
    files: tuple[str, ...]
    size_bytes: int
    licence: str


OTHERS = (
    Other("sd15", "VAE", "sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5",
          ("vae/config.json", "vae/diffusion_pytorch_model.safetensors"), 334_643_276, "CreativeML OpenRAIL-M"),
    Other("taesd", "VAE (fast, rougher)", "sd15", "madebyollin/taesd",
          ("config.json", "diffusion_pytorch_model.safetensors"), 9_793_292, "MIT"),
    Other("dinov3-splus16", "backbone", "dinov3-splus16", "timm/vit_small_plus_patch16_dinov3.lvd1689m",
          ("model.safetensors",), 115_000_000, "DINOv3 License"),
    Other("dinov2-s14", "backbone", "dinov2-s14", "timm/vit_small_patch14_dinov2.lvd142m", ("model.safetensors",),
          88_000_000, "Apache 2.0"),
)

PACKS = {
    "pictures": ("Pictures: sd15-vae and its VAE, 549 MB", "sd15-vae", ("sd15",)),
    "taesd": ("Pictures, faster and rougher: sd15-vae and TAESD, 224 MB", "sd15-vae", ("taesd",)),
    "dinov3": ("Dense features: DINOv3 small plus and its UPLiFT, 118 MB", "dinov3-splus16", ("dinov3-splus16",)),
    "dinov2": ("Dense features: DINOv2 small and its UPLiFT, 91 MB", "dinov2-s14", ("dinov2-s14",)),
}
"""Key -> title, UPLiFT model, what belongs to it: each makes something work that did not."""

COLUMNS = ["name", "kind", "here", "size", "latent space", "licence", "source"]
WIDTHS: list[str | int] = ["18%", "15%", "7%", "9%", "14%", "15%", "22%"]


def entries(shelf: Shelf) -> list[dict[str, Any]]:
    """Everything known, one dict a line, in plain values. Files are named, not where on the server they lie."""
    from uplift_core.registry import installed

    found = []
    for entry in installed():
        known = entry.known
        if known is None and is_backbone(entry.name):
            continue
        found.append(_line(entry.name, "UPLiFT" if known else "file", known.latent_space if known else "", entry.path,
                           known.size_bytes if known else 0, known.licence if known else "your own",
                           "comes with the program" if known and known.bundled else known.repo if known
                           else "model folder"))
    for one in OTHERS:
        here = vae_is_here(one.name) if one.name in VAES else backbone_file(one) is not None
        found.append({"name": one.name, "kind": one.kind, "latent_space": one.space, "size_bytes": one.size_bytes,
                      "here": here, "licence": one.licence, "source": one.repo})
    from uplift_core.assets import asset

    found.append(_line("tiny", "VAE", "tiny", asset("tiny-vae.safetensors"), 0, "MIT", "comes with the program"))
    for kind, place in (("UPLiFT", shelf.models), ("VAE", shelf.vaes)):
        found += [_line(name, kind, shelf.spaces.get(name, ""), path, 0, "your own", "added by you")
                  for name, path in place.items()]
    return found


def _line(name: str, kind: str, space: str, path: Path | None, size: int, licence: str, source: str
          ) -> dict[str, Any]:
    if path is not None and path.is_file():
        size = path.stat().st_size
    return {"name": name, "kind": kind, "latent_space": space, "size_bytes": size, "here": path is not None,
            "licence": licence, "source": source}


def table(shelf: Shelf) -> list[list[str]]:
    return [[e["name"], e["kind"], "yes" if e["here"] else "no",
             f"{e['size_bytes'] / 1e6:.0f} MB" if e["size_bytes"] else "", e["latent_space"], e["licence"], e["source"]]
            for e in entries(shelf)]


def backbone_file(one: Other) -> Path | None:
    """Where the core would find the weights of a backbone without the network."""
    from uplift_core import hub
    from uplift_core.backbones import in_folders

    return in_folders(one.repo.partition("/")[2]) or hub.cached(one.repo, one.files[-1])


def download(pack: str, offline: bool, job: Job) -> str:
    """Fetch what is missing of a pack into the hub's cache; a sentence on it. Raises DownloadError, InputError."""
    from uplift_core import hub, registry
    from uplift_core.errors import DownloadError, InputError

    if pack not in PACKS:
        raise InputError(f"nothing to download is called {pack!r}; there are {', '.join(PACKS)}")
    if offline:
        raise DownloadError("the page was started with --offline and downloads nothing; add a file below instead")
    _, model, others = PACKS[pack]
    if registry.find(model) is None:
        job.say(f"Downloading {model}")
        registry.download(model, progress=job.report)
    for one in OTHERS:
        there = vae_is_here(one.name) if one.name in VAES else backbone_file(one) is not None
        if one.name in others and not there:
            for file in one.files:
                job.say(f"Downloading {one.kind.split()[0]} {one.name}")
                hub.fetch(one.repo, file, folder=None, by_hand=registry.user_folder(), progress=job.report)
    return f"{' and '.join(dict.fromkeys((model, *others)))}: on this machine."


def missing(name: str, with_model: bool = True) -> str:
    """What is still needed before features of this backbone can be computed, or nothing."""
    from uplift_core.registry import find

    one = next(o for o in OTHERS if o.name == name and o.kind == "backbone")
    lacking = [what for what, there in (("the backbone", backbone_file(one)),
                                        ("its UPLiFT", not with_model or find(name))) if not there]
    if not lacking:
        return ""
    return (f"{name}: {' and '.join(lacking)} {'are' if len(lacking) > 1 else 'is'} not on this machine yet; the "
            "Models tab downloads what is missing")
