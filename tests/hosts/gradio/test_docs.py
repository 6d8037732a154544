"""docs/demo.md names what there is: every endpoint with its parameters, every flag, and no others."""

from __future__ import annotations

import re

from demo_host import ROOT

from demo_app.settings import parser
from demo_app.tabs import upscale
from uplift_core.color import COLOR_METHODS

TEXT = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")


def test_endpoints_and_their_parameters_are_documented(demo):
    known = demo.client().view_api(return_format="dict")["named_endpoints"]
    rows = {m[1]: m[2] for m in re.finditer(r"^\| `(/\w+)` \| (.*?) \|", TEXT, re.MULTILINE)}
    assert set(rows) == set(known)
    for name, facts in known.items():
        given = [p["parameter_name"] for p in facts["parameters"]]
        named = [n for n in re.findall(r"`(\w+)`", rows[name]) if n != "None"]
        if name == "/upscale_batch":
            assert named == given[:1]
        else:
            assert named == given, name
        needed = [p["parameter_name"] for p in facts["parameters"][1:] if not p["parameter_has_default"]]
        assert set(needed) <= {"x", "y"}, (name, needed)


def test_flags_are_documented():
    flags = {s for action in parser()._actions for s in action.option_strings if s.startswith("--")} - {"--help"}
    assert set(re.findall(r"--[a-z][a-z-]+", TEXT.split("## The tabs")[0])) == flags


def test_choices_are_the_cores():
    assert {value for _, value in upscale.COLOR_FIXES} == set(COLOR_METHODS)
