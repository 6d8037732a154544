"""Python programs in processes of their own that need not import torch first: forks of one that has.

What they print, how they end and what their environment says is as with ``subprocess.run``; libraries that read the
environment while they are imported (huggingface_hub and what stands on it, this project) are imported in the fork.
Memory and the time to begin are not those of a fresh process: what measures them starts one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIBRARIES = ["torch", "torch._dynamo", "torch.distributed.tensor", "torchvision", "scipy.stats", "PIL.Image"]


def python(*words: object, cwd: Path | None = None, env: dict[str, str] | None = None,
           timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """``python WORDS`` (a program after -c or a module after -m, and their arguments); its output as text."""
    command = [sys.executable, *map(str, words)]
    if not sys.platform.startswith("linux"):  # elsewhere a fork may not survive its libraries
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout, check=False)
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as folder:
        said = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_become, args=(command[1:], str(cwd or os.getcwd()),
                                                        dict(os.environ if env is None else env), said))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        texts = [Path(path).read_text(errors="replace") for path in said]
        return subprocess.CompletedProcess(command, process.exitcode, *texts)


def _become(words: list[str], cwd: str, environment: dict[str, str], said: list[str]) -> None:
    """The fork, from here on: another environment and folder, other streams, and the program."""
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = [cwd, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    kind, program, *rest = words
    sys.argv = [kind, *rest]
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # which a fork leaves out
