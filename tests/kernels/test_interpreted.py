"""The Triton kernels on a CPU: the backend's suite in a process that interprets them.

The flag is read when Triton decorates a kernel, and a process that interprets cannot compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SUITES = (
    "test_linear_logprob.py",
    "test_head_parts.py",
    "test_peer_defects.py",
    "interpreted_triton.py",
    "interpreted_alpha_search.py",
)


@pytest.mark.parametrize("suite", SUITES)
def test_the_suite_passes_on_interpreted_kernels(suite):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / suite],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
