"""From the command line to a running page, and the temporary folder gone when it ends."""

from __future__ import annotations

import inspect
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .core import ready
from .settings import Settings, parse


def main(arguments: Sequence[str] | None = None) -> None:
    temp = Path(tempfile.mkdtemp(prefix="uplift-demo-")).resolve()
    try:
        settings = parse(arguments, temp)
        _check(settings)
        _environment(settings)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        try:
            with _no_stubs():
                import gradio  # noqa: F401
        except ImportError:
            sys.exit("The demo needs the package 'gradio': pip install 'uplift-upscale[demo]'")
        from .app import build, launch

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that what follows runs then too
        try:
            launch(build(settings), settings)
        except OSError as error:  # the port is taken, the address is not ours
            sys.exit(f"The page could not be opened: {error}")
        threading.Thread(target=ready, daemon=True).start()  # while the person looks at the page
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nGood-bye.", file=sys.stderr)  # noqa: T201
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _check(settings: Settings) -> None:
    """End now, in words, for what could only fail at the first click. The rest is checked where it is used."""
    for flag, text in (("--model", settings.model), ("--vae", settings.vae), ("--checkpoint", settings.checkpoint)):
        if Path(text).suffix in (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin") and not Path(
                text).expanduser().exists():
            sys.exit(f"{flag} {text}: there is no such file")
    if not re.fullmatch(r"auto|cpu|(cuda|xpu)(:\d+)?|mps(:0)?", settings.device):
        sys.exit(f"--device {settings.device}: expected auto, cpu, cuda, cuda:1, xpu or mps")


def _environment(settings: Settings) -> None:
    """What Gradio and the hub read when they are imported."""
    os.environ["GRADIO_TEMP_DIR"] = str(settings.temp / "gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("MPLCONFIGDIR", str(settings.temp / "matplotlib"))  # Gradio imports it
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if settings.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    tempfile.tempdir = str(settings.temp)  # uploads are spooled there


@contextmanager
def _no_stubs() -> Iterator[None]:
    """Keep Gradio from renewing the type stubs of its components in its own folder each time it is imported.

    That writes where this program should not and takes a third of the start. Gradio leaves a class alone when
    inspect cannot tell its file.
    """
    getfile = inspect.getfile

    def quiet(thing: Any) -> str:
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError("no stub wanted")
        return getfile(thing)

    inspect.getfile = quiet  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = getfile

