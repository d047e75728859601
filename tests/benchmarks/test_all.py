"""Every benchmark is found and imported as `rlalign bench` does it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rlalign import bench

SCRIPT = """
from rlalign import bench
for name in bench.names():
    assert callable(bench.load(name).run), name
    print(name)
"""


def test_all_benchmarks_load(tmp_path):
    # In a process of their own: other tests add to sys.path here.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == bench.names()
    assert "testtime" in bench.names()


def test_an_unknown_benchmark_is_refused_with_those_there_are():
    with pytest.raises(bench.BenchError, match=r"no benchmark 'trian'; there are: .*train"):
        bench.load("trian")
