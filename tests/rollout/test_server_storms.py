"""A real server under clients that come all at once, stop reading or never begin, and under signals
at the wrong moment."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlalign.config.schema import LoraConfig
from rlalign.models.lora import adapter_config, adapter_weights, attach_lora
from rlalign.rollout.channels import files
from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams
from rlalign.trainer.publish import publish
from tests.rollout.live_server import LiveServer

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

PARAMS = SamplingParams(60, ignore_eos=True)
LONG = SamplingParams(120, ignore_eos=True)


def requests(seed: int) -> list[GenerateRequest]:
    ids = (5 + seed, 6, 7)
    return [GenerateRequest(f"p{i}", (*ids, 8 + i), seeds=(seed, seed + 1)) for i in range(2)]


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory) -> Iterator[LiveServer]:
    server = LiveServer(folder, tmp_path_factory.mktemp("server"), "vllm.max_loras=1")
    yield server
    assert server.close() == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def spools(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"rlalign-serve-{pid}-*"))


def address(server: LiveServer) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def wait_until(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_many_clients_through_two_deaths_each_get_what_they_would_have_had(server, tokenizer):
    with server.client(tokenizer, ttl_s=600) as engine:
        expected = [engine.generate(requests(i), PARAMS) for i in range(12)]
        restarts, problems, right = server.state()["restarts"], [], []
        stop = threading.Event()

        def draw(i: int) -> None:
            try:
                while not stop.is_set():
                    assert engine.generate(requests(i), PARAMS) == expected[i]
                    right.append(i)
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=draw, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for kill in (1, 2):
            wait_until(lambda: server.state()["in_flight"] > 4)
            server.kill_engine()
            wait_until(lambda n=restarts + kill: server.state()["restarts"] == n)
            before = len(right)
            wait_until(lambda n=before: len(right) > n + 24)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert not problems, problems
        assert (server.state()["in_flight"], server.state()["waiting"]) == (0, 0)


def test_a_client_that_does_not_read_keeps_nobody_waiting(server, tokenizer):
    with server.client(tokenizer, ttl_s=600) as engine:
        body = {
            "requests": [{"ids": [5, 6], "seeds": list(range(300))}],
            "params": {"max_completion_length": 120, "ignore_eos": True},
        }
        content = json.dumps(body).encode()
        head = (
            f"POST {engine._job}/draw HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
            f"Authorization: Bearer {server.tokens['job']}\r\n\r\n"
        )
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            sock.connect(address(server))
            sock.sendall(head.encode() + content)
            wait_until(lambda: server.state()["in_flight"])
            assert len(engine.generate(requests(1), PARAMS)) == 2
            wait_until(lambda: not server.state()["in_flight"])
        assert len(engine.generate(requests(1), PARAMS)) == 2


def test_a_connection_is_kept_for_longer_than_clients_use_it(server):
    """Closed at the moment they use it again, it would take their request along."""
    head = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(address(server), timeout=10) as sock:
        sock.sendall(head)
        assert b"200 OK" in sock.recv(1000)
        sock.settimeout(httpx.Limits().keepalive_expiry + 1)  # type: ignore[operator]
        with contextlib.suppress(TimeoutError):
            while sock.recv(1000):
                pass
        sock.settimeout(10)
        sock.sendall(head)
        assert b"200 OK" in sock.recv(1000)


def test_a_job_outlives_a_server_that_is_stopped_for_longer_than_its_lease(server, tokenizer):
    with server.client(tokenizer, ttl_s=1.0) as engine:
        before = engine.generate(requests(1), PARAMS)
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        server.process.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        assert engine.generate(requests(1), PARAMS) == before


def test_an_adapter_lasts_as_long_as_what_began_with_it(server, folder, tokenizer):
    """Updates while sequences of the first are still running: more adapters than vLLM keeps."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    attach_lora(model, LoraConfig(rank=8, alpha=16), 0)
    wish = [GenerateRequest("p", (5, 6), seeds=tuple(range(6)))]
    expected: dict[int, Any] = {}
    results: dict[int, Any] = {}

    def update(version: int) -> None:
        rng = torch.Generator().manual_seed(version % 10)
        for _, weight in adapter_weights(model):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=rng))
        publish(engine, adapter_weights(model), version)

    def draw(version: int) -> None:
        results[version] = engine.generate(wish, LONG)[0]

    def draw_all_at_once(versions: range) -> bool:
        """Whether the last began before the first ended: on a busy machine it may not."""
        threads = []
        for version in versions:
            update(version)
            threads.append(threading.Thread(target=draw, args=(version,)))
            threads[-1].start()
            count = 6 * len(threads)
            wait_until(lambda n=count: server.state()["in_flight"] >= n or results)
            if results:
                break
        in_time = not results
        for thread in threads:
            thread.join(120)
        return in_time

    with server.client(tokenizer, adapter=adapter_config(model), ttl_s=600) as engine:
        for version in range(1, 6):
            update(version)
            expected[version] = [s.token_ids for s in engine.generate(wish, LONG)[0]]
        restarts = server.state()["restarts"]
        for first in (11, 21, 31):
            results.clear()
            if draw_all_at_once(range(first, first + 5)):
                break
        else:
            pytest.fail("the first ended before the last began, three times")
        assert server.state()["restarts"] == restarts
        for version, drawn in results.items():
            assert {s.spans[0].version for s in drawn} == {version}
            assert [s.token_ids for s in drawn] == expected[version % 10]
        update(46)
        assert len(list(engine._channel._spool.iterdir())) == 1


def test_a_job_that_is_over_is_told_so_when_it_brings_weights(server, folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with server.client(tokenizer, ttl_s=600) as engine, server.http() as http:
        http.delete(engine._job)
        with pytest.raises(EngineError, match="its lease ended"):
            engine.update_weights(model.named_parameters(), 1)


def test_a_full_disk_is_named_and_leaves_nothing(server, folder, tokenizer, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with server.client(tokenizer, ttl_s=600) as engine:
        before, written = engine.generate(requests(1), PARAMS), []

        def full(tensors, path):
            if len(written) == 3:
                raise OSError(28, "No space left on device")
            written.append(path.write_bytes(b"x" * 100))

        with monkeypatch.context() as patch:
            patch.setattr(files, "save_file", full)
            with pytest.raises(EngineError, match=r"No space left on device.*Make room"):
                engine.update_weights(model.named_parameters(), 1)
        assert not list(engine._channel._spool.iterdir())
        assert engine.generate(requests(1), PARAMS) == before
        assert engine.update_weights(model.named_parameters(), 1).version == 1


def test_a_file_system_that_takes_no_more_is_named_and_leaves_nothing(server, folder, tokenizer):
    """The real refusal of a write: files of this process may have 4 KiB."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with server.client(tokenizer, ttl_s=600) as engine:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(EngineError, match=r"File too large.*Make room"):
                engine.update_weights(model.named_parameters(), 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(engine._channel._spool.iterdir())
        assert engine.update_weights(model.named_parameters(), 1).version == 1


# --- starts and stops ----------------------------------------------------------------------------


def begin(model: Path, folder: Path, *options: str) -> tuple[subprocess.Popen, Path]:
    log = folder / "log"
    arguments = ["serve", str(model), f"name={folder / 'server.json'}", "max_len=128", *options]
    main = "from rlalign.cli import main; main()"
    with log.open("w") as out:
        command = [sys.executable, "-c", main, *arguments]
        return subprocess.Popen(command, stdout=out, stderr=out), log


def test_a_server_that_is_stopped_while_its_engine_starts_leaves_nothing(folder, tmp_path):
    process, log = begin(folder, tmp_path)
    parent = psutil.Process(process.pid)
    wait_until(lambda: parent.children() and spools(process.pid))
    engines = parent.children()
    time.sleep(0.5)
    process.terminate()
    assert process.wait(10) == 0, log.read_text()
    assert not spools(process.pid) and not (tmp_path / "server.json").exists()
    assert not psutil.wait_procs(engines, timeout=5)[1]


def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(folder, tmp_path):
    process, log = begin(folder, tmp_path, "dtype=float32", "vllm.kv_cache_gib=100000")
    assert process.wait(60) != 0
    assert "kv_cache_gib" in log.read_text() and "Traceback" not in log.read_text()
    assert not spools(process.pid) and not (tmp_path / "server.json").exists()


def test_a_server_that_is_stopped_while_it_draws_ends_soon_and_says_so(folder, tokenizer, tmp_path):
    server = LiveServer(folder, tmp_path)
    engine, seen = server.client(tokenizer), []

    def draw() -> None:
        many = [GenerateRequest("p", (5, 6), seeds=tuple(range(3000)))]
        try:
            engine.generate(many, LONG)
        except EngineError as error:
            seen.append(str(error))

    thread = threading.Thread(target=draw)
    thread.start()
    wait_until(lambda: server.state()["in_flight"])
    process = psutil.Process(server.engine_pid())
    began = time.monotonic()
    assert server.close() == 0, server.log.read_text()
    assert time.monotonic() - began < 12
    thread.join(10)
    assert seen and "shutting down" in seen[0]
    assert not psutil.wait_procs([process], timeout=5)[1]
    assert "Traceback" not in server.log.read_text()
    with contextlib.suppress(EngineError):
        engine.close()


def whole(sock: socket.socket) -> bytes:
    """A chunked answer."""
    got = b""
    while not got.endswith(b"\r\n0\r\n\r\n"):
        got += sock.recv(1000) or b"closed\r\n0\r\n\r\n"
    return got


def test_who_connects_and_says_nothing_is_shown_the_door(tmp_path):
    """The server's own uvicorn, with less patience."""
    code = (
        "import uvicorn; from rlalign.rollout.server import wire; wire.HEAD_S = 0.5\n"
        "async def app(scope, receive, send):\n"
        "    await send({'type': 'http.response.start', 'status': 200, 'headers': []})\n"
        "    await send({'type': 'http.response.body', 'body': b'here'})\n"
        "uvicorn.run(app, port=%d, http=wire.HttpProtocol, ws='none', lifespan='off')\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", code % port], env=dict(os.environ))
    try:
        wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        for said in (b"", b"GET / HTTP/1.1\r\nHost"):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
                sock.sendall(said)
                assert sock.recv(100) == b""
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in whole(sock)
            time.sleep(1)
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in whole(sock)
    finally:
        process.terminate()
        process.wait(10)
