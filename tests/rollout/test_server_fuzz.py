"""Thousands of requests that make no sense: each is refused with a reason, and the server lives.

RLALIGN_FUZZ sets how many are sent.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import random
import socket
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from rlalign.rollout.engine import GenerateRequest, SamplingParams
from tests.rollout.live_server import LiveServer

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

COUNT = int(os.environ.get("RLALIGN_FUZZ", "2000"))
ANSWER_S = 20.0
GROWTH_BYTES = 300 * 2**20  # of the server, from large bodies
REQUEST = GenerateRequest("p", tuple(range(10, 50)), seeds=(1, 2, 3))
PARAMS = SamplingParams(8)

DEEP = b"[" * 100_000
HUGE = b"9" * 10_000
WRONG = [None, True, -1, 1.5, "x", "", {}, [[]], {"a": 1}, 2**70, -(2**70), float("nan")]
ID_LISTS = [[], [-1], [2**31], [1.5], ["1"], [None], [[1]], {"0": 1}, 7, [10**9], [5] * 129]
BODIES: dict[str, dict[str, Any]] = {
    "": {"name": "fuzz", "kind": "full", "ttl_s": 5.0, "wait_s": 0.0, "priority": 1.0},
    "/weights": {"version": 1},
    "/draw": {
        "requests": [{"ids": [5, 6], "seeds": [1]}],
        "params": {
            "max_completion_length": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
            "stop_token_ids": [3], "ignore_eos": False,
        },
    },
    "/score": {"sequences": [[5, 6, 7]]},
}  # fmt: skip
BAD: dict[str, dict[str, list[Any]]] = {  # by route and field; each value alone is a reason
    "": {
        "name": [*(w for w in WRONG if w != "x"), "n" * 201],
        "kind": WRONG,
        "ttl_s": [*(w for w in WRONG if w != 1.5), 0, 0.999, 3601, 1e308, float("inf"), "60"],
        "wait_s": [*(w for w in WRONG if w != 1.5), -0.1, 86_401, float("-inf"), "0"],
        "priority": [*(w for w in WRONG if w != 1.5), 0, 1e-9, 1001, float("inf"), "1"],
    },
    "/weights": {
        "version": [*WRONG, 2**53, "1", 1e300, "../1", "1/../../x"],
        "in_flight": WRONG,
        "channel": WRONG,
    },
    "/draw": {
        "requests": [*WRONG, [], [{}], [[5]], [{"ids": [5]}], [{"seeds": [1]}]],
        "requests.0.ids": ID_LISTS,
        "requests.0.seeds": [[], [-1], [2**63], [1.5], ["1"], [None], [[1]], 7, [1] * 65_537],
        "params": [*WRONG, []],
        "params.max_completion_length": [*WRONG, 0, 2**31, 127, "4"],
        "params.temperature": [*(w for w in WRONG if w != 1.5), -0.1, 2.1, 0.001, 1e-300],
        "params.top_p": [*WRONG, 0, 1.0001],
        "params.top_k": [*WRONG, 2**31],
        "params.stop_token_ids": [*WRONG, [-1], [262], [2**31], [0] * 1001],
        "params.ignore_eos": [w for w in WRONG if w is not True],
    },
    "/score": {"sequences": [*(w for w in WRONG), [[]], [5], [[5, -1]]], "sequences.0": ID_LISTS},
}
JOBS = [
    "x", "0" * 16, "..", ".", "%2e%2e", "%2e%2e%2f%2e%2e", "..%2f..", "%00", "a%00b", "%ff%fe",
    "%", "%zz", "a" * 5000, "%F0%9F%92%A3", "{job}", "*", "a;b", "a?b=c", "a#b", "~root", "%0d%0a",
]  # fmt: skip
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"]
ROUTE_OF = {"": "POST", "/weights": "POST", "/draw": "POST", "/score": "POST", "/heartbeat": "POST"}


class Raw:
    """Requests byte by byte; one connection each."""

    def __init__(self, server: LiveServer) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self._address, self._token = (host, int(port)), server.tokens["admin"]

    def head(self, method: str, path: str, *headers: str, version: str = "1.1") -> bytes:
        lines = [f"{method} {path} HTTP/{version}", "Host: x", *headers, "Connection: close"]
        return "\r\n".join([*lines, f"Authorization: Bearer {self._token}", "", ""]).encode()

    def request(self, method: str, path: str, body: bytes = b"", version: str = "1.1") -> bytes:
        return self.head(method, path, f"Content-Length: {len(body)}", version=version) + body

    def answer(self, sent: bytes, method: str = "POST") -> tuple[int, bytes]:
        """Status and body; 0 where the connection was closed without an answer."""
        with socket.create_connection(self._address, timeout=ANSWER_S) as sock:
            with contextlib.suppress(OSError):  # it was shut while we talked on: read its answer
                sock.sendall(sent)
            answer = http.client.HTTPResponse(sock, method=method)
            try:
                answer.begin()
                return answer.status, answer.read()
            except (http.client.BadStatusLine, ConnectionResetError):
                return 0, b""


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory) -> Iterator[LiveServer]:
    server = LiveServer(folder, tmp_path_factory.mktemp("server"))
    yield server
    assert server.close() == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


@pytest.fixture
def raw(server) -> Raw:
    return Raw(server)


def assert_refused(answer: tuple[int, bytes], sent: bytes, reason: bool = True) -> None:
    status, body = answer
    shown = sent if len(sent) < 600 else sent[:600] + b"..."
    assert 400 <= status < 500, (shown, status, body[:300])
    assert not reason or json.loads(body)["error"], (shown, body)


def with_value(body: Any, path: str, value: Any) -> Any:
    body = json.loads(json.dumps(body))
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    node = body
    for parent in parents:
        node = node[parent]
    node[last] = value
    return body


def bad_field(rng: random.Random, route: str) -> bytes:
    path = rng.choice(list(BAD[route]))
    return json.dumps(with_value(BODIES[route], path, rng.choice(BAD[route][path]))).encode()


def bad_text(rng: random.Random, route: str) -> bytes:
    good = json.dumps(BODIES[route]).encode()
    at = rng.randrange(1, len(good))
    return rng.choice(
        [
            b"", b"null", b"[]", b"0", b'""', DEEP, DEEP + b"]" * 100_000, HUGE, b'{"a":' * 50_000,
            good[:at], good[at:], good + b"}", good[:at] + b"\xff" + good[at:],
            good[:at] + b"\xed\xa0\x80" + good[at:], good[:at] + b"\x00" + good[at:],
            good[:-1] + b', "more": 1}', good[:-1] + b', "\\ud800": 1}',
            good.replace(b": ", b":: "),
            good.replace(b"1", HUGE, 1) + b"x", rng.randbytes(50), good.decode().encode("utf-16"),
        ]
    )  # fmt: skip


def bad_body(rng: random.Random, raw: Raw, job: str) -> tuple[str, bytes]:
    route = rng.choice(list(BODIES))
    body = rng.choice((bad_field, bad_text))(rng, route)
    path = f"/v1/jobs/{job}{route}" if route else "/v1/jobs"
    return "POST", raw.request("POST", path, body, rng.choice(["1.0", "1.1", "1.1"]))


def bad_path(rng: random.Random, raw: Raw, job: str) -> tuple[str, bytes]:
    """An unknown job, a method that is not the route's, or a path that is no route."""
    route, other = rng.choice(list(ROUTE_OF)), rng.choice(JOBS)
    good = json.dumps(BODIES.get(route, {})).encode()
    random_path = "/" + "".join(rng.choices(string.ascii_letters + "/%.~:;,", k=rng.randrange(40)))
    method, path = rng.choice(
        [
            ("POST", f"/v1/jobs/{other}{route or '/draw'}"),
            ("DELETE", f"/v1/jobs/{other}"),
            (rng.choice(["GET", "PUT", "PATCH", "HEAD", "OPTIONS"]), f"/v1/jobs/{job}{route}"),
            ("DELETE", f"/v1/jobs/{job}/draw"),
            ("POST", f"/v1/jobs/{job}{route or '/x'}/"),
            ("POST", f"/v1/jobs/{job}/../{other}{route or '/draw'}"),
            (rng.choice(METHODS), random_path + "!"),
        ]
    )
    return method, raw.request(method, path, good)


def bad_protocol(rng: random.Random, raw: Raw, job: str) -> tuple[str, bytes]:
    """What is no HTTP, or HTTP that two readers could read in two ways."""
    body = json.dumps(BODIES["/draw"]).encode()
    path, size = f"/v1/jobs/{job}/draw", f"Content-Length: {len(body)}"
    chunked = "Transfer-Encoding: chunked"
    sent = rng.choice(
        [
            rng.randbytes(rng.randrange(1, 300)) + b"\r\n\r\n",
            b"GET\r\n\r\n", b"\r\n\r\n\r\n!\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n",
            raw.head("POST", path, "Content-Length: -1") + body,
            raw.head("POST", path, "Content-Length: x") + body,
            raw.head("POST", path, f"Content-Length: {'9' * 5000}") + body,
            raw.head("POST", path, size, f"Content-Length: {len(body) - 1}") + body,
            raw.head("POST", path, size, chunked) + body,
            raw.head("POST", path, chunked, size) + b"5\r\n" + body,
            raw.head("POST", path, chunked) + b"zz\r\n" + body,
            raw.head("POST", path, chunked) + b"-5\r\n" + body,
            raw.head("POST", path, chunked) + b"fffffffffffffffffffff\r\n" + body,
            raw.head("POST", path, "Bad Header", size) + body,
            raw.head("POST", path, "X: a\x00b", size) + body,
            raw.head("POST", path + " x", size) + body,
            raw.head("CONNECT", "x:80"), raw.head("BREW", path),
            raw.head("POST", path, size, version="9.9") + body,
            raw.head("POST", "http://[::1", size) + body,
            raw.head("GET", "/v1/jobs", "Upgrade: websocket", "Connection: Upgrade",
                     "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
            raw.head("POST", "/v1/jobs", "Upgrade: h2c", "Connection: Upgrade"),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ]
    )  # fmt: skip
    return "POST", sent


def drawn(engine) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in engine.generate([REQUEST], PARAMS)[0]]


def test_what_makes_no_sense_is_refused_and_the_server_serves_on(server, raw, tokenizer):
    rng, statuses = random.Random(0), Counter()
    kinds: list[Callable[..., tuple[str, bytes]]] = [bad_body, bad_body, bad_path, bad_protocol]
    with server.client(tokenizer, ttl_s=3600) as engine:
        before, job = drawn(engine), engine._job.rpartition("/")[2]
        for i in range(COUNT):
            method, sent = kinds[i % len(kinds)](rng, raw, job)
            answer = raw.answer(sent, method)
            assert_refused(answer, sent, reason=method != "HEAD")
            statuses[answer[0]] += 1
            if i % 500 == 0:
                assert drawn(engine) == before
        assert drawn(engine) == before and server.state()["restarts"] == 0
    print(dict(statuses))


BAD_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "short": lambda good: good[:7],
    "cut": lambda good: good[: len(good) // 2],
    "one byte short": lambda good: good[:-1],
    "one byte long": lambda good: good + b"x",
    "text": lambda good: b"not a tensor in sight",
    "header of 2^63 bytes": lambda good: (2**63).to_bytes(8, "little") + good[8:],
    "header of nothing": lambda good: (0).to_bytes(8, "little"),
    "header that is no JSON": lambda good: (4).to_bytes(8, "little") + b"\xff\xff\xff\xff",
    "zeros": lambda good: bytes(len(good)),
}


def bad_folders(spool: Path, good: dict[str, torch.Tensor]) -> Iterator[int]:
    """Versions whose folders hold no weights of this model, made one at a time."""
    whole = save(good)
    name, tensor = next(iter(good.items()))
    contents = [damage(whole) for damage in BAD_FILES.values()]
    for change in ({name: tensor[:1]}, {name: tensor * torch.nan}):
        contents.append(save({**good, **change}))
    contents.append(save({"nobody": tensor}))
    contents.append(save({k: v for k, v in good.items() if k != name}))
    for version, content in enumerate(contents):
        (spool / str(version)).mkdir()
        (spool / str(version) / "a.safetensors").write_bytes(content)
        yield version
    version = len(contents)
    (spool / str(version)).mkdir()
    yield version  # nothing in it
    (spool / str(version + 1) / "a.safetensors").mkdir(parents=True)
    yield version + 1
    for version, target in enumerate(["/etc/passwd", "/nowhere", "a.safetensors", "/"], 1000):
        (spool / str(version)).mkdir()
        (spool / str(version) / "a.safetensors").symlink_to(target)
        yield version
    for version, target in enumerate(["/", "/nowhere", "2000", "../../..", "/etc"], 2000):
        (spool / str(version)).symlink_to(target)
        yield version
    (spool / "3000").write_bytes(whole)
    yield 3000
    yield 2**53 - 1  # nowhere


def test_weights_that_are_none_are_refused_and_leave_nothing_behind(server, raw, folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    good = {name: weight.detach() for name, weight in model.named_parameters()}
    with server.client(tokenizer, ttl_s=3600) as engine:
        before = drawn(engine)
        for version in bad_folders(engine._channel._spool, good):
            body = json.dumps({"version": version}).encode()
            sent = raw.request("POST", f"{engine._job}/weights", body)
            assert_refused(raw.answer(sent), sent)
        assert drawn(engine) == before and server.state()["restarts"] == 0
        engine.update_weights(good.items(), 7)
        assert drawn(engine) == before and engine.version.version == 7


def test_bodies_of_many_megabytes_are_refused_soon_and_cost_no_memory(server, raw, tokenizer):
    rss = psutil.Process(server.process.pid).memory_info().rss
    with server.client(tokenizer, ttl_s=3600) as engine:
        before, params = drawn(engine), json.dumps(BODIES["/draw"]["params"])
        for ids, seeds in (
            ("5," * 5_000_000 + "5", "1"),
            ('"a",' * 2_500_000 + '"a"', "1"),
            ("5", "1," * 5_000_000 + "1"),
        ):
            body = f'{{"requests": [{{"ids": [{ids}], "seeds": [{seeds}]}}], "params": {params}}}'
            sent = raw.request("POST", f"{engine._job}/draw", body.encode())
            assert_refused(raw.answer(sent), sent)
            if ids != "5":
                body = f'{{"sequences": [[{ids}]]}}'
                sent = raw.request("POST", f"{engine._job}/score", body.encode())
                assert_refused(raw.answer(sent), sent)
        many = json.dumps({"ids": [5, 6], "seeds": list(range(60_000))})
        body = f'{{"requests": [{many}, {many}, {many}, {many}], "params": {params}}}'
        sent = raw.request("POST", f"{engine._job}/draw", body.encode())
        assert_refused(raw.answer(sent), sent)
        assert drawn(engine) == before
    assert psutil.Process(server.process.pid).memory_info().rss - rss < GROWTH_BYTES
