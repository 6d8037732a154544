"""What the flags say. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_PIXELS = 4096 * 4096
RESULT_FACTOR = 4
"""A result may have this many times the pixels of the largest picture that is accepted."""


@dataclass(frozen=True)
class Settings:
    """listen: the address to bind. port: None takes the first free one from 7860. temp: the only folder written to."""

    temp: Path
    listen: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    model: str = "auto"
    vae: str = ""
    checkpoint: str = ""
    device: str = "auto"
    offline: bool = False
    max_pixels: int = MAX_PIXELS

    @property
    def alone(self) -> bool:
        """Whether only people at this machine reach the page; then they may name files by path."""
        return not self.share and (self.listen in ("localhost", "::1") or self.listen.startswith("127."))

    @property
    def max_result(self) -> int:
        return RESULT_FACTOR * self.max_pixels


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="demo.py", description="UPLiFT in the browser.")
    flags.add_argument("--listen", nargs="?", const="0.0.0.0", default="127.0.0.1", metavar="ADDRESS",
                       help="let other machines in, at all addresses or at this one (default: this machine only)")
    flags.add_argument("--port", type=_port, help="default: the first free one from 7860")
    flags.add_argument("--share", action="store_true", help="a public link through Gradio's servers")
    flags.add_argument("--model", default="auto", help="weights file or known name; auto: sd15-vae if it is on this "
                       "machine, else the bundled model")
    flags.add_argument("--vae", default="", help="VAE file, folder or name; default: the one the model was made for")
    flags.add_argument("--checkpoint", default="", help="Stable Diffusion 1.5 for the Generate tab: a checkpoint file, "
                       "a diffusers folder or a name on the hub")
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, xpu, mps")
    flags.add_argument("--offline", action="store_true", help="never ask the network for anything")
    flags.add_argument("--max-pixels", type=_positive, default=MAX_PIXELS,
                       help=f"refuse larger pictures unread (default: {MAX_PIXELS:,})")
    return flags


def parse(arguments: Sequence[str] | None, temp: Path) -> Settings:
    """Settings from the command line; argparse ends the program at what it does not know."""
    return Settings(temp=temp, **vars(parser().parse_args(arguments)))


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 65536:
        raise argparse.ArgumentTypeError(f"{port} is no port; expected 1 to 65535")
    return port


def _positive(text: str) -> int:
    number = int(text.replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number
