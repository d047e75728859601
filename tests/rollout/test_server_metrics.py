"""What the server tells of itself: Prometheus' metrics, its state, and the page that shows it."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlalign.models.lora import adapter_config, adapter_weights
from rlalign.rollout.engine import GenerateRequest, SamplingParams
from rlalign.rollout.server.page import PAGE
from rlalign.trainer.publish import publish
from tests.rollout.live_server import LiveServer
from tests.rollout.test_server import wait_until
from tests.rollout.test_server_lora import adapted

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

REQUEST = GenerateRequest("p", (5, 6, 7), seeds=(1, 2, 3))
PARAMS = SamplingParams(20, ignore_eos=True)
POLICY = "content-security-policy"
HOSTILE = 'a "job"\\with\n<b>everything</b>'


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory) -> Iterator[LiveServer]:
    server = LiveServer(folder, tmp_path_factory.mktemp("server"), "vllm.max_loras=2")
    yield server
    assert server.close() == 0, server.log.read_text()


def scraped(server: LiveServer) -> dict[tuple[str, ...], float]:
    """(name, values of the labels by the labels' names...) to value."""
    with server.http("generate") as http:
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name.removeprefix("rlalign_server_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_counts_go_by_name_and_outlive_the_lease(server, folder, tokenizer):
    model = adapted(folder, 1)
    for lease in (1, 2):
        with server.client(tokenizer, HOSTILE, adapter=adapter_config(model)) as engine:
            publish(engine, adapter_weights(model), lease + 4)
            engine.generate([REQUEST], PARAMS)
            engine.score([[1, 2, 3]])
            now = scraped(server)
            [job] = server.state()["jobs"]
            assert now["policy_version", job["id"], HOSTILE] == lease + 4
            assert now["jobs", "lora"] == 1 and now["jobs", "full"] == 0
            assert now["generated_tokens_total", HOSTILE] == 60 * lease
            assert now["sequences_total", HOSTILE] == 4 * lease
    now = scraped(server)
    assert now["generated_tokens_total", HOSTILE] == 120
    assert now["weight_updates_total",] == 2 and now["jobs", "lora"] == 0
    assert not any(name == "policy_version" for name, *_ in now)


def test_requests_without_a_job_are_counted_too(server, folder):
    before = scraped(server).get(("generated_tokens_total", "openai"), 0)
    body = {"model": str(folder), "prompt": "x", "n": 3, "max_tokens": 7, "ignore_eos": True}
    with server.http("generate") as http:
        assert http.post("/v1/completions", json=body).status_code == 200
    assert scraped(server)["generated_tokens_total", "openai"] == before + 21


def test_the_state_of_the_engine_is_told_while_it_is_away(server):
    before = scraped(server)
    assert before["engine_up",] == 1 and before["in_flight_sequences",] == 0
    server.kill_engine()
    wait_until(lambda: scraped(server)["engine_up",] == 0)
    assert scraped(server)["engine_restarts_total",] == before["engine_restarts_total",] + 1
    wait_until(lambda: scraped(server)["engine_up",] == 1, 60)


def test_what_waits_and_what_runs_adds_up(server, folder):
    body = {
        "model": str(folder), "prompt": "x", "n": 1000, "max_tokens": 100, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip
    with (
        server.http("generate") as http,
        http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()  # kept: the answer would be closed with it
        next(lines)
        now = scraped(server)
        assert now["in_flight_sequences",] == 32  # twice max_num_seqs
        assert 500 < now["waiting_sequences",] < 1000
    wait_until(lambda: scraped(server)["in_flight_sequences",] == 0)


# --- the page ------------------------------------------------------------------------------------


def test_the_page_is_open_and_empty_and_may_run_nothing_but_itself(server):
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        answer = http.get("/")
    assert answer.status_code == 200 and answer.text == PAGE.read_text()
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    policy = dict(part.split(" ", 1) for part in answer.headers[POLICY].split("; "))
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        before, _, rest = answer.text.partition(f"<{tag}>")
        inside, _, after = rest.partition(f"</{tag}>")
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
        assert f"<{tag}" not in before + after
    assert policy["default-src"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for loaded in ("http:", "https:", "src=", "href=", "@import", "url(", "innerHTML", "eval("):
        assert loaded not in answer.text
    assert not re.search(r"<[^>]+ (on\w+|style)=", answer.text)
    assert not any(token in answer.text for token in server.tokens.values())


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_page_shows_the_state_to_those_who_have_a_token(server, tokenizer, folder):
    model, script = adapted(folder, 2), Path(__file__).with_name("status_page.js")
    with server.client(tokenizer, HOSTILE, adapter=adapter_config(model)) as engine:
        receipt = publish(engine, adapter_weights(model), 7)
        engine.generate([REQUEST], PARAMS)
        state = server.state()
        out = subprocess.run(
            ["node", script, server.url, server.tokens["generate"], PAGE],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
    good, bad, typed = json.loads(out)
    for page in (good, typed):
        [[name, kind, version, digest, tokens, left]] = page["jobs"]
        assert (name, kind, version, tokens) == (HOSTILE, "lora", "7", "60")
        assert receipt.digest.startswith(digest) and len(digest) == 12
        assert 0 < int(left.removesuffix(" s")) <= 60
        assert page["tokens"].replace(" ", "") == str(state["generated_tokens"])
        assert page["engine"] == "up" and page["speed"] == "0" and page["problem"] == ""
        assert page["restarts"] == str(state["restarts"])
        assert page["open"] == ["state"] and page["stored"] == [server.tokens["generate"]]
    assert good["urls"] == ["/"] and not typed["urls"]
    assert bad["open"] == ["login"] and not bad["stored"] and not bad["jobs"]
    assert "does not know this token" in bad["problem"] and bad["model"] == ""


def test_the_address_of_the_page_is_printed_and_no_token(server):
    log = server.log.read_text()
    assert f"status page: {server.url}/#token=TOKEN" in log
    assert not any(token in log for token in server.tokens.values())
