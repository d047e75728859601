"""The file by which jobs find a server, and who may write it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlalign.config import ServeConfig
from rlalign.rollout.server import serve
from rlalign.rollout.server.connection import ConnectionFileError, sole_server, write_connection

CONTEND = """
import sys, time
from pathlib import Path
from rlalign.rollout.server.connection import ConnectionFileError, sole_server
while time.time() < float(sys.argv[2]):
    pass
try:
    with sole_server(Path(sys.argv[1])):
        print("won", flush=True)
        sys.stdin.read()
except ConnectionFileError as error:
    print(error, flush=True)
"""


def contend(path: Path, at: float = 0.0) -> subprocess.Popen:
    """A process that wants the name at the time `at`, and keeps it until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", CONTEND, str(path), str(at)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def said(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def end(process: subprocess.Popen) -> None:
    process.communicate(timeout=10)


def take(path: Path) -> None:
    with sole_server(path):
        pass


def test_of_servers_that_start_at_once_one_gets_the_name(tmp_path):
    path = tmp_path / "server.json"
    start = time.time() + 2.0
    rivals = [contend(path, start) for _ in range(6)]
    words = {rival.pid: said(rival) for rival in rivals}
    winners = [pid for pid, word in words.items() if word == "won\n"]
    losers = [word for word in words.values() if "serves under that name already" in word]
    assert (len(winners), len(losers)) == (1, 5)
    with pytest.raises(ConnectionFileError, match=f"process {winners[0]} serves .*name=second"):
        take(path)
    for rival in rivals:
        end(rival)
    take(path)


def test_a_server_that_was_killed_leaves_neither_its_name_nor_its_file(tmp_path):
    path = tmp_path / "server.json"
    first = contend(path)
    assert said(first) == "won\n"
    # Its number may be another process's by now: ours.
    write_connection(path, "http://127.0.0.1:1", {})
    assert json.loads(path.read_text())["pid"] == os.getpid()
    first.kill()
    first.wait(10)
    end(first)
    with sole_server(path):
        assert not path.exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConnectionFileError, match=r"server.json.lock cannot be locked"):
        take(tmp_path / "file" / "server.json")
    (tmp_path / "server.json.lock").symlink_to(tmp_path / "file")
    with pytest.raises(ConnectionFileError, match=r"server.json.lock cannot be locked"):
        take(tmp_path / "server.json")


def test_a_client_whose_machine_is_gone_is_noticed_within_a_minute():
    with serve._listen(ServeConfig("model")) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                idle, between, count = (
                    accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"))
                    for name in ("IDLE", "INTVL", "CNT")
                )
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert idle + between * count <= 60
