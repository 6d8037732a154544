"""One running ComfyUI for all tests of the node pack, with models made on the spot."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from hosts.comfyui.comfy_host import HERE, ROOT, ComfyHost, install, random_models
from uplift_core.assets import asset

PACK = "uplift-upscale-pack"  # a name of the user's choice: nothing may depend on it


@pytest.fixture(scope="session")
def comfy_home() -> Path:
    pytest.importorskip("websocket", reason="websocket-client is not installed: pip install 'uplift-upscale[test]'")
    return install()


@pytest.fixture(scope="session")
def base(comfy_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comfyui")
    for name in ("models/vae", "models/uplift", "input", "output", "custom_nodes"):
        (folder / name).mkdir(parents=True)
    (folder / "custom_nodes" / PACK).symlink_to(ROOT)
    (folder / "custom_nodes" / "probe").symlink_to(HERE / "probe")
    shutil.copytree(random_models(comfy_home), folder / "models", dirs_exist_ok=True)
    make_models(folder / "models")
    Image.open(asset("samples/astronaut.png")).resize((64, 48)).save(folder / "input" / "small.png")
    shutil.copy(asset("samples/astronaut.png"), folder / "input" / "astronaut.png")
    return folder


def make_models(models: Path) -> None:
    """Random weights: an UPLiFT for SD1.5 latents; a small vision transformer and an UPLiFT for its features."""
    import timm
    from safetensors.torch import save_file

    from golden_cases import ruled
    from rule_weights import golden_config
    from uplift_core import PRESETS
    from uplift_core.checkpoints import save

    config = replace(golden_config("small-vae_8x_batch2"), latent_space="sd15")
    save(ruled(config), models / "uplift" / "small.safetensors")
    (models / "uplift_backbones").mkdir()
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(vit.state_dict(), str(models / "uplift_backbones" / "vit_tiny_patch16_224.safetensors"))
    config = replace(PRESETS["dinov3-splus16"], channels=vit.num_features, latent_space="")
    save(ruled(config), models / "uplift" / "vit_tiny.safetensors")


@pytest.fixture(scope="session")
def comfy(base: Path, comfy_home: Path):
    host = ComfyHost(base, comfy_home, environment={"PROBE_NEWER_PAGE": str(comfy_home / "newer_page")})
    yield host
    host.close()
