"""Shared by all tests: one thread a process, as the suite runs in several, no telemetry, and Ctrl-C that is heard."""

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a suite in the background; its programs would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

torch.set_num_threads(int(os.environ.get("UPLIFT_TEST_THREADS", "1")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """What ``--dist loadgroup`` leaves to one process: a file, and all files of a host, which starts once for them."""
    if config.pluginmanager.hasplugin("xdist"):
        hosts = Path(__file__).parent / "hosts"
        for item in items:
            within = item.path.relative_to(hosts).parts if item.path.is_relative_to(hosts) else ()
            item.add_marker(pytest.mark.xdist_group(within[0] if within else item.path.stem))
