"""``uplift eval sr``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..loading import load
from ..vae import load_vae
from .pairs import check_spaces, choose_model, vae_for

evaluation = typer.Typer(no_args_is_help=True, help="Measure quality against originals.")


@evaluation.callback()
def _group() -> None:
    """Measure quality against originals."""


@evaluation.command()
def sr(
    data: str = typer.Option("skimage", help="Folder of original pictures, or skimage for scikit-image's samples."),
    model: str = typer.Option("", help="Known name or weights file; default: as in uplift upscale."),
    vae: str = typer.Option("", help="VAE file, folder or name; default: the one the model was made for."),
    scale: list[int] = typer.Option([2, 4], help="Again for more."),
    crop: int = typer.Option(256, help="Center crop, side in pixels; 0 for whole pictures."),
    seed: int = typer.Option(0),
    each: bool = typer.Option(False, help="A line for every picture as well."),
    out: Optional[Path] = typer.Option(None, "--json", help="Write all numbers to this file."),
    sheets: Optional[Path] = typer.Option(None, help="Write a sheet of pictures for each original into this folder."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, xpu, mps."),
) -> None:
    """Super-resolution: shrink originals, enlarge them by every method, print PSNR and SSIM."""
    from ..evaluation import METHODS, evaluate_sr
    from ..training.preview import sheet

    console = Console(stderr=True)
    named, reason = choose_model(model, vae, console)
    net = load(named, device=device)
    codec = load_vae(vae_for(net.config.latent_space, vae, reason), device=next(net.parameters()).device)
    check_spaces(net.config.latent_space, codec.latent_space, reason)
    results: list[dict[str, Any]] = []
    with console.status("") as status:
        for factor in scale:
            def keep(name: str, original: Tensor, pictures: dict[str, Tensor], factor: int = factor) -> None:
                if sheets:
                    shown = {m: pictures[m] for m in ("bilinear latent", "UPLiFT", "UPLiFT + consistency", "codec",
                                                      "bicubic", "bicubic + consistency")}
                    sheet(sheets / f"{Path(name).stem}_{factor}x.png", {**shown, "original": original})

            def show(name: str, factor: int = factor) -> None:
                status.update(f"{factor}x {escape(name)}")

            result = evaluate_sr(net, codec, data, scale=factor, crop=crop or None, seed=seed, keep=keep, progress=show)
            table = Table(f"{factor}x, {len(result.names)} pictures", "PSNR dB", "SSIM",
                          "least gain over bilinear latent", "over bicubic", box=None, pad_edge=False)
            for method in METHODS:
                psnr, ssim = result.mean(method)
                table.add_row(method, f"{psnr:.2f}", f"{ssim:.4f}",
                              f"{result.least_gain(method, 'bilinear latent'):+.2f}",
                              f"{result.least_gain(method, 'bicubic'):+.2f}")
            Console().print(table, highlight=False)
            if each:
                lines = Table(f"{factor}x, PSNR dB", *METHODS, box=None, pad_edge=False)
                for i, name in enumerate(result.names):
                    lines.add_row(escape(name), *(f"{result.psnr[m][i]:.2f}" for m in METHODS))
                Console().print(lines, highlight=False)
            results.append(result.to_dict())
    if out:
        out.write_text(json.dumps({"data": data, "crop": crop, "seed": seed, "model": named, "results": results},
                                  indent=1), encoding="utf-8")
