"""The peak of memory can be counted again from any moment."""

import subprocess
import sys

import pytest

# in a process of its own: in one that has run other tests, a new block may come from memory that is already there
COUNTED_AGAIN = """
import sys, torch
from uplift_core.measure import peak_memory, start_peak
cpu = torch.device("cpu")
before = peak_memory(cpu)
block = torch.ones(200 << 18)  # 200 MB
high = peak_memory(cpu)
del block
try:
    open("/proc/self/clear_refs", "w").write("5")
except OSError:
    sys.exit(77)
start_peak(cpu)
low = peak_memory(cpu)
block = torch.ones(100 << 18)
again = peak_memory(cpu)
print(*((value - before) >> 20 for value in (high, low, again)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process count its peak again")
def test_the_peak_counts_from_the_start_that_was_set():
    done = subprocess.run([sys.executable, "-c", COUNTED_AGAIN], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this container does not allow it")
    assert done.returncode == 0, done.stderr
    high, low, again = map(int, done.stdout.split())
    assert high > 180 and low < 50 and 80 < again < 150
