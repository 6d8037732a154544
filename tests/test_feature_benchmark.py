"""``uplift bench features``: every method in a process of its own, as a table, JSON and plot."""

import json
import os
import sys

import pytest
import torch
from PIL import Image

from quick_python import python
from uplift_core.cli import main
from uplift_core.feature_benchmark import METHODS, available, measure


def bench(*words, **environment):
    return python("-m", "uplift_core.cli", "bench", "features", "--device", "cpu", "--threads", 1, *words,
                  env={**os.environ, "COLUMNS": "200", **environment})


def test_methods_and_sizes(tmp_path):
    folder = tmp_path / "hub" / "wimmerth_anyup_main"
    folder.mkdir(parents=True)
    (folder / "hubconf.py").write_text(
        "import torch\nclass Up(torch.nn.Module):\n    def forward(self, image, low, size):\n"
        "        return torch.nn.functional.interpolate(low, size=size)\ndef anyup(pretrained):\n"
        "    assert not pretrained\n    return Up()\n")
    done = bench("--sizes", "32,64", "--methods", "uplift,anyup", "--channels", 16, "--rounds", 1, "--use",
                 "--memory", "100MB", "-o", tmp_path / "out", TORCH_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = {(row["form"], row["image"]): row for row in json.loads((tmp_path / "out/bench.json").read_text())["rows"]}
    assert set(rows) == {(method, side) for method in ("uplift", "anyup") for side in (32, 64)}
    for (_, side), row in rows.items():
        assert (row["tokens"], row["steps"], len(row["all_seconds"])) == ((side // 16) ** 2, 4, 1)
        assert row["seconds"] > 0 and row["use_seconds"] > 0 and row["peak"] >= row["base"] > 0 < row["use_peak"]
    assert "anyup: seconds grow with tokens to the power of" in done.stdout
    with Image.open(tmp_path / "out" / "bench.png") as plot:
        assert plot.width > 500


@pytest.mark.slow
def test_memory_is_that_of_the_windows(tmp_path):
    """Features of 201 MB in the file, 400 MB in memory, and 1.5 GB of work for all at once."""
    done = bench("--sizes", "512", "--methods", "uplift", "--memory", "300MB", "--stored", "-o", tmp_path,
                 TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6)  # caches more of its convolutions
    assert row["peak"] - row["base"] < (400 if old else 350) << 20


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("method", ["uplift", "nearest", "bilinear", "jbu"])
def test_own_methods_in_memory_and_to_a_file(method, stored):
    row = measure(method, 64, channels=8, threads=0, device="cpu", stored=stored, use=True)
    assert (row.form, row.tokens) == (method, 16) and row.use_seconds > 0


def test_only_what_is_here_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert available() == ["uplift", "nearest", "bilinear", "jbu"]
    (tmp_path / "andrehuang_loftup_main").mkdir()
    assert set(available()) == {"uplift", "nearest", "bilinear", "jbu", "loftup"} < set(METHODS)


@pytest.mark.parametrize(("words", "says"), [
    (("--methods", "magic"), "unknown method magic"), (("--sizes", "8"), "smaller than a patch of 16"),
    (("--methods", "featup"), "featup is not on this machine"), (("--sizes", "big"), "--sizes")])
def test_what_cannot_be_measured_is_one_line(words, says, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["uplift", "bench", "features", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert says in capsys.readouterr().err.replace("\n", " ")
