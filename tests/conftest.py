"""Shared by all tests: one thread a process, as the suite runs in several, and no telemetry."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start too

import torch

torch.set_num_threads(int(os.environ.get("UPLIFT_TEST_THREADS", "1")))
