"""The rollout server as its users and its enemies meet it: a real one, over HTTP."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams
from rlalign.trainer.publish import check_engine, publish
from rlalign.types import PolicyVersion
from tests.rollout.fake_engine import World
from tests.rollout.live_server import LiveServer

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

PARAMS = SamplingParams(16)
REQUEST = GenerateRequest("p", tuple(range(10, 50)), seeds=(1, 2, 3))
LONG = [GenerateRequest(f"p{i}", (5, 6, 7 + i), seeds=tuple(range(8))) for i in range(8)]
LONG_PARAMS = SamplingParams(100, ignore_eos=True)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory) -> Iterator[LiveServer]:
    server = LiveServer(folder, tmp_path_factory.mktemp("server"), "max_queued=4000")
    yield server
    spool = [path.name for path in Path("/dev/shm").glob(f"rlalign-serve-{server.process.pid}-*")]
    assert server.close() == 0, server.log.read_text()
    assert not server.connection.exists()
    assert len(spool) == 1 and not Path("/dev/shm", spool[0]).exists()


def moved(folder: Path, seed: int = 0):
    """The model with other weights."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    return model


@torch.no_grad()
def logp_of(model, ids) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def tokens(engine) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in engine.generate([REQUEST], PARAMS)[0]]


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


# --- jobs and weights ----------------------------------------------------------------------------


def test_one_job_after_the_other_each_begins_with_the_models_own_weights(server, folder, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = list(REQUEST.token_ids)
    for seed in (1, 2):
        model = moved(folder, seed)
        began = time.monotonic()
        with server.client(tokenizer, f"job {seed}") as engine:
            first = tokens(engine)
            assert time.monotonic() - began < 2
            check_engine(engine, ids, logp_of(base, ids), 1e-3)
            publish(engine, model.named_parameters(), 1)
            check_engine(engine, ids, logp_of(model, ids), 1e-3)
            [[sample, *_]] = engine.generate([REQUEST], PARAMS)
            assert sample.spans[0].version == 1
            assert tokens(engine) != first


def test_a_second_job_is_refused_by_name_or_waits(server, tokenizer):
    with server.client(tokenizer, "the first"):
        with pytest.raises(EngineError, match=r"job 'the first' has the server's weights.*wait_s"):
            server.client(tokenizer, "the second")
        seen: list[str] = []

        def wait_for_it() -> None:
            with server.client(tokenizer, "the third", wait_s=60):
                seen.append("got it")

        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        time.sleep(0.5)
        assert not seen
    waiting.join(30)
    assert seen == ["got it"]


def test_the_lease_of_a_silent_job_ends_and_its_weights_go(server, folder, tokenizer):
    engine = server.client(tokenizer, "silent", ttl_s=1.0)
    before = tokens(engine)
    engine.update_weights(moved(folder).named_parameters(), 3)
    assert tokens(engine) != before
    engine._closed.set()  # its heart stops, as that of a process that was killed
    engine._heart.join()
    wait_until(lambda: not server.state()["jobs"])
    with server.client(tokenizer, "next") as heir:
        assert heir.version == PolicyVersion(0, "")
        assert tokens(heir) == before


def test_a_lease_that_ended_is_told_to_its_job(server, tokenizer):
    engine = server.client(tokenizer, "evicted", ttl_s=1.0)
    with server.http() as http:
        assert http.delete(engine._job).status_code == 200
    with pytest.raises(EngineError, match="its lease ended"):
        engine.generate([REQUEST], PARAMS)
    engine.close()


def test_a_job_is_told_its_priority_and_its_limit(server, tokenizer):
    with server.client(tokenizer, priority=2.5) as engine:
        assert server.state()["jobs"][0]["priority"] == 2.5
        many = [GenerateRequest("p", (5, 6), seeds=tuple(range(4001)))]
        with pytest.raises(EngineError, match=r"max_queued=4000.*HTTP 429"):
            engine.generate(many, PARAMS)
        assert len(tokens(engine)) == 3


def test_weights_that_do_not_fit_leave_the_old_ones_in_use(server, folder, tokenizer):
    model = moved(folder)
    with server.client(tokenizer) as engine:
        engine.update_weights(model.named_parameters(), 1)
        before = tokens(engine)
        bad = dict(model.named_parameters())
        name = next(iter(bad))
        bad[name] = torch.zeros(3, 3)
        with pytest.raises(EngineError, match=r"was sent with shape \(3, 3\)"):
            engine.update_weights(bad.items(), 2)
        bad[name] = torch.full_like(model.get_parameter(name), torch.nan)
        with pytest.raises(EngineError, match="are not finite"):
            engine.update_weights(bad.items(), 2)
        assert engine.version.version == 1 and tokens(engine) == before


# --- faults --------------------------------------------------------------------------------------


def test_an_engine_that_is_killed_comes_back_with_the_weights_and_nothing_is_lost(
    server, folder, tokenizer
):
    model, restarts = moved(folder, 5), server.state()["restarts"]
    with server.client(tokenizer) as engine:
        receipt = engine.update_weights(model.named_parameters(), 7)
        undisturbed = engine.generate(LONG, LONG_PARAMS)
        killer = threading.Timer(0.3, server.kill_engine)
        killer.start()
        disturbed = engine.generate(LONG, LONG_PARAMS)
        killer.join()
        assert disturbed == undisturbed
        state = server.state()
        assert state["restarts"] == restarts + 1
        assert state["jobs"][0]["digest"] == receipt.digest
        ids = list(REQUEST.token_ids)
        check_engine(engine, ids, logp_of(model, ids), 1e-3)


def test_a_server_that_is_killed_takes_its_engine_along_and_the_next_one_cleans_up(
    folder, tokenizer, tmp_path
):
    first = LiveServer(folder, tmp_path)
    engine, spool = first.engine_pid(), f"rlalign-serve-{first.process.pid}-"
    client = first.client(tokenizer)
    first.process.kill()
    first.process.wait(10)
    with pytest.raises(EngineError, match=r"does not answer.*rlalign serve MODEL"):
        client.generate([REQUEST], PARAMS)
    client.close()
    wait_until(lambda: not lives(engine))
    assert any(path.name.startswith(spool) for path in Path("/dev/shm").iterdir())
    first.connection.unlink()
    second = LiveServer(folder, tmp_path)
    assert not any(path.name.startswith(spool) for path in Path("/dev/shm").iterdir())
    assert second.close() == 0


def test_a_client_that_goes_away_takes_its_sequences_along(server, tokenizer):
    with server.client(tokenizer) as engine:
        body = {
            "requests": [{"ids": [5, 6], "seeds": list(range(2000))}],
            "params": {"max_completion_length": 100, "ignore_eos": True},
        }
        with server.http() as http, http.stream("POST", f"{engine._job}/draw", json=body) as answer:
            next(answer.iter_lines())
        wait_until(lambda: not (server.state()["waiting"] or server.state()["in_flight"]))
        assert len(tokens(engine)) == 3


def test_a_server_that_is_gone_is_named(folder, tokenizer, tmp_path):
    with pytest.raises(EngineError, match="rlalign serve MODEL"):
        LiveServer.client(
            type("Gone", (), {"connection": tmp_path / "nothing.json"})(),  # type: ignore[arg-type]
            tokenizer,
        )


# --- doors ---------------------------------------------------------------------------------------

ROUTES = [  # method, path, the least scope that opens it
    ("GET", "/v1/server", "generate"),
    ("POST", "/v1/jobs", "job"),
    ("POST", "/v1/jobs/x/heartbeat", "job"),
    ("DELETE", "/v1/jobs/x", "job"),
    ("POST", "/v1/jobs/x/weights", "job"),
    ("PUT", "/v1/jobs/x/weights/{version}/{file}", "job"),
    ("POST", "/v1/jobs/x/draw", "job"),
    ("POST", "/v1/jobs/x/score", "job"),
    ("GET", "/metrics", "generate"),
    ("GET", "/v1/models", "generate"),
    ("GET", "/v1/models/{model:path}", "generate"),
    ("POST", "/v1/completions", "generate"),
    ("POST", "/v1/chat/completions", "generate"),
]


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
def test_every_door_is_locked(server, method, path, scope):
    weaker = ["generate"] if scope == "job" else []
    wrong = [None, "Bearer", "Bearer wrong", f"Basic {server.tokens['admin']}"]
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        for header in wrong:
            headers = {} if header is None else {"Authorization": header}
            answer = http.request(method, path, headers=headers)
            assert answer.status_code == 401 and "token" in answer.json()["error"]
        for token in weaker:
            headers = {"Authorization": f"Bearer {server.tokens[token]}"}
            answer = http.request(method, path, headers=headers)
            assert answer.status_code == 403 and repr(scope) in answer.json()["error"]
    with server.http(scope) as http:
        assert http.request(method, path).status_code not in (401, 403)


def test_the_list_of_doors_is_complete_and_the_rest_is_wall(server, tmp_path, monkeypatch):
    """Every route of the application is in ROUTES, or open on purpose."""
    registered = World(tmp_path, monkeypatch).asgi._scopes
    known = {(method, path.replace("/x", "/{job}")): scope for method, path, scope in ROUTES}
    assert registered == {**known, ("GET", "/health"): None, ("GET", "/"): None}
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        assert http.get("/health").json() == {"status": "ok"}
        for path in ("/docs", "/openapi.json", "/metrics", "/v1/models", "/v1/jobs/../server"):
            assert http.get(path).status_code == 401
    with server.http() as http:
        for path in ("/docs", "/openapi.json", "/v1/jobs/a/b/c"):
            assert http.get(path).status_code == 404


def test_a_name_that_is_in_use_is_refused_at_once(server, folder):
    from rlalign import serve
    from rlalign.rollout.server.connection import ConnectionFileError

    with pytest.raises(ConnectionFileError, match=f"process {server.process.pid} serves"):
        serve(str(folder), [f"name={server.connection}"])
    assert json.loads(server.connection.read_text())["pid"] == server.process.pid


def test_the_tokens_are_the_owners_alone(server):
    assert server.connection.stat().st_mode & 0o777 == 0o600
    assert server.connection.stat().st_uid == os.getuid()
    assert len(set(server.tokens.values())) == 3
    assert all(len(token) >= 40 for token in server.tokens.values())


BAD_BODIES = [
    (b"{", "Invalid JSON"),
    (b"[]", "object"),
    (b'{"params": {"max_completion_length": 4}}', "requests"),
    ({"params": {"max_completion_length": -1}}, "params.max_completion_length"),
    ({"params": {"max_completion_length": "4"}}, "params.max_completion_length"),
    ({"params": {"max_completion_length": 4, "temperature": 9}}, "params.temperature"),
    ({"requests": [{"ids": [], "seeds": [1]}]}, "requests.0.ids"),
    ({"requests": [{"ids": [-1], "seeds": [1]}]}, "requests.0.ids.0"),
    ({"requests": [{"ids": [1.5], "seeds": [1]}]}, "requests.0.ids.0"),
    ({"requests": [{"ids": [1], "seeds": [2**63]}]}, "requests.0.seeds.0"),
    ({"adapter": "unknown"}, "adapter"),
]


@pytest.mark.parametrize(("body", "reason"), BAD_BODIES, ids=[r for _, r in BAD_BODIES])
def test_bad_input_is_refused_with_the_reason(server, tokenizer, body, reason):
    good = {"requests": [{"ids": [1], "seeds": [1]}], "params": {"max_completion_length": 4}}
    content = body if isinstance(body, bytes) else json.dumps({**good, **body}).encode()
    with server.client(tokenizer) as engine, server.http() as http:
        answer = http.post(f"{engine._job}/draw", content=content)
        assert answer.status_code == 400 and reason in answer.json()["error"]
        assert http.post(f"{engine._job}/draw", json=good).status_code == 200


def test_a_body_that_is_too_large_is_refused_with_and_without_a_length(server):
    token = server.tokens["job"]
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(f"{head}Content-Length: {65 * 2**20}\r\n\r\n".encode())
        assert b" 413 " in sock.recv(1000)

    def pieces():
        for _ in range(80):
            yield b" " * 2**20

    with server.http() as http:
        with contextlib.suppress(httpx.TransportError):  # the door was shut while we talked on
            assert http.post("/v1/jobs", content=pieces()).status_code == 413
        assert http.get("/health").json() == {"status": "ok"}


def test_an_address_that_others_reach_needs_a_word_of_consent(folder):
    from rlalign import serve
    from rlalign.config import ConfigError

    with pytest.raises(ConfigError, match="allow_plain_http=true"):
        serve(str(folder), ["host=0.0.0.0"])
    with pytest.raises(ConfigError, match="no IP address"):
        serve(str(folder), ["host=localhost"])
