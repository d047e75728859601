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


def test_every_part_has_a_table_of_its_own():
    rows = [
        {"method": "a", "part": "speed", "side": "ours", "seconds": 0.25},
        {"method": "a", "part": "speed", "side": "theirs", "seconds": 4.0},
        {"method": "b", "part": "quality", "side": "ours", "right": 0.5},
    ]
    bars = [{"what": "faster", "value": 16.0, "bar": ">= 20", "holds": False}]
    result = {"name": "x", "machine": "here", "rows": rows, "bars": bars}
    speed, quality, checks = bench.render(result).renderables
    assert speed.title == "x on here, a, speed" and quality.title == "x on here, b, quality"
    assert [list(column.cells) for column in speed.columns] == [
        ["side", "seconds"], ["ours", "0.25"], ["theirs", "4"],
    ]  # fmt: skip
    assert [list(column.cells) for column in quality.columns] == [
        ["side", "right"],
        ["ours", "0.5"],
    ]
    assert list(checks.columns[3].cells) == ["[red]no[/red]"]
