"""The heap of the C library is told to keep what a run frees, and only where nobody else has a say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import resource, torch
from uplift_core.heap import keep_freed_memory
if {told}:
    print(keep_freed_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    held = [torch.zeros(1 << 20) for _ in range(12)]  # 4 MB each
work()
before = faults()
work()  # later ones cost nothing anywhere: glibc has learned by then
print(faults() - before)
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
    assert int(run(False)[0]) >= 11 * 1024  # of the 12 blocks' pages nearly all
    assert int(faults) < 2 * 1024 + 512  # of two blocks at most


def test_what_the_environment_says_about_malloc_holds():
    assert run(True, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


LARGE = """
import os, resource, torch
{import_ours}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(64 << 20 >> 2).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, "THP_MEM_ALLOC_ENABLE" in os.environ)
"""


def large(import_ours, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", LARGE.format(import_ours=import_ours)], capture_output=True, text=True,
                          check=True, env={**clean, **environment})
    faults, told = done.stdout.split()
    return int(faults), told == "True"


def test_large_pages_where_the_system_gives_them():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[madvise]" not in setting.read_text():
        pytest.skip("this system gives large pages to everybody or to nobody")
    usual, _ = large("")
    assert usual >= 64 << 8  # a fault for every 4 KB of 64 MB
    if large("", THP_MEM_ALLOC_ENABLE="1")[0] > usual // 8:
        pytest.skip("this torch does not ask for large pages")
    assert large("import uplift_core") < (usual // 8, False)
    assert large("import uplift_core", THP_MEM_ALLOC_ENABLE="0") >= (usual // 2, True)  # what the user says holds
