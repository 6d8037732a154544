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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``--dist loadfile`` a host's files go to one process, so that the host starts once for them."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadHostScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = Path(super()._split_scope(nodeid))
            return str(file.parent if file.parent.parent.name == "hosts" else file)

    return LoadHostScheduling(config, log)
