"""The command, as a person runs it: files in, files out, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from skimage import data

from command_line import here
from golden_cases import golden
from quick_python import python
from uplift_core import load, load_vae, upscale_image
from uplift_core.checkpoints import save
from uplift_core.imageio import read_picture, read_settings


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small model and a small random VAE on disk."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=8,
                  scaling_factor=0.18215).save_pretrained(folder / "vae")
    model = golden("small-vae_8x_batch2").model
    save(model, folder / "model.safetensors", config=model.config)
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(data.astronaut()[:41, :60]).save(folder / "a.png")
    glass = Image.fromarray(data.coffee()[:24, :24])
    glass.putalpha(120)
    glass.save(folder / "sub" / "b.webp")
    (folder / "broken.png").touch()
    return folder


def options(home, *words):
    return ["upscale", *map(str, words), "--model", str(home / "model.safetensors"), "--vae", str(home / "vae"),
            "--offline", "--device", "cpu"]


def command(home, *words):
    return ["-c", "from uplift_core.cli import main; main()", *options(home, *words)]


def test_a_folder_with_a_broken_file(home, photos, tmp_path):
    done = python(*command(home, photos, "-o", tmp_path / "out", "--seed", 3), env={**os.environ, "COLUMNS": "300"})
    assert done.returncode == 1
    assert "broken.png" in done.stdout
    assert "empty (0 bytes)" in done.stdout
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert written == ["a.png", os.path.join("sub", "b.webp")]
    assert Image.open(tmp_path / "out" / "sub" / "b.webp").mode == "RGBA"
    settings = read_settings(tmp_path / "out" / "a.png")
    assert settings is not None
    assert (settings["seed"], settings["scale"]) == (3, 2)
    model, vae = load(home / "model.safetensors", device="cpu"), load_vae(home / "vae")
    expected = upscale_image(model, vae, read_picture(photos / "a.png").rgb, scale=2, seed=3)
    got = read_picture(tmp_path / "out" / "a.png").rgb
    assert (got - expected).abs().max() < 1.01 / 255  # the same numbers as the library's


def test_what_cannot_be_read_does_not_stop_the_others(home, photos, tmp_path, monkeypatch, capfd):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    code, said, _ = here(monkeypatch, capfd, *options(home, tmp_path / "empty", tmp_path / "missing.png",
                                                      photos / "a.png", "-o", out))
    assert code == 1 and "no pictures in this folder" in said and "no such file" in said
    assert [p.name for p in out.iterdir()] == ["a.png"]


def test_existing_files_are_kept(home, photos, tmp_path, monkeypatch, capfd):
    target = tmp_path / "kept.png"
    target.write_bytes(b"mine")
    words = options(home, photos / "a.png", "-o", target)
    code, said, _ = here(monkeypatch, capfd, *words)
    assert code == 1 and "--overwrite" in said
    assert target.read_bytes() == b"mine"
    assert here(monkeypatch, capfd, *words, "--overwrite")[0] == 0
    assert Image.open(target).size == (120, 82)


def test_wrong_options_are_one_line(home, photos, monkeypatch, capfd):
    for words, says in ((("--scale", 9), "scale is 9"), (("--color-fix", "sepia"), "color_fix"),
                        (("--memory", "lots"), "memory is"), (("--tile", "big"), "tile is")):
        code, _, said = here(monkeypatch, capfd, *options(home, photos / "a.png", *words))
        assert code == 1 and says in said and said.count("\n") == 1


def test_interrupted_leaves_finished_files_whole(home, photos, tmp_path):
    Image.fromarray(data.astronaut()[:16, :16]).save(photos / "_first.png")
    big = Image.fromarray(data.astronaut()).resize((1500, 1500))
    big.save(photos / "z.png")
    out = tmp_path / "out"
    words = command(home, photos / "_first.png", photos / "z.png", "-o", out)
    going = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240  # on busy cores the program may take long to begin, and to look up
    while not (out / "_first.png").exists() and going.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    assert going.poll() is None, going.communicate()  # at work on the large picture, which takes minutes
    assert (out / "_first.png").exists()
    going.send_signal(signal.SIGINT)
    try:
        said = going.communicate(timeout=240)
    finally:
        going.kill()
    assert going.returncode == 130, said
    Image.open(out / "_first.png").load()
    assert [p.name for p in out.iterdir()] == ["_first.png"]
    assert json.dumps(read_settings(out / "_first.png"))


def test_info_of_a_known_model_that_is_not_here_says_what_to_do(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    code, _, said = here(monkeypatch, capfd, "models", "info", "dinov2-s14")
    assert code == 1 and "dinov2-s14 is not on this machine yet: uplift models download dinov2-s14" in said


def test_models(home, monkeypatch, capfd):
    code, said, _ = here(monkeypatch, capfd, "models", "info", home / "model.safetensors", "--json")
    assert code == 0 and json.loads(said)["parameters"] == 72021


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """A machine with no weights and no hub: an address that nobody listens at, which must not be asked."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("uplift_core.hub.cached", lambda *given: None)

    def asked(*given, **more):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", asked)


@pytest.mark.parametrize("words, says", [
    (("--model", "uplift-mini", "--vae", "sd15"), "Load the bundled VAE 'tiny'"),
    (("--model", "uplift-mini", "--vae", "taesdxl"), "'sdxl' (SDXL) latents"),
    (("--model", "sd15-vae", "--vae", "tiny"), "Load the VAE of Stable Diffusion 1.x or 2.x"),
    (("--vae", "sd15"), "The model was not named, and the SD1.5 weights are not on this machine: using the small "
                        "bundled model 'uplift-mini' ('uplift models download sd15-vae' gets the full one)"),
    (("--model", "dinov2-s14"), "use 'uplift features'"),
    (("--model", "dinov2-s14", "--vae", "sd15"), "is no latent space of a VAE"),
])
@pytest.mark.parametrize("command", [("upscale", "a.png"), ("eval", "sr")])
def test_a_pair_that_does_not_fit_by_name_is_refused_before_anything_is_looked_for(
        photos, no_network, monkeypatch, capfd, command, words, says):
    monkeypatch.chdir(photos)
    code, _, said = here(monkeypatch, capfd, *command, *words, "--device", "cpu")
    assert code == 1 and says in said and [p.name for p in photos.iterdir() if p.name.startswith("a_")] == []


def test_a_vae_file_that_does_not_fit_the_default_is_refused_once(home, photos, no_network, monkeypatch, capfd):
    code, _, said = here(monkeypatch, capfd, "upscale", photos / "a.png", photos / "sub" / "b.webp", "--vae",
                         home / "vae", "--device", "cpu", "-o", photos / "out")
    assert code == 1 and said.count("uplift models download sd15-vae") == 2  # the note, and the error
    assert "'sd15' (Stable Diffusion 1.x and 2.x) latents" in said and not (photos / "out").exists()


def test_offline_asks_for_no_vae(home, photos, no_network, monkeypatch, capfd):
    code, _, said = here(monkeypatch, capfd, "upscale", photos / "a.png", "--model", home / "model.safetensors",
                         "--vae", "someone/vae", "--offline", "--device", "cpu")
    assert code == 1 and "someone/vae is not on this machine" in said and "offline mode was asked for" in said


def test_pictures_of_one_name_are_all_enlarged_or_fail_alone(home, tmp_path, monkeypatch, capfd):
    """A TIFF beside a PNG becomes NAME_tif.png; a second folder's picture of the same name has no place."""
    picture = Image.fromarray(data.coffee()[:16, :16])
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        picture.save(tmp_path / folder / "p.png")
    for name in ("p.bmp", "p.gif", "q.bmp"):
        picture.convert("RGB").save(tmp_path / "one" / name)
    out = tmp_path / "out"
    code, said, _ = here(monkeypatch, capfd, *options(home, tmp_path / "one", tmp_path / "two", "-o", out))
    assert code == 1 and sorted(p.name for p in out.iterdir()) == ["p.png", "p_bmp.png", "p_gif.png", "q.png"]
    assert said.count("failed") == 1 and f"is written to {out / 'p.png'} already; run this one with another -o" in said


def test_a_folder_enlarged_again_leaves_its_results_alone(home, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("p.png", "lonely_2x.png"):
        Image.fromarray(data.coffee()[:16, :16]).save(folder / name)
    names = ["lonely_2x.png", "lonely_2x_2x.png", "p.png", "p_2x.png"]
    for words, code in (((), 0), (("--overwrite",), 0), ((), 1)):
        assert here(monkeypatch, capfd, *options(home, folder, *words))[0] == code
        assert sorted(p.name for p in folder.iterdir()) == names
    _, _, said = here(monkeypatch, capfd, *options(home, folder, "--overwrite"))
    assert "left out 2 results of an earlier run" in said
    assert here(monkeypatch, capfd, *options(home, folder / "p_2x.png"))[0] == 0
    assert (folder / "p_2x_2x.png").is_file()


def test_paths_are_whole_in_a_narrow_window(home, photos, monkeypatch, capfd):
    out = photos / ("a folder with a rather long name " * 3).strip()
    monkeypatch.setattr("command_line.COLUMNS", "80")
    code, said, _ = here(monkeypatch, capfd, *options(home, photos / "a.png", "-o", out, "--threads", 1))
    assert code == 0 and "".join(str(out / "a.png").split()) in "".join(said.split())


def test_pinned_pixels_are_told_for_a_model_of_ones_own(home, photos, tmp_path, monkeypatch, capfd):
    mini = load("uplift-mini", device="cpu")
    save(mini, tmp_path / "own.safetensors", config=mini.config)
    for words, told in ((("--model", tmp_path / "own.safetensors"), True), (("--model", "uplift-mini"), False),
                        (("--model", tmp_path / "own.safetensors", "--no-consistency"), False)):
        _, _, said = here(monkeypatch, capfd, "upscale", photos / "a.png", "-o", tmp_path / "out", "--overwrite",
                          "--device", "cpu", *words)
        assert ("pinned to the pixels given" in said) == told
