"""Models called NAME@METHOD of a real server, as OpenAI's own client meets them."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from transformers import AutoModelForCausalLM

from rlalign.models.lora import adapter_config, adapter_weights
from rlalign.models.random import write_random_model
from rlalign.rollout.engine import GenerateRequest, SamplingParams
from rlalign.rollout.search_hf import HFSearch
from rlalign.testtime.latent_seek import latent_seek
from rlalign.testtime.rewards import FunctionReward
from rlalign.trainer.publish import publish
from tests.rollout.live_server import LiveServer
from tests.rollout.search_methods import variety
from tests.rollout.test_server import wait_until
from tests.rollout.test_server_lora import adapted

openai = pytest.importorskip("openai")

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

REWARDS = "testtime.rewards=[{name: variety, function: 'tests.rollout.search_methods:variety'}]"
QUESTION = "What is 3 + 4?"
HELLO = [{"role": "user", "content": QUESTION}]
CLIMB = {"rho": 0.6, "lr": 2.0, "max_steps": 4, "tau": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return write_random_model(path, hidden=64, heads=2, kv_heads=1, max_positions=4096)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory) -> Iterator[LiveServer]:
    options = ("vllm.max_loras=2", "max_len=4096", "max_queued=64", REWARDS)
    server = LiveServer(folder, tmp_path_factory.mktemp("server"), *options)
    yield server
    assert server.close() == 0, server.log.read_text()


def ask(client, model: str, length: int = 12, seed: int = 1, **testtime):
    given = {"extra_body": {"testtime": testtime}} if testtime else {}
    return client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=length, seed=seed, **given
    )


def sought(policy, tokenizer, length: int):
    """What LatentSeek finds on transformers, in this process."""
    engine = HFSearch(policy, tokenizer)
    with FunctionReward(variety) as reward:
        [result] = latent_seek(
            engine, [{"messages": HELLO}], reward, max_new_tokens=length, **CLIMB
        )
    return result


def test_the_methods_are_listed(client, model):
    names = [m.id for m in client.models.list()]
    methods = ("best-of-8", "majority-8", "latent-seek", "rain")
    assert names == [model, *(f"{model}@{method}" for method in methods)]
    assert client.models.retrieve(f"{model}@best-of-3").id == f"{model}@best-of-3"


def test_every_method_answers_a_plain_request(client, model):
    """Self-rewards and all, of an unmodified client."""
    for method in ("best-of-2", "majority-3", "latent-seek", "rain"):
        budgets = {} if method == "majority-3" else {"max_tokens": 200}
        answer = ask(client, f"{model}@{method}", length=6, **budgets)
        [choice] = answer.choices
        assert choice.message.role == "assistant" and choice.message.content
        account = choice.testtime
        assert answer.usage.completion_tokens == account["num_generated_tokens"] > 6
        hidden = answer.usage.completion_tokens_details.reasoning_tokens
        assert answer.usage.completion_tokens - 6 <= hidden < answer.usage.completion_tokens
        assert account["num_engine_calls"] > 0 and account["policy_versions"] == [0]


def test_latent_seek_is_that_of_transformers_token_for_token(client, folder, tokenizer, model):
    want = sought(AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer, 24)
    answer = ask(client, f"{model}@latent-seek", length=24, reward="variety", **CLIMB)
    [choice] = answer.choices
    assert choice.message.content == want.text
    account = choice.testtime
    assert want.counters["steps"] > 1
    assert account["reward"] == pytest.approx(want.reward)
    assert account["counters"] == want.counters
    assert account["num_generated_tokens"] == want.num_generated_tokens


def test_a_search_on_a_jobs_name_is_one_of_its_adapter(server, client, folder, tokenizer, model):
    policy = adapted(folder, 5)
    with server.client(tokenizer, "run/a", adapter=adapter_config(policy)) as engine:
        publish(engine, adapter_weights(policy), 3)
        answer = ask(client, "run/a@latent-seek", length=24, reward="variety", **CLIMB)
        assert answer.choices[0].message.content == sought(policy, tokenizer, 24).text
        assert answer.choices[0].testtime["policy_versions"] == [3]
        base = ask(client, f"{model}@latent-seek", length=24, reward="variety", **CLIMB)
        assert answer.choices[0].message.content != base.choices[0].message.content
        assert "run/a@rain" in {m.id for m in client.models.list()}
    with pytest.raises(openai.NotFoundError, match="no model 'run/a'"):
        ask(client, "run/a@latent-seek")


def test_best_of_n_is_the_best_of_its_samples(client, model):
    """The same seed draws the same samples, however many there are."""

    def best(count: int) -> float:
        answer = ask(client, f"{model}@best-of-{count}", reward="variety")
        text = answer.choices[0].message.content
        assert variety([""], [text]) == [answer.choices[0].testtime["reward"]]
        return answer.choices[0].testtime["reward"]

    rewards = [best(count) for count in (1, 2, 4, 8)]
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1]
    plain = client.chat.completions.create(model=model, messages=HELLO, max_tokens=12, seed=1)
    one = ask(client, f"{model}@best-of-1", reward="variety")
    assert one.choices[0].message.content == plain.choices[0].message.content


def test_a_budget_ends_with_the_best_so_far_and_says_so(client, model):
    for method, budget in (
        ("rain", {"max_total_searches": 2}), ("rain", {"max_tokens": 30}),
        ("rain", {"max_wall_s": 0.05}), ("best-of-8", {"max_tokens": 20}),
    ):  # fmt: skip
        answer = ask(client, f"{model}@{method}", reward="variety", **budget)
        [choice] = answer.choices
        assert choice.finish_reason == choice.testtime["stop_reason"] == next(iter(budget))
        assert choice.message.content


def test_a_stream_gives_the_same_answer_after_signs_of_life(client, model):
    options = {"reward": "variety", "max_total_searches": 30}
    whole = ask(client, f"{model}@rain", length=20, **options)
    stream = client.chat.completions.create(
        model=f"{model}@rain", messages=HELLO, max_tokens=20, seed=1, stream=True,
        stream_options={"include_usage": True}, extra_body={"testtime": options},
    )  # fmt: skip
    parts, usage = [], None
    for event in stream:
        parts += event.choices
        usage = event.usage or usage
    text = "".join(part.delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert [part.finish_reason for part in parts if part.finish_reason] == ["max_total_searches"]
    assert usage == whole.usage
    assert parts[-1].testtime["counters"] == whole.choices[0].testtime["counters"]


def test_completions_take_prompts_as_text_and_as_ids(client, tokenizer, model):
    def texts(prompt):
        answer = client.completions.create(
            model=f"{model}@best-of-2", prompt=prompt, max_tokens=12, seed=4,
            extra_body={"testtime": {"reward": "variety"}},
        )  # fmt: skip
        return [choice.text for choice in answer.choices]

    ids = tokenizer(QUESTION)["input_ids"]
    assert texts(QUESTION) == texts(ids) == texts([QUESTION])
    two = texts([QUESTION, ids])
    assert two[0] == texts(QUESTION)[0] and len(set(two)) == 2  # each prompt has draws of its own


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"n": 2}, "n=2: not with rain"),
        ({"stop": "x"}, "stop: not with rain"),
        ({"temperature": 0.7}, "temperature: rain does not sample"),
        ({"extra_body": {"testtime": {"q": 5}}}, "unknown config key 'q'"),
        ({"extra_body": {"testtime": {"max_searches": -1}}}, "max_searches = -1"),
        ({"extra_body": {"testtime": {"reward": "os:abort"}}}, "this server has self, variety"),
        ({"extra_body": {"testtime": {"max_wall_s": 1e9}}}, "testtime.max_search_s"),
        ({"extra_body": {"testtime": {"set_lengths": []}}}, "set_lengths"),
    ],
)
def test_bad_parameters_are_named_in_the_clients_format(client, model, options, reason):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=reason) as refused:
            client.chat.completions.create(
                model=f"{model}@rain", messages=HELLO, stream=stream, **options
            )
        assert refused.value.code == "invalid_request"


def test_a_search_that_is_too_wide_is_refused_with_429(client, model):
    with pytest.raises(openai.RateLimitError, match="max_queued=64"):
        ask(client, f"{model}@best-of-65", reward="variety")


def test_searches_and_plain_requests_run_side_by_side(client, model):
    """And find what they find alone."""
    wishes = [("rain", {"max_total_searches": 8}), ("latent-seek", CLIMB), ("best-of-4", {}), None]

    def one(wish) -> str:
        if wish is None:
            answer = client.chat.completions.create(
                model=model, messages=HELLO, max_tokens=12, seed=1
            )
            return answer.choices[0].message.content
        method, options = wish
        answer = ask(client, f"{model}@{method}", reward="variety", **options)
        return answer.choices[0].message.content

    alone = [one(wish) for wish in wishes]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, wishes * 2)) == alone * 2


def test_a_job_is_not_held_up_by_searches(server, client, tokenizer, model):
    searching = threading.Thread(
        target=lambda: ask(
            client, f"{model}@rain", length=40, reward="variety", max_total_searches=60
        )
    )
    searching.start()
    wait_until(lambda: server.state()["searches"] == 1)
    began = time.monotonic()
    request = GenerateRequest("p", (5, 6), seeds=(1, 2))
    with server.client(tokenizer, "job", adapter=None) as engine:
        assert len(engine.generate([request], SamplingParams(8))[0]) == 2
    assert time.monotonic() - began < 5
    searching.join()


@pytest.mark.slow
def test_a_dead_engine_changes_no_answer(server, client, model):
    options = {"reward": "variety", "max_total_searches": 40}
    alone = [ask(client, f"{model}@rain", length=30, **options)]
    alone.append(ask(client, f"{model}@latent-seek", length=200, reward="variety", **CLIMB))
    restarts = server.state()["restarts"]
    with ThreadPoolExecutor(2) as pool:
        rain = pool.submit(ask, client, f"{model}@rain", length=30, **options)
        seek = pool.submit(
            ask, client, f"{model}@latent-seek", length=200, reward="variety", **CLIMB
        )
        wait_until(lambda: server.state()["searches"] == 2)
        server.kill_engine()
        again = [rain.result(), seek.result()]
    assert server.state()["restarts"] == restarts + 1
    for one, two in zip(alone, again, strict=True):
        assert one.choices[0].message.content == two.choices[0].message.content
        assert one.usage == two.usage


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_search(server, model, stream):
    body = {
        "model": f"{model}@rain", "messages": HELLO, "max_tokens": 2000, "stream": stream,
        "testtime": {"reward": "variety"},
    }  # fmt: skip
    with server.http("generate") as http, contextlib.suppress(httpx.ReadTimeout):  # noqa: SIM117
        with http.stream("POST", "/v1/chat/completions", json=body, timeout=1.5) as answer:
            next(answer.iter_lines())
    wait_until(lambda: server.state()["searches"] == 0)
    wait_until(lambda: not (server.state()["waiting"] or server.state()["in_flight"]))
