"""The peak of memory can be counted again from any moment."""

import sys

import pytest
import torch

from uplift_core.measure import peak_memory, start_peak

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process count its peak again")
def test_the_peak_counts_from_the_start_that_was_set():
    block = torch.ones(200 << 18)  # 200 MB
    high = peak_memory(CPU)
    del block
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this container does not allow it")
    start_peak(CPU)
    low = peak_memory(CPU)
    assert low < high - (150 << 20)
    block = torch.ones(100 << 18)
    assert low + (80 << 20) < peak_memory(CPU) < high
    del block
