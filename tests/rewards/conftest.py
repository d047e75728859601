"""Scorers, modules and HTTP services of a test, all gone when it ends."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from rlalign.config.schema import AlgoConfig, RewardsConfig, RewardSpec
from rlalign.rewards import Scorer, build_scorer

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Every test of this folder ends with the child processes it began with."""
    before = _children()
    yield
    left = _children() - before
    assert not left, f"processes left behind: {left}"


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture
def scorer() -> Iterator[Callable[..., Scorer]]:
    """Build scorers from reward specs (or names); closed at the end."""
    built: list[Scorer] = []

    def build(*specs: RewardSpec | str, algo: Any = None, functions: Any = None, **cfg: Any):
        named = [RewardSpec(name=s) if isinstance(s, str) else s for s in specs]
        config = RewardsConfig(functions=named, **{"max_error_rate": 1.0, **cfg})
        built.append(build_scorer(config, algo or AlgoConfig(), 100, functions=functions))
        return built[-1]

    yield build
    for one in built:
        one.close()


@pytest.fixture
def module(tmp_path, monkeypatch) -> Callable[[str], str]:
    """Write a user's module; its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> str:
        name = f"user_rewards_{os.getpid()}_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


class Service:
    """A local HTTP server. `answer(body) -> (status, object or text, headers)` is called per POST;
    `bodies` are the requests it saw, `peak` the most it handled at once."""

    def __init__(self, answer: Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.peak = self._open = 0
        self._lock = threading.Lock()
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with service._lock:
                    service.bodies.append(body)
                    service.headers.append(dict(self.headers))
                    service._open += 1
                    service.peak = max(service.peak, service._open)
                status, content, headers = answer(body)
                with service._lock:
                    service._open -= 1
                data = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data.encode())), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def service() -> Iterator[Callable[..., Service]]:
    started: list[Service] = []

    def start(answer: Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]]) -> Service:
        started.append(Service(answer))
        return started[-1]

    yield start
    for one in started:
        one.close()
