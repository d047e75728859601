"""Streams in OpenAI's format, as OpenAI's own client meets them: the text as it is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlalign.models.lora import adapter_config, adapter_weights
from rlalign.models.random import write_random_model
from rlalign.trainer.publish import publish
from tests.rollout.live_server import LiveServer
from tests.rollout.test_server import wait_until
from tests.rollout.test_server_lora import adapted

openai = pytest.importorskip("openai")

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

IDS = list(range(10, 50))
LENGTH = 500
ENDLESS = {"max_tokens": LENGTH, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return write_random_model(path, hidden=64, heads=2, kv_heads=1, max_positions=1024)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory) -> Iterator[LiveServer]:
    options = ("vllm.max_loras=2", "max_len=1024")
    server = LiveServer(folder, tmp_path_factory.mktemp("server"), *options)
    yield server
    assert server.close() == 0, server.log.read_text()


def test_a_stream_says_the_same_in_pieces(client, model):
    common = {
        "model": model,
        "n": 3,
        "seed": 5,
        "max_tokens": 80,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(prompt="Hello", logprobs=0, **common)
    texts, tokens, reasons, usage = ["", "", ""], ([], [], []), {}, None
    for part in client.completions.create(
        prompt="Hello", logprobs=0, stream=True, stream_options={"include_usage": True}, **common
    ):
        usage = part.usage
        for choice in part.choices:
            assert choice.index not in reasons
            said = choice.logprobs
            places = zip(said.tokens, said.text_offset, said.token_logprobs, strict=True)
            tokens[choice.index].extend(places)
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    for choice in whole.choices:
        said = choice.logprobs
        places = zip(said.tokens, said.text_offset, said.token_logprobs, strict=True)
        assert tokens[choice.index] == list(places)

    messages = [{"role": "user", "content": "Hello"}]
    texts, reasons = ["", "", ""], {}
    for part in client.chat.completions.create(messages=messages, stream=True, **common):
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


def test_the_first_words_come_while_the_rest_is_generated(server, client, model):
    messages = [{"role": "user", "content": "Hello"}]
    running, texts = [], []
    for part in client.chat.completions.create(
        model=model, messages=messages, stream=True, seed=2, **ENDLESS
    ):
        texts.append(part.choices[0].delta.content or "")
        if len(list(filter(None, texts))) == 1:
            running.append(server.state()["in_flight"])
    assert sum(map(bool, texts)) > 5
    assert running[0]


def test_a_stop_string_cuts_a_stream_where_it_cuts_an_answer(server, client, model):
    common = {"model": model, "prompt": IDS, "temperature": 0, **ENDLESS}
    [whole] = client.completions.create(**common).choices
    at = next(i for i in range(10, 60) if "\ufffd" not in whole.text[i : i + 3])
    common["stop"] = ["not in there", whole.text[at : at + 3]]
    cut = client.completions.create(**common)
    *parts, last = client.completions.create(
        stream=True, stream_options={"include_usage": True}, **common
    )
    assert "".join(part.choices[0].text for part in parts) == cut.choices[0].text
    assert parts[-1].choices[0].finish_reason == "stop" and last.usage == cut.usage
    wait_until(lambda: not server.state()["in_flight"])


def test_a_stream_goes_on_when_the_engine_is_killed(server, client, model):
    options = {"model": model, "prompt": IDS, "n": 40, "seed": 4, **ENDLESS}
    before = client.completions.create(**options)
    stream = client.completions.create(**options, stream=True)
    texts, restarts = [""] * 40, server.state()["restarts"]
    for i, part in enumerate(stream):
        for choice in part.choices:
            texts[choice.index] += choice.text
        if i == 100:
            server.kill_engine()
    assert texts == [choice.text for choice in before.choices]
    assert server.state()["restarts"] == restarts + 1


@pytest.mark.parametrize("in_flight", ["keep", "abort"])
def test_an_update_in_the_middle_of_a_stream(server, client, folder, tokenizer, in_flight):
    policies = [adapted(folder, seed) for seed in (1, 2)]
    with server.client(tokenizer, "moving", adapter=adapter_config(policies[0])) as engine:
        publish(engine, adapter_weights(policies[0]), 1)
        stream = client.completions.create(model="moving", prompt=IDS, n=8, stream=True, **ENDLESS)
        choices = [next(stream).choices[0]]
        engine.update_weights(adapter_weights(policies[1]), 2, in_flight)
        choices += [choice for part in stream for choice in part.choices]
    last = {choice.index: choice for choice in choices if choice.finish_reason}
    reason = "length" if in_flight == "keep" else "abort"
    assert [last[i].finish_reason for i in range(8)] == [reason] * 8
    assert {choice.policy_version for choice in last.values()} == {2 if in_flight == "keep" else 1}
    assert choices[0].policy_version == 1 and choices[0].finish_reason is None
