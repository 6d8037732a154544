"""The Models tab through its API: what is listed, what is fetched, what is taken in and what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from demo_host import DemoHost, photo
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors.torch import save, save_file

from hub_standin import HubStandIn
from rule_weights import published_shapes, rule_state
from uplift_core import checkpoints, load
from uplift_core.assets import asset
from uplift_core.registry import KNOWN


@pytest.fixture(scope="module")
def client(demo):
    return demo.client()


def listed(client):
    return {(e["name"], e["kind"].split()[0]): e for e in client.predict(api_name="/models")}


def test_the_list_says_what_is_there(client):
    found = listed(client)
    mini = found["uplift-mini", "UPLiFT"]
    assert mini["here"] and mini["licence"] == "MIT" and mini["latent_space"] == "tiny"
    assert mini["size_bytes"] == asset("uplift-mini.safetensors").stat().st_size
    assert found["tiny", "VAE"]["here"]
    for name in ("sd15-vae", "dinov2-s14", "dinov3-splus16"):
        assert not found[name, "UPLiFT"]["here"] and "UPLiFT-upsampler/" in found[name, "UPLiFT"]["source"]
    assert not found["sd15", "VAE"]["here"] and "OpenRAIL" in found["sd15", "VAE"]["licence"]
    assert found["dinov2-s14", "backbone"]["licence"] == "Apache 2.0"


@pytest.fixture
def own(tmp_path):
    return checkpoints.save(load("uplift-mini", device="cpu"), tmp_path / "my own.safetensors")


@pytest.mark.parametrize("by", ["upload", "path"])
def test_a_file_of_ones_own_can_be_used(client, own, picture, by):
    renamed = own.rename(own.with_name(f"by-{by}.safetensors"))
    given = {"file": handle_file(renamed)} if by == "upload" else {"file": None, "path": str(renamed)}
    assert "UPLiFT model for tiny" in client.predict(**given, api_name="/add_model")
    assert listed(client)[renamed.name, "UPLiFT"]["latent_space"] == "tiny"
    mine, _, facts = client.predict(handle_file(picture), model=renamed.name, consistency="on", api_name="/upscale")
    theirs, _, _ = client.predict(handle_file(picture), model="uplift-mini", consistency="on", api_name="/upscale")
    assert facts["model"] == renamed.name
    assert np.array_equal(np.asarray(Image.open(mine)), np.asarray(Image.open(theirs)))


def test_a_vae_is_taken_in(client):
    said = client.predict(handle_file(asset("tiny-vae.safetensors")), api_name="/add_model")
    assert "a VAE of tiny" in said and ("tiny-vae.safetensors", "VAE") in listed(client)


def test_wrong_files_are_refused_with_the_reason(client, demo, own, tmp_path):
    before = listed(client)
    text, cut, foreign, image = (tmp_path / n for n in ("text.safetensors", "cut.safetensors", "foreign.safetensors",
                                                        "image.pth"))
    text.write_text("only words")
    cut.write_bytes(own.read_bytes()[:5000])
    save_file({"layer.weight": torch.zeros(3, 3)}, foreign)
    photo().save(image, "PNG")
    for path in (text, cut, foreign, image):
        with pytest.raises(AppError) as error:
            client.predict(handle_file(path), api_name="/add_model")
        said = str(error.value)
        assert "was not taken in" in said and path.name in said and str(demo.temp) not in said, said
        assert len(said) > 80
    with pytest.raises(AppError, match="does not exist"):
        client.predict(None, path=str(tmp_path / "nothing.pth"), api_name="/add_model")
    with pytest.raises(AppError, match="ame a file first"):
        client.predict(None, api_name="/add_model")
    assert listed(client) == before


def test_paths_cannot_be_named_from_elsewhere(tmp_path, own):
    host = DemoHost(tmp_path / "open", "--listen", "0.0.0.0")
    try:
        for path in (own, Path("/etc/passwd"), Path("/no/such/file")):
            with pytest.raises(AppError, match="paths can only be named on the machine itself|Paths can only"):
                host.client().predict(None, path=str(path), api_name="/add_model")
        assert "UPLiFT model" in host.client().predict(handle_file(own), api_name="/add_model")
    finally:
        host.close()


def test_weights_are_downloaded_once_and_seen(tmp_path):
    known = KNOWN["dinov2-s14"]
    backbone = "timm/vit_small_patch14_dinov2.lvd142m/model.safetensors"
    files = {f"{known.repo}/{known.filename}": save(rule_state(published_shapes("dinov2-s14"))),
             backbone: save({"cls_token": torch.zeros(1, 1, 384)})}
    with HubStandIn.serving(files) as hub:
        host = DemoHost(tmp_path, environment={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"})
        try:
            client = host.client()
            assert not listed(client)["dinov2-s14", "UPLiFT"]["here"]
            hub.mode = "gated"
            with pytest.raises(AppError, match="gated"):
                client.predict("dinov2", api_name="/download")
            hub.mode = "ok"
            assert "on this machine" in client.predict("dinov2", api_name="/download")
            assert listed(client)["dinov2-s14", "UPLiFT"]["here"] and listed(client)["dinov2-s14", "backbone"]["here"]
            bodies = hub.bodies
            client.predict("dinov2", api_name="/download")
            assert hub.bodies == bodies
        finally:
            host.close()


def test_offline_means_offline(tmp_path):
    with HubStandIn.serving({}) as hub:
        host = DemoHost(tmp_path, "--offline", environment={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"})
        try:
            with pytest.raises(AppError, match="--offline"):
                host.client().predict("pictures", api_name="/download")
            assert not hub.requests
        finally:
            host.close()
