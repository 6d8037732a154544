"""Starting and ending: soon there, heavy things later, nothing left behind, flags that are meant."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from demo_host import ROOT, DemoHost


def test_the_page_is_there_and_all_is_gone_after_it(tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        host = DemoHost(tmp_path)
        assert list(host.temp.glob("uplift-demo-*"))
        assert host.close(number) == 0, host.log()
        assert not list(host.temp.iterdir())
        assert "Traceback" not in host.log(), host.log()


def test_only_this_machine_is_served_unless_asked(demo):
    lines = Path("/proc/net/tcp")
    if not lines.exists():
        pytest.skip("no /proc here")
    bound = [line.split()[1] for line in lines.read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert f"0100007F:{demo.port:04X}" in bound and f"00000000:{demo.port:04X}" not in bound


def test_importing_the_page_imports_no_torch():
    code = "import sys, demo_app.app; sys.exit('torch' in sys.modules or 'uplift_core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_is_fetched_from_elsewhere(demo):
    settings = json.loads(demo.get("/config"))
    assert settings["analytics_enabled"] is False and not settings.get("stylesheets")
    assert b"fonts.googleapis.com/css" not in demo.get("/theme.css")


@pytest.mark.parametrize("flags, word", [(["--port", "0"], "port"), (["--max-pixels", "-5"], "max-pixels"),
                                         (["--unknown"], "unknown"), (["--model", "missing.safetensors"], "missing"),
                                         (["--device", "quantum"], "quantum")])
def test_wrong_flags_are_said_at_the_start(tmp_path, flags, word):
    run = subprocess.run([sys.executable, str(ROOT / "demo.py"), *flags], cwd=tmp_path, capture_output=True, text=True,
                         timeout=60, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert run.returncode != 0 and word in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert not list(tmp_path.iterdir())


def test_a_taken_port_is_said(demo, tmp_path):
    run = subprocess.run([sys.executable, str(ROOT / "demo.py"), "--port", str(demo.port)], cwd=tmp_path, text=True,
                         capture_output=True, timeout=60, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert run.returncode != 0 and str(demo.port) in run.stderr and "Traceback" not in run.stderr, run.stderr
