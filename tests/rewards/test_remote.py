import asyncio
import socket
import time

import pytest

from rlalign.rewards.remote import http
from rlalign.rewards.verdict import RewardError, VerdictKind


def ask(reward, count=1, **columns):
    completions = [f"c{i}" for i in range(count)]
    return asyncio.run(reward(prompts=["p"] * count, completions=completions, **columns))


def lengths(body):
    return 200, {"rewards": [len(c) for c in body["completions"]]}, {}


def test_batches_keep_order_columns_and_nulls(service):
    def answer(body):
        values = [None if n == 3 else n for n in body["number"]]
        return 200, values, {}

    one = service(answer)
    verdicts = ask(http(one.url, batch_size=2), 5, number=[1, 2, 3, 4, 5], completion_ids=[[1]] * 5)
    assert [v.value for v in verdicts] == [1, 2, None, 4, 5]
    assert sorted(len(body["completions"]) for body in one.bodies) == [1, 2, 2]
    assert set(one.bodies[0]) == {"prompts", "completions", "number"}


def test_only_the_named_columns_are_sent(service):
    one = service(lengths)
    ask(http(one.url, columns=["answer"]), answer=["a"], private=["b"])
    assert set(one.bodies[0]) == {"prompts", "completions", "answer"}
    assert http(one.url, columns=["answer"]).required_columns == ("answer",)  # type: ignore[attr-defined]


def test_passing_errors_are_tried_again(service):
    statuses = iter([503, 429, 500, 200])
    one = service(lambda body: (next(statuses), {"rewards": [0.5]}, {}))
    assert ask(http(one.url))[0].value == 0.5
    assert len(one.bodies) == 4


def test_retry_after_is_obeyed(service):
    answers = iter([(429, "", {"Retry-After": "1"}), (200, [1], {})])
    one = service(lambda body: next(answers))
    start = time.monotonic()
    assert ask(http(one.url))[0].value == 1.0
    assert time.monotonic() - start >= 1.0


def test_a_refusal_is_a_crash_at_once_with_what_the_service_said(service):
    one = service(lambda body: (401, "bad key", {}))
    (verdict,) = ask(http(one.url))
    assert verdict.kind is VerdictKind.CRASH
    assert "HTTP 401: bad key" in verdict.detail
    assert len(one.bodies) == 1


def test_a_service_out_of_reach_is_a_crash_with_its_cause():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (verdict,) = ask(http(f"http://127.0.0.1:{port}", attempts=2))
    assert verdict.kind is VerdictKind.CRASH
    assert "failed 2 times" in verdict.detail
    assert "ConnectError" in verdict.detail


@pytest.mark.parametrize(
    "content", ["not json", {"scores": [1]}, {"rewards": [1, 2]}, {"rewards": ["high"]}, "3"]
)
def test_an_answer_that_cannot_be_read_is_invalid(service, content):
    one = service(lambda body: (200, content, {}))
    assert ask(http(one.url))[0].kind is VerdictKind.INVALID


def test_what_is_late_is_a_timeout_and_what_came_is_kept(service):
    def answer(body):
        if body["completions"] == ["c1"]:
            time.sleep(2)
        return lengths(body)

    one = service(answer)
    start = time.monotonic()
    verdicts = ask(http(one.url, batch_size=1, deadline_s=0.7), 3)
    assert time.monotonic() - start < 1.9
    assert [v.kind.value for v in verdicts] == ["ok", "timeout", "ok"]


def test_concurrency_is_used_and_bounded(service):
    def answer(body):
        time.sleep(0.1)
        return lengths(body)

    one = service(answer)
    ask(http(one.url, batch_size=1, concurrency=3), 9)
    assert one.peak == 3


def test_the_key_comes_from_the_environment(service, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "k1")
    one = service(lengths)
    ask(http(one.url, api_key_env="REWARD_KEY"))
    assert one.headers[0]["Authorization"] == "Bearer k1"
    with pytest.raises(RewardError, match=r"'NO_SUCH_KEY'.*is not set"):
        http(one.url, api_key_env="NO_SUCH_KEY")


def test_an_address_without_scheme_is_refused():
    with pytest.raises(RewardError, match="not an http"):
        http("localhost:8000")
