"""``uplift features``, run as a user runs it, with random weights."""

import io
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from command_line import here
from hub_standin import HubStandIn
from quick_python import python
from rule_weights import published_shapes, rule_state
from uplift_core import load_features
from uplift_core.features import feature_mask, pca_pictures, segment_picture, segments, similarity

timm = pytest.importorskip("timm", reason="timm is not installed")
ROOT = Path(__file__).resolve().parent.parent


WEIGHTS = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def run(folder, *words, **more):
    return program(folder, "-m", "uplift_core.cli", "features", *words, "--backbone", "vit_tiny_patch16_224", **more)


def program(folder, *words, **more):
    return python(*words, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **more})


@pytest.mark.slow
def test_everything_of_two_pictures(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[::-1]).save(tmp_path / "b.png")
    words = ("a.png", "b.png", "--random-weights", "--save", "f.npy", "--pca", "p.png", "--similar", "10,10",
             "--segments", "3")
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "a_f.npy").shape == (192, 40, 50)
    for name in ("a_p", "b_p", "a_mask", "b_mask", "a_segments", "b_segments"):
        assert Image.open(tmp_path / f"{name}.png").size == (50, 40)
    again = run(tmp_path, *words)
    assert again.returncode == 1 and "--overwrite" in again.stderr
    words = (*words[:3], "--save", "f.safetensors", *words[5:], "--overwrite", "--unlike", "40,30",
             "--resolution", "25", "--threshold", "0.3", "--seed", "4", "--mask", "M.png", "--segments-out", "S.png")
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    maps = [load_features(tmp_path / f"{name}_f.safetensors") for name in "ab"]
    for name, found, colours in zip("ab", maps, pca_pictures(maps)):
        assert found.image_size == (20, 25) and found.data.dtype == np.float16
        near = similarity(found, [(5, 5)], [(20, 15)])  # the picture's points, in pixels of the file, at half the size
        for made, expected in ((f"{name}_M", feature_mask(near, (40, 50), threshold=0.3)), (f"{name}_p", colours), (
                f"{name}_S", segment_picture(segments(found, 3, seed=4, clean=1), (40, 50)))):
            pixels = torch.from_numpy(np.array(Image.open(tmp_path / f"{made}.png"))).float()
            expected = expected if expected.ndim == 2 else expected.movedim(0, -1)
            assert (pixels - expected * 255).abs().max() <= 1, made


@pytest.mark.slow
def test_every_kind_of_file_and_odd_sizes(tmp_path):
    """One picture as RGB, gray, 16 bits, palette and with alpha has the same features; the smallest and the longest
    sides are whole."""
    levels = np.random.RandomState(1).randint(0, 256, (33, 47), np.uint8)
    gray = Image.fromarray(levels)
    same = {"rgb": gray.convert("RGB"), "gray": gray, "deep": Image.fromarray(levels.astype(np.uint16) * 257),
            "palette": gray.convert("P"), "alpha": Image.merge("RGBA", [gray] * 3 + [Image.new("L", gray.size, 200)])}
    odd = {"small": Image.new("L", (15, 15), 90), "long": Image.new("RGB", (3000, 40), "teal")}
    for name, image in {**same, **odd}.items():
        image.save(tmp_path / f"{name}.png")
    kept = [Image.open(tmp_path / f"{name}.png").mode for name in same]
    assert kept[0] == "RGB" and kept[1] == "L" and kept[2].startswith("I") and kept[3:] == ["P", "RGBA"]
    done = run(tmp_path, ".", "--random-weights", "--model", "jbu", "--scale", "4", "--save", "f.npy", "--pca", "p.png",
               "--similar", "7,7", "--segments", "2")
    assert done.returncode == 0, done.stderr
    features = {name: np.load(tmp_path / f"{name}_f.npy").astype(np.float32) for name in {**same, **odd}}
    assert {name: found.shape[1:] for name, found in features.items()} == {
        **{name: (9, 12) for name in same}, "small": (4, 4), "long": (10, 750)}
    for name in same:
        assert np.abs(features[name] - features["rgb"]).max() < 1e-2, name
    for name, image in odd.items():
        assert np.isfinite(features[name]).all()
        assert Image.open(tmp_path / f"{name}_p.png").size == (features[name].shape[2], features[name].shape[1])
        for made in ("mask", "segments"):
            assert Image.open(tmp_path / f"{name}_{made}.png").size == image.size


def test_errors_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    for words, text in ((("a.png",), "nothing to make"), (("a.png", "--similar", "x"), "point"),
                        (("a.png", "--pca", "a.png", "--overwrite"), "same file"),
                        (("a.png", "--pca", "p.png", "--offline"), "model.safetensors")):
        code, _, said = here(monkeypatch, capfd, "features", *words, "--backbone", "vit_tiny_patch16_224")
        assert code == 1 and text in said and said.count("\n") == 1
    code, out, _ = here(monkeypatch, capfd, "features", "a.png", "--backbone", "vit_tiny_patch16_224",
                        "--random-weights", "--similar", "99,1")
    assert code == 1 and "outside" in out
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """The environment of a machine without weights, whose hub is a port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "UPLIFT_MODELS"):
        monkeypatch.delenv(name, raising=False)
    return {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1",
            "XDG_DATA_HOME": str(tmp_path / "data")}


@pytest.mark.slow
def test_a_hub_out_of_reach_is_one_line_with_file_address_and_folder(tmp_path, alone):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    done = run(tmp_path, "a.png", "--pca", "p.png", **alone)
    address = f"{alone['HF_ENDPOINT']}/{WEIGHTS}/resolve/main/model.safetensors"
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
    for part in ("error:", "cannot be reached", address, f"{tmp_path}/data/uplift/models as vit_tiny_patch16_224.saf"):
        assert part in done.stderr
    assert not (tmp_path / "p.png").exists()


@pytest.mark.slow
def test_a_hub_out_of_reach_from_python_is_quiet_and_names_the_hosts_folder(tmp_path, alone):
    done = program(tmp_path, "-c", "from uplift_core.backbones import load_backbone\n"
                   "from uplift_core.errors import DownloadError\n"
                   "try:\n    load_backbone('dinov2-s14', folders=['host'])\n"
                   "except DownloadError as error:\n    print(error)", **alone)
    assert done.returncode == 0 and not done.stderr
    for part in ("vit_small_patch14_dinov2.lvd142m/resolve/main/model.safetensors", alone["HF_ENDPOINT"],
                 "put it into host as vit_small_patch14_dinov2.lvd142m.safetensors"):
        assert part in done.stdout


@pytest.mark.slow
def test_weights_come_from_the_hub_and_stay_in_its_cache(tmp_path, alone):
    """Here as older repositories have them, not as .safetensors."""
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    buffer = io.BytesIO()
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), buffer)
    with HubStandIn.serving({f"{WEIGHTS}/pytorch_model.bin": buffer.getvalue()}) as server:
        done = run(tmp_path, "a.png", "--scale", "1", "--save", "f.npy", **{**alone, "HF_ENDPOINT": server.url})
    assert done.returncode == 0 and not done.stderr.strip() and np.load(tmp_path / "f.npy").shape == (192, 2, 2)
    assert [p.name for p in (tmp_path / "hf").glob("hub/*/snapshots/*/*")] == ["pytorch_model.bin"]
    done = run(tmp_path, "a.png", "--scale", "1", "--save", "again.npy", **alone)  # the hub is gone
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "again.npy"), np.load(tmp_path / "f.npy"))


@pytest.mark.slow
def test_the_uplift_of_a_backbone_is_found_by_itself(tmp_path, alone):
    """Untrained files of the published names and shapes in the folder of models."""
    folder, image = tmp_path / "data/uplift/models", Image.new("RGB", (40, 31), "teal")
    folder.mkdir(parents=True)
    image.save(tmp_path / "a.png")
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    save_file(vit.state_dict(), folder / "vit_small_patch14_dinov2.lvd142m.safetensors")
    words = ("-m", "uplift_core.cli", "features", "a.png", "--backbone", "dinov2-s14", "--scale", "2", "--save")
    done = program(tmp_path, *words, "f.npy", **alone)
    assert done.returncode == 1 and "uplift_dinov2-s14.safetensors" in done.stderr and done.stderr.count("\n") == 1
    save_file(rule_state(published_shapes("dinov2-s14")), folder / "uplift_dinov2-s14.safetensors")
    done = program(tmp_path, *words, "f.npy", "--offline", **alone)
    assert done.returncode == 0, done.stderr
    found, made = np.load(tmp_path / "f.npy"), json.loads((tmp_path / "f.npy.json").read_text())
    assert found.shape == (384, 5, 6) and found.dtype == np.float16 and np.isfinite(found).all()
    assert (made["method"], made["model"]) == ("uplift", "dinov2-s14")
