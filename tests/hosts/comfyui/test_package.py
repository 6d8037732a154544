"""The pack as a package: what the community's tools say of it, and that nothing of it needs ComfyUI until it is run."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from hosts.comfyui.comfy_host import ROOT, tools

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What a user clones, as it is now."""
    target = tmp_path_factory.mktemp("clone") / "anything"
    made = subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no git checkout: {made.stderr.strip()}")
    return target


def test_lint_of_comfy_test(copy):
    done = subprocess.run([str(tools() / "comfy-test"), "lint", "."], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0 and "[SYNTAX] PASSED" in done.stdout, done.stdout[-3000:]
    assert "[JAVASCRIPT] PASSED" in done.stdout


def test_registry_package(copy):
    comfy = [str(tools() / "comfy"), "--skip-prompt", "--no-enable-telemetry", "node"]
    done = subprocess.run([*comfy, "validate"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([*comfy, "pack"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = set(zipfile.ZipFile(copy / "node.zip").namelist())
    assert {"__init__.py", "nodes/__init__.py", "uplift_core/assets/uplift-mini.safetensors", "requirements.txt",
            "web/docs/UPLiFTLatentUpscale.md", "locales/zh/nodeDefs.json"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_door_opens_without_comfyui(tmp_path):
    """The root is importable as a package where there is no ComfyUI; only asking for nodes needs it."""
    code = """
import asyncio, importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", sys.argv[1] + "/__init__.py",
                                              submodule_search_locations=[sys.argv[1]])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
assert "torch" not in sys.modules
try:
    asyncio.run(pack.comfy_entrypoint())
except ModuleNotFoundError as error:
    assert error.name.startswith("comfy"), error
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-I", "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
