"""Shared by all tests: two threads at most, and no network unless a test brings its own server."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch

torch.set_num_threads(int(os.environ.get("UPLIFT_TEST_THREADS", "2")))
