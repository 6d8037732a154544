"""From the command line to a running page, and the temporary folder gone when it ends."""

from __future__ import annotations

import inspect
import logging
import os
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
        _wait()
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _environment(settings: Settings) -> None:
    """What Gradio and the hub read when they are imported."""
    os.environ["GRADIO_TEMP_DIR"] = str(settings.temp / "gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
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

    inspect.getfile = quiet
    try:
        yield
    finally:
        inspect.getfile = getfile


def _wait() -> Any:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nGood-bye.", file=sys.stderr)  # noqa: T201
