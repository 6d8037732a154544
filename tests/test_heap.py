"""The heap of the C library is told to keep what a run frees, and only where nobody else has a say."""

import os
import subprocess
import sys

import pytest

RUN = """
import re, torch
from uplift_core.heap import keep_freed_memory
if {told}:
    print(keep_freed_memory())
def heap():
    found = re.search("([0-9a-f]+)-([0-9a-f]+) .*heap", open("/proc/self/maps").read())
    return range(*(int(end, 16) for end in found.groups()))
block = torch.zeros(31 << 18)  # 31 MB: glibc's own limit may have grown to what an import freed, but not to this
print(block.data_ptr() in heap())
before = len(heap())
del block
print(before - len(heap()) < 1 << 20)
"""


def run(told, **environment):
    done = subprocess.run([sys.executable, "-c", RUN.format(told=told)], capture_output=True, text=True, check=True,
                          env={**{k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}, **environment})
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="another C library")
def test_a_freed_block_stays_the_programs():
    kept, *found = run(True)
    if kept == "False":
        pytest.skip("another C library than glibc")
    assert found == ["True", "True"]  # of the heap, which is not shortened
    assert run(False)[0] == "False"  # otherwise it comes from the system and goes back


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="another C library")
def test_what_the_environment_says_about_malloc_holds():
    assert run(True, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
