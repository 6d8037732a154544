"""``uplift features``, run as a user runs it, with random weights."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("timm", reason="timm is not installed")
ROOT = Path(__file__).resolve().parent.parent


def run(folder, *words, **more):
    command = [sys.executable, "-m", "uplift_core.cli", "features", *map(str, words), "--backbone",
               "vit_tiny_patch16_224"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **more}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


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
    assert run(tmp_path, *words, "--overwrite").returncode == 0


@pytest.mark.slow
def test_errors_are_one_line_and_leave_nothing(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    for words, text in ((("a.png",), "nothing to make"), (("a.png", "--similar", "x"), "point"),
                        (("a.png", "--pca", "a.png", "--overwrite"), "same file"),
                        (("a.png", "--pca", "p.png", "--offline"), "model.safetensors")):
        done = run(tmp_path, *words, HF_HUB_OFFLINE="1", XDG_DATA_HOME=str(tmp_path / "data"))
        assert done.returncode == 1 and text in done.stderr and "Traceback" not in done.stderr
    done = run(tmp_path, "a.png", "--random-weights", "--similar", "99,1")
    assert done.returncode == 1 and "outside" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
