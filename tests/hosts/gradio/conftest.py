"""One running demo for all tests here, and pictures to give it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
from demo_host import DemoHost  # noqa: E402
from PIL import Image  # noqa: E402


def photo(width: int = 44, height: int = 36, seed: int = 0) -> Image.Image:
    """Smooth colours with an edge: something a model can enlarge."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0.05, 0.5, (3, 3))]
    values = np.stack(waves, -1) * 80 + 128
    values[(x > width / 2) & (y > height / 3)] *= 0.4
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


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
