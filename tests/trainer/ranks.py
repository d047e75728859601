"""Starts a script as several processes of one job, as `torchrun` would, with a deadline."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.support import ROOT


def run_ranks(script: Path, *arguments: str, size: int = 2, timeout_s: float = 240.0) -> list[str]:
    """Run `python script *arguments` as `size` processes; returns the output of each.

    Fails the test with the output of the process that failed first, and leaves none behind.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [_start(script, arguments, rank, size, port) for rank in range(size)]
    try:
        _wait(processes, timeout_s)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    outputs = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert not any(codes), "\n".join(
        f"--- rank {rank}, exit status {code}\n{output[-4000:]}"
        for rank, (code, output) in enumerate(zip(codes, outputs, strict=True))
    )
    return outputs


def _start(script: Path, arguments: tuple[str, ...], rank: int, size: int, port: int):
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait(processes: list[subprocess.Popen], timeout_s: float) -> None:
    """Until all have ended, or one has failed and the others had a moment to say so too."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):
            deadline = min(deadline, time.monotonic() + 5.0)
        time.sleep(0.05)
