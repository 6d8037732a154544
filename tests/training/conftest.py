"""Pictures and a teacher for the tests of training."""

import pytest
import torch
from PIL import Image
from skimage import data

from training_runs import MEASURED_CROPS
from uplift_core import checkpoints
from uplift_core.training.photos import Photos
from uplift_core.training.recipe import DataPart
from uplift_core.training.tasks import CodecTask, UpliftTask
from uplift_core.vae.codec import PatchCodec
from uplift_core.vae.patchnet import BlockStatistics, PatchNet, PatchNetConfig


@pytest.fixture(autouse=True)
def few_measured_crops(monkeypatch):
    """A run begins with a look at thousands of crops, which takes longer than the few steps of these tests."""
    for task in (UpliftTask, CodecTask):
        monkeypatch.setattr(task, "measured_crops", MEASURED_CROPS)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i, name in enumerate(("astronaut", "coffee", "chelsea")):
        Image.fromarray(getattr(data, name)()[:100 + i, :140]).save(folder / ("more" if i else ".") / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def codec(photos):
    net = PatchNet(PatchNetConfig(channels=6, patch=4, width=8, blocks=1, detail=4, detail_blocks=1))
    statistics = BlockStatistics(4)
    statistics.add(torch.stack([Photos(photos, DataPart(size=64, turns=True), 0)[i]["image"] for i in range(9)]))
    statistics.install(net)
    return PatchCodec(net)


@pytest.fixture(scope="module")
def codec_file(codec, tmp_path_factory):
    path = tmp_path_factory.mktemp("codec") / "vae.safetensors"
    net = codec.module
    checkpoints.write_safetensors(net.state_dict(), path, {**net.config.to_metadata(), "latent_space": "tiny"})
    return path


@pytest.fixture
def with_broken(photos, tmp_path):
    """Three pictures, two of them again in a linked folder, and two files that are none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "good").symlink_to(photos / "more")
    for path in photos.rglob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("bad.png", "worse.jpg"):
        (folder / name).write_bytes(b"nothing")
    return folder
