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


@pytest.fixture(scope="session")
def dense_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with what DINOv2 features need: an untrained backbone and an untrained UPLiFT."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    import torch
    from safetensors.torch import save_file

    from rule_weights import published_shapes, rule_state

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0)
    save_file({k: v.contiguous() for k, v in vit.state_dict().items()},
              folder / "vit_small_patch14_dinov2.lvd142m.safetensors")
    save_file(rule_state(published_shapes("dinov2-s14")), folder / "uplift_dinov2-s14.safetensors")
    return folder


@pytest.fixture(scope="session")
def dense_demo(tmp_path_factory: pytest.TempPathFactory, dense_models: Path):
    host = DemoHost(tmp_path_factory.mktemp("dense"), "--offline", environment={"UPLIFT_MODELS": str(dense_models)})
    yield host
    host.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    photo().save(path)
    return path
