"""The demo for the tests: started for real as a program of its own, on a free port, with a home of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from gradio_client import Client
from PIL import Image

ROOT = Path(__file__).parents[3]


def photo(width: int = 44, height: int = 36, seed: int = 0) -> Image.Image:
    """Smooth colours with an edge: something a model can enlarge."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0.05, 0.5, (3, 3))]
    values = np.stack(waves, -1) * 80 + 128
    values[(x > width / 2) & (y > height / 3)] *= 0.4
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


class DemoHost:
    """A running page. ``home``: where it finds caches and model folders, empty at first; ``temp``: what it may fill."""

    def __init__(self, home: Path, *flags: str, environment: dict[str, str] | None = None, wait: float = 60):
        self.home, self.temp = home, home / "temp"
        self.temp.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = home / f"log-{self.port}.txt"
        environ = {**os.environ, "HOME": str(home), "XDG_DATA_HOME": str(home / "data"), "HF_HOME": str(home / "hf"),
                   "TMPDIR": str(self.temp), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
        for name in ("HF_HUB_CACHE", "UPLIFT_MODELS", "GRADIO_TEMP_DIR"):
            if name not in (environment or {}):
                environ.pop(name, None)
        begun = time.monotonic()
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, str(ROOT / "demo.py"), "--port", str(self.port), *flags],
                                            cwd=home, stdout=log, stderr=subprocess.STDOUT, env=environ,
                                            start_new_session=True)
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the demo ended at start:\n{self.log()}")
            try:
                self.get("/")
                break
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() - begun > wait:
                    self.close()
                    raise RuntimeError(f"the demo did not start:\n{self.log()}") from None
                time.sleep(0.05)
        self.seconds = time.monotonic() - begun

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return bytes(answer.read())

    def client(self, **options: Any) -> Client:
        # On busy cores the page may be silent for long; a client that gives up is taken for a closed tab.
        options.setdefault("httpx_kwargs", {"timeout": 240})
        return Client(self.url, verbose=False, download_files=self.home / "downloads", **options)

    def close(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        return self.process.returncode
