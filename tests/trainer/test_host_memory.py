"""Freed memory is used again without page faults."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource, torch
from rlalign.trainer.host_memory import keep_freed_memory

if {keep}:
    assert keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**20)  # 4 MiB, 1024 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


def page_faults(keep: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(keep=keep)],
        capture_output=True, text=True, check=True, timeout=120,
        env={"PATH": "", "MALLOC_MMAP_THRESHOLD_": "131072"},  # else glibc raises it by itself
    )  # fmt: skip
    return int(done.stdout)


def test_blocks_of_some_mib_are_not_given_back_to_the_system():
    assert page_faults(keep=True) < 100
    assert page_faults(keep=False) > 5000
