"""The extension in stand-ins of the five hosts, with a small UPLiFT where the published one is looked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hosts.webui.flavours import FLAVOURS, Flavour
from hosts.webui.standin import Standin
from rule_weights import golden_config, model_shapes, rule_state
from uplift_core.checkpoints import save


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that reads as a model for SD 1.5 latents."""
    config = replace(golden_config("small-vae_8x_batch2"), latent_space="sd15")
    path = tmp_path_factory.mktemp("model") / "uplift_sd1.5vae.safetensors"
    save(rule_state(model_shapes(config)), path, config=config)
    return path


@pytest.fixture
def make_host(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Standin]]:
    constants = pytest.importorskip("huggingface_hub.constants")  # which reads the environment only once
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("UPLIFT_MODELS", raising=False)
    path = list(sys.path)

    def make(flavour: Flavour, with_model: bool = True) -> Standin:
        folder = tmp_path / "models" / "UPLiFT"
        folder.mkdir(parents=True, exist_ok=True)
        if with_model:
            (folder / small_model.name).symlink_to(small_model)
        return Standin(flavour, tmp_path, monkeypatch)

    yield make
    sys.path[:] = path
    models: Any = sys.modules.get("uplift_webui.models")
    if models is not None:
        models.forget()


@pytest.fixture(params=FLAVOURS, ids=[flavour.name for flavour in FLAVOURS])
def host(request: pytest.FixtureRequest, make_host: Callable[..., Standin]) -> Standin:
    """Each of the five."""
    return make_host(request.param)


@pytest.fixture
def forge(make_host: Callable[..., Standin]) -> Standin:
    return make_host(FLAVOURS[3])


@pytest.fixture
def a1111(make_host: Callable[..., Standin]) -> Standin:
    return make_host(FLAVOURS[0])
