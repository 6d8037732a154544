"""``uplift bench``: every form measured in a process of its own, beside another program, as a table, JSON and plot."""

import copy
import json
import os
import sys

import pytest
import torch
from PIL import Image

from golden_cases import golden
from quick_python import python
from uplift_core.benchmark import FORMS, measure
from uplift_core.checkpoints import save
from uplift_core.cli import main
from uplift_core.forms import FAST

OTHER = """import json, sys
print("words before")
print(json.dumps({"seconds": 0.5, "peak": int(sys.argv[1]) << 20, "base": 1 << 20, "more": sys.argv[2]}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.safetensors"
    case = golden("small-vae_attender9").model
    save(case, path, config=case.config)
    return path


def bench(model, *words):
    return python("-m", "uplift_core.cli", "bench", "--model", model, "--device", "cpu", "--threads", 1, *words,
                  env={**os.environ, "COLUMNS": "200"})


def test_forms_sizes_and_another_program(model, tmp_path):
    (tmp_path / "other.py").write_text(OTHER)
    done = bench(model, "--sizes", "64,96", "--scale", 4, "--forms", "fast", "--rounds", 2, "-o",
                 tmp_path / "out", "--against", f"other={sys.executable} {tmp_path / 'other.py'} {{image}} {{steps}}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    rows = {(row["form"], row["image"]): row for row in report["rows"]}
    assert set(rows) == {(form, side) for form in ("other", "fast") for side in (64, 96)}
    for (form, side), row in rows.items():
        assert (row["tokens"], row["steps"]) == ((side // 8) ** 2, 2)
        assert len(row["all_seconds"]) == 2 and min(row["all_seconds"]) <= row["seconds"] <= max(row["all_seconds"])
        assert row["seconds"] > 0 and row["peak"] >= row["base"] > 0
        assert (row["estimate"] > 0) == (form == "fast")
        assert form in done.stdout
    assert rows["other", 96]["peak"] == 96 << 20 and rows["other", 64]["seconds"] == 0.5
    assert report["machine"]["torch"] and report["machine"]["cores"] >= 1
    with Image.open(tmp_path / "out" / "bench.png") as plot:
        assert plot.width > 500


def test_a_device_that_is_not_there_is_one_sentence(model):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = bench(model, "--sizes", "64", "--device", "cuda")
    assert done.returncode == 1 and done.stderr.startswith("error: cuda was asked for but")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "compiled"])
def test_every_form_runs_alone_and_in_tiles(model, form):
    before = copy.copy(FAST)
    for options in ({}, {"tile": 40}, {"tile": "auto", "memory": "200MB"}):
        row = measure(str(model), form, 64, 1, device="cpu", **options)
        assert (row.form, row.tokens) == (form, 64) and row.seconds > 0
    assert before == FAST  # what was switched off for the measurement is on again


@pytest.mark.parametrize(("words", "says"), [
    (("--forms", "quick"), "unknown form quick"), (("--sizes", "large"), "--sizes"), (("--scale", "3"), "--scale is 3"),
    (("--scale", "1"), "--scale is 1"), (("--sizes", "4"), "smaller than the model's patch"),
    (("--against", "nothing"), "NAME=COMMAND"), (("--memory", "lots"), "memory is"),
    (("--sizes", "64", "--forms", "fast", "--against", f"bad={sys.executable} -c 1/0"), "measuring bad at 64 failed")])
def test_what_cannot_be_measured_is_one_line(model, words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["uplift", "bench", "--model", str(model), "--device", "cpu", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert says in capsys.readouterr().err.replace("\n", " ")
