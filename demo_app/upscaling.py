"""What the Upscale tab does, without the page: a picture in, files and facts out."""

from __future__ import annotations

import math
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .context import App
from .jobs import Job
from .limits import MAX_BATCH, open_picture
from .storage import safe_name

if TYPE_CHECKING:
    from torch import Tensor

    from uplift_core.imageio import Picture

PREVIEW = 2048
"""Longer side of what is sent to the page; the file to download is always whole."""


@dataclass
class Options:
    """As the page and the API give them; checked before anything is loaded."""

    model: str = "auto"
    vae: str = "auto"
    scale: float = 2
    seed: float = 0
    noise_strength: float = 1.0
    color_fix: str = "mean"
    consistency: str = "auto"
    tile: str = "auto"

    def check(self) -> None:
        """Raises InputError for what cannot be meant."""
        from uplift_core.errors import InputError
        from uplift_core.upscaling import check_options, parse_tile

        for name in ("scale", "seed", "noise_strength"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(f"{name} is {value!r}; expected a number")
        check_options(self.scale, self.color_fix)
        parse_tile(self.tile, 8)
        if self.seed != int(self.seed) or not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed!r}; expected a whole number from 0")
        if not 0 <= self.noise_strength <= 2:
            raise InputError(f"noise_strength is {self.noise_strength!r}; expected 0 to 2")
        if self.consistency not in ("auto", "on", "off"):
            raise InputError(f"consistency is {self.consistency!r}; expected auto, on or off")


@dataclass
class Done:
    """One enlarged picture. ``path``: the whole PNG with its settings inside."""

    path: Path
    source: str
    options: Options
    facts: dict[str, Any] = field(default_factory=dict)


class Upscaler:
    """A loaded model with its codec, and the options for one picture after the other."""

    def __init__(self, app: App, options: Options, job: Job):
        from uplift_core.upscaling import pins_pixels

        options.check()
        self.app, self.options, self.job = app, options, job
        self.net, self.model_name, self.note = app.shelf.model(options.model, job)
        self.codec, self.vae_name = app.shelf.vae(options.vae, self.net, job)
        pinned = pins_pixels(self.net)  # as the command does
        self.consistency = {"auto": pinned, "on": True, "off": False}[options.consistency]

    def settings(self) -> dict[str, Any]:
        from uplift_core import __version__

        dtype = str(next(self.net.parameters()).dtype).removeprefix("torch.")
        o = self.options
        return {"version": __version__, "model": self.model_name, "vae": self.vae_name, "scale": o.scale,
                "seed": int(o.seed), "noise": o.noise_strength, "color_fix": o.color_fix,
                "consistency": self.consistency, "dtype": dtype}

    def run(self, source: str, name: str | None = None) -> tuple[Picture, Done]:
        """The picture that was read, and what was made of it. Raises as the core does."""
        from uplift_core.imageio import write_picture
        from uplift_core.measure import peak_memory, start_peak
        from uplift_core.pictures import upscale_picture

        o, job = self.options, self.job
        picture = open_picture(source, self.app.settings, o.scale)
        job.say(f"Enlarging {name or 'the picture'}")
        device = next(self.net.parameters()).device
        start_peak(device)
        begun = time.perf_counter()
        result = upscale_picture(self.net, self.codec, picture, scale=o.scale, seed=int(o.seed),
                                 noise_strength=o.noise_strength, tile=o.tile, color_fix=o.color_fix,
                                 consistency=self.consistency, progress=job.report, should_stop=job.should_stop)
        seconds = time.perf_counter() - begun
        job.say("Writing the file", 1.0)
        path = self.app.storage.new(f"{safe_name(Path(source).name).rpartition('.')[0]}_{o.scale:g}x.png")
        write_picture(result, path, settings=self.settings())
        notes = [note for note in (self.note, *picture.notes) if note]
        facts = {"from": _size(picture), "to": _size(result), "seconds": round(seconds, 2),
                 "peak_memory_mb": round(peak_memory(device) / 2**20),
                 "file_mb": round(path.stat().st_size / 1e6, 2), **self.settings(), "notes": notes}
        return picture, Done(path, source, o, facts)


def _size(picture: Picture) -> list[int]:
    return [int(picture.rgb.shape[2]), int(picture.rgb.shape[1])]


def upscale_many(app: App, files: Sequence[str], options: Options, job: Job) -> tuple[Path, list[list[str]]]:
    """A zip of all pictures that could be enlarged, and a line on each: name, size, seconds or what is wrong."""
    from uplift_core.errors import Cancelled, InputError, UpliftError

    if not files:
        raise InputError("there are no pictures yet: drop some into the box")
    if len(files) > MAX_BATCH:
        raise InputError(f"{len(files)} pictures at once; at most {MAX_BATCH}. The command 'uplift upscale' takes "
                         "whole folders")
    worker = Upscaler(app, options, job)
    target = app.storage.new(f"upscaled_{options.scale:g}x.zip")
    lines: list[list[str]] = []
    taken: set[str] = set()
    try:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
            for i, file in enumerate(files):
                name = Path(file).name
                try:
                    _, done = worker.run(file, f"{name} ({i + 1} of {len(files)})")
                except Cancelled:
                    raise
                except UpliftError as error:
                    lines.append([name, "", "", str(error)])
                    continue
                archive.write(done.path, _free(done.path.name, taken))
                done.path.unlink()
                (w, h), (large_w, large_h) = done.facts["from"], done.facts["to"]
                lines.append([name, f"{w}x{h} \u2192 {large_w}x{large_h}", f"{done.facts['seconds']:.1f}", "enlarged"])
        if not taken:
            raise InputError("none of the pictures could be enlarged: " + "; ".join(line[3] for line in lines[:3]))
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return target, lines


def _free(name: str, taken: set[str]) -> str:
    stem, number, free = name.rpartition(".")[0], 1, name
    while free.lower() in taken:
        number += 1
        free = f"{stem}-{number}.png"
    taken.add(free.lower())
    return free


# -- what the result is compared with ------------------------------------------------------------------------------

def before(kind: str, picture: Picture, done: Done, app: App, job: Job) -> Tensor:
    """``3 H W`` in [0, 1] of the result's size: the picture enlarged without UPLiFT.

    lanczos: in pixels. latents: its latents enlarged bilinearly and decoded. vae: through the VAE and back, then by
    Lanczos, which shows what the VAE alone takes away.
    """
    import torch
    import torch.nn.functional as F

    from uplift_core import match_color
    from uplift_core.errors import InputError
    from uplift_core.resample import antialias
    from uplift_core.upscaling import pad_to

    width, height = done.facts["to"]
    if kind == "lanczos":
        return _lanczos(picture.rgb, (width, height))
    if kind not in ("latents", "vae"):
        raise InputError(f"compare is {kind!r}; expected lanczos, latents or vae")
    net, _, _ = app.shelf.model(done.facts["model"], job)
    codec, _ = app.shelf.vae(done.facts["vae"], net, job)
    low = picture.rgb[None]
    job.say("Through the VAE")
    with torch.no_grad():
        latent = codec.encode(pad_to(low, net.config.patch), should_stop=job.should_stop)
        if kind == "vae":
            decoded = codec.decode(latent, should_stop=job.should_stop)[:, :, :low.shape[2], :low.shape[3]]
            return _lanczos(decoded[0], (width, height))
        factor = net.config.step_factor
        power = factor ** math.ceil(math.log(done.options.scale, factor) - 1e-9)
        latent = F.interpolate(latent, scale_factor=power, mode="bilinear", align_corners=False)
        decoded = codec.decode(latent, should_stop=job.should_stop)
        decoded = decoded[:, :, :low.shape[2] * power, :low.shape[3] * power]
        return match_color(antialias(decoded, (height, width)), low, "mean").clamp(0, 1)[0]


def _lanczos(rgb: Tensor, size: tuple[int, int]) -> Tensor:
    import numpy as np
    import torch
    from PIL import Image

    # Channel by channel as floats: Pillow has no other way to keep more than 8 bits.
    planes = [Image.fromarray(plane.numpy()).resize(size, Image.Resampling.LANCZOS) for plane in rgb.cpu().float()]
    return torch.stack([torch.from_numpy(np.array(plane)) for plane in planes]).clamp(0, 1)


# -- looking closer ------------------------------------------------------------------------------------------------

def window(size: tuple[int, int], zoom: float, centre: tuple[float, float]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a ``zoom``-th of a picture of ``size``, around a point (shares of the sides)."""
    box = []
    for length, at in zip(size, centre):
        part = max(1, min(length, round(length / zoom)))
        low = min(max(0, round(at * length - part / 2)), length - part)
        box.append((low, low + part))
    return box[0][0], box[1][0], box[0][1], box[1][1]


def view(path: Path, zoom: float, centre: tuple[float, float], target: Path) -> Path:
    """A part of a picture file, small enough for a page, as a file of its own."""
    from PIL import Image

    with Image.open(path) as image:
        if zoom <= 1 and max(image.size) <= PREVIEW:
            return path
        image.load()
        part = image.crop(window(image.size, zoom, centre)) if zoom > 1 else image
        if part.mode.startswith("I"):  # 16 bits, which the resize below does not know
            part = part.convert("I").point(lambda v: v / 257).convert("L")
    part.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
    part.save(target, "PNG", compress_level=1)
    return target
