"""How a process of a job ends: at once, with its code and its output, and nothing taken down."""

import subprocess
import sys

import pytest

from tests.support import ROOT

SCRIPT = """
import atexit, sys
from rlalign.process import leaving_at_once

class Kept:
    def __del__(self):
        print("taken down")

kept = Kept()
atexit.register(print, "registered")
with leaving_at_once(when={when}):
    print("worked", end=" ")
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no model')", 1, "no model"),
        ("raise KeyError('seed')", 1, "KeyError: 'seed'"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_process_leaves_as_python_would_but_takes_nothing_down(end, code, said, at_once):
    script = SCRIPT.format(when=at_once, end=end)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == code
    assert said in done.stderr and ("Traceback" in done.stderr) == ("raise" in end)
    assert done.stdout.split() == ["worked", "registered"] + ["taken", "down"] * (not at_once)
