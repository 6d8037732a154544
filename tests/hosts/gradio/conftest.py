"""One running demo for all tests here, and pictures to give it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
sys.path.insert(0, str(Path(__file__).parent))

from demo_host import DemoHost, photo  # noqa: E402


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="session")
def demo(home: Path):
    host = DemoHost(home, "--max-pixels", "1000000")
    yield host
    host.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    photo().save(path)
    return path
