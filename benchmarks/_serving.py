"""A rollout server for a benchmark: a process of its own with one engine thread."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 300.0


@contextlib.contextmanager
def serving(path: str, *options: str) -> Iterator[str]:
    """A server of its own; yields the name of its connection file."""
    with tempfile.TemporaryDirectory() as folder:
        connection = Path(folder) / "server.json"
        main = "from rlalign.cli import main; main()"
        arguments = ["serve", path, f"name={connection}", "num_threads=1", "max_len=256", *options]
        process = subprocess.Popen([sys.executable, "-c", main, *arguments], stdout=sys.stderr)
        try:
            deadline = time.monotonic() + START_S
            while not connection.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the server did not start; see its output above")
                time.sleep(0.1)
            yield str(connection)
        finally:
            process.terminate()
            process.wait(30)
