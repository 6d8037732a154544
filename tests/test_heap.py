"""The heap of the C library is told to keep what a run frees, and only where nobody else has a say."""

import os
import subprocess
import sys

import pytest

RUN = """
import resource, torch
from uplift_core.heap import keep_freed_memory
if {told}:
    print(keep_freed_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    held = [torch.zeros(1 << 20) for _ in range(8)]  # 4 MB each
work()
counts = []
for _ in range(4):
    before = faults()
    work()
    counts.append(faults() - before)
print(min(counts))  # where the heap ends is chance: some pay for a block or two
"""


def run(told, **environment):
    done = subprocess.run([sys.executable, "-c", RUN.format(told=told)], capture_output=True, text=True, check=True,
                          env={**{k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")},
                               "THP_MEM_ALLOC_ENABLE": "0", **environment})  # large pages would hide every fault
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="another C library")
def test_freed_memory_is_not_paid_for_again():
    kept, faults = run(True)
    if kept == "False":
        pytest.skip("another C library than glibc")
    assert int(faults) < 512  # untold it is mostly all of the 8 blocks' pages, and by chance none


def test_what_the_environment_says_about_malloc_holds():
    assert run(True, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
