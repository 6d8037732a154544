"""Shared by all tests: one thread a process, as the suite runs in several, no telemetry, and Ctrl-C that is heard."""

import os
import signal

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a suite in the background; its programs would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

torch.set_num_threads(int(os.environ.get("UPLIFT_TEST_THREADS", "1")))
