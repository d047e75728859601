"""The server's OpenAI routes, as OpenAI's own client meets them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlalign.models.lora import adapter_config, adapter_weights
from rlalign.models.random import write_random_model
from rlalign.rollout.engine import GenerateRequest, SamplingParams
from rlalign.trainer.publish import publish
from tests.rollout.live_server import LiveServer
from tests.rollout.test_server import moved, wait_until
from tests.rollout.test_server_lora import adapted, logp_of

openai = pytest.importorskip("openai")

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

IDS = list(range(10, 50))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory) -> Iterator[LiveServer]:
    server = LiveServer(folder, tmp_path_factory.mktemp("server"), "vllm.max_loras=2")
    yield server
    assert server.close() == 0, server.log.read_text()


def greedy(reference, ids: list[int], length: int) -> list[int]:
    ids = list(ids)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-length:]


GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def test_a_completion_is_the_models_own_with_its_log_probs(client, folder, tokenizer, model):
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    want = greedy(reference, IDS, 24)
    answer = client.completions.create(model=model, prompt=IDS, max_tokens=24, logprobs=0, **GREEDY)
    [choice] = answer.choices
    assert choice.text == tokenizer.decode(want, skip_special_tokens=True)
    assert choice.finish_reason == "length"
    logp = logp_of(reference, [*IDS, *want])[len(IDS) - 1 :]
    got = torch.tensor(choice.logprobs.token_logprobs)
    torch.testing.assert_close(got, logp, atol=1e-4, rtol=0)
    assert "".join(choice.logprobs.tokens) == choice.text
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (40, 24, 64)


def test_every_way_to_give_prompts_is_the_same_prompt(client, tokenizer, model):
    text = "What is 3 + 4?"
    ids = tokenizer(text)["input_ids"]

    def texts(prompt) -> list[str]:
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=12, seed=1, n=2, temperature=1.5
        )
        assert answer.usage.prompt_tokens == len(ids) * len(answer.choices) // 2
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    one = texts(text)
    assert len(set(one)) == 2
    assert texts(ids) == texts([text]) == texts([ids]) == one
    two = texts([text, "Another one."[: len(text)].ljust(len(text))])
    assert len(two) == 4 and two[:2] == one


def test_a_seed_repeats_and_none_does_not(client, model):
    def text(**options) -> str:
        prompt = "Once upon a time"
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=40, **options)
        return answer.choices[0].text

    assert text(seed=7) == text(seed=7) != text(seed=8)
    assert text() != text()


def test_chat_goes_through_the_template(client, tokenizer, model):
    messages = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("3 + ", "4")]},
    ]
    ids = tokenizer("Add.\n3 + 4")["input_ids"]
    raw = client.completions.create(model=model, prompt=ids, max_tokens=20, seed=3, n=2, logprobs=0)
    for length in ({"max_tokens": 20}, {"max_completion_tokens": 20}):
        chat = client.chat.completions.create(
            model=model, messages=messages, seed=3, n=2, logprobs=True, **length
        )
        assert chat.usage == raw.usage
        for mine, plain in zip(chat.choices, raw.choices, strict=True):
            assert mine.message.content == plain.text and mine.message.role == "assistant"
            assert mine.finish_reason == plain.finish_reason
            parts = mine.logprobs.content
            assert [part.logprob for part in parts] == plain.logprobs.token_logprobs
            spelled = b"".join(bytes(part.bytes) for part in parts)
            assert spelled.decode() == mine.message.content


def test_a_chat_fills_the_room_there_is_unless_told(client, model):
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Go"}], **GREEDY
    )
    assert answer.usage.total_tokens == 128 and answer.choices[0].finish_reason == "length"


def test_the_end_token_ends_and_is_no_text(client, tokenizer, model):
    answer = client.completions.create(
        model=model, prompt=IDS, max_tokens=80, n=40, seed=0, temperature=2, logprobs=0
    )
    ended = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert ended and len(ended) < 40
    assert all(tokenizer.eos_token not in choice.text for choice in answer.choices)
    for choice in answer.choices:
        assert (choice.finish_reason == "length") == (len(choice.logprobs.tokens) == 80)
    assert answer.usage.completion_tokens == sum(len(c.logprobs.tokens) for c in answer.choices)


def test_a_stop_string_cuts_text_tokens_and_usage(client, model):
    def ask(**options):
        return client.completions.create(
            model=model, prompt=IDS, max_tokens=60, logprobs=0, **GREEDY, **options
        )

    [whole] = ask().choices
    at = next(i for i in range(10, 50) if "\ufffd" not in whole.text[i : i + 3])
    stop = whole.text[at : at + 3]
    first = whole.text.index(stop)
    for stops in (stop, [stop], ["not in there", stop]):
        answer = ask(stop=stops)
        [choice] = answer.choices
        assert choice.text == whole.text[:first] and choice.finish_reason == "stop"
        kept = answer.usage.completion_tokens
        assert "".join(whole.logprobs.tokens[:kept]).endswith(stop)
        assert stop not in "".join(whole.logprobs.tokens[: kept - 1])
        assert choice.logprobs.token_logprobs == whole.logprobs.token_logprobs[:kept]
        assert "".join(choice.logprobs.tokens) == choice.text


# --- models --------------------------------------------------------------------------------------


def policies(client) -> list[str]:
    """Names of models that are no method on another."""
    return [m.id for m in client.models.list() if "@" not in m.id]


def test_the_served_model_has_the_weights_of_the_full_job_in_use(
    server, client, folder, tokenizer, model
):
    def text_and_version() -> tuple[str, int]:
        answer = client.completions.create(model=model, prompt=IDS, max_tokens=24, **GREEDY)
        return answer.choices[0].text, answer.choices[0].policy_version

    before = text_and_version()
    assert before[1] == 0
    trained = moved(folder, 3)
    want = tokenizer.decode(greedy(trained, IDS, 24), skip_special_tokens=True)
    with server.client(tokenizer, "trainer") as engine:
        publish(engine, trained.named_parameters(), 4)
        assert text_and_version() == (want, 4) != before
    assert text_and_version() == before


def test_jobs_with_adapters_are_models_by_name_and_by_id(server, client, folder, tokenizer, model):
    a, b = adapted(folder, 1), adapted(folder, 2)
    config = adapter_config(a)
    with (
        server.client(tokenizer, "run/a", adapter=config) as first,
        server.client(tokenizer, "run/b", adapter=config) as second,
    ):
        publish(first, adapter_weights(a), 1)
        publish(second, adapter_weights(b), 2)
        ids = {job["name"]: job["id"] for job in server.state()["jobs"]}
        assert set(policies(client)) == {model, "run/a", "run/b"}
        for name in (model, "run/a", ids["run/b"]):
            assert client.models.retrieve(name).id == name
        for policy, name in ((a, "run/a"), (b, "run/b"), (a, ids["run/a"])):
            answer = client.completions.create(model=name, prompt=IDS, max_tokens=24, **GREEDY)
            want = greedy(policy, IDS, 24)
            assert answer.choices[0].text == tokenizer.decode(want, skip_special_tokens=True)
            assert answer.choices[0].policy_version == (1 if policy is a else 2)
    with pytest.raises(openai.NotFoundError, match="no model 'run/a'; choose one of"):
        client.completions.create(model="run/a", prompt=IDS)


def test_two_jobs_of_one_name_are_told_apart_by_id(server, client, folder, tokenizer, model):
    config = adapter_config(adapted(folder, 1))
    with (
        server.client(tokenizer, "same", adapter=config),
        server.client(tokenizer, model, adapter=config),
        pytest.raises(openai.NotFoundError, match="no model 'other'"),
    ):
        ids = [job["id"] for job in server.state()["jobs"]]
        assert policies(client) == [model, "same", ids[1]]
        client.completions.create(model="other", prompt=IDS)
    with (
        server.client(tokenizer, "same", adapter=config),
        server.client(tokenizer, "same", adapter=config),
    ):
        ids = [job["id"] for job in server.state()["jobs"]]
        assert policies(client) == [model, *ids]
        with pytest.raises(openai.NotFoundError, match=f"2 jobs are called 'same'.*{ids[1]}"):
            client.completions.create(model="same", prompt=IDS)


def test_the_end_of_a_job_ends_what_samples_from_its_adapter(server, client, folder, tokenizer):
    config = adapter_config(adapted(folder, 1))
    with server.client(tokenizer, "short-lived", adapter=config):
        stream = client.completions.create(
            model="short-lived", prompt=IDS, n=500, max_tokens=80, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        next(iter(stream))
    with pytest.raises(openai.APIError, match="the job is over"):
        list(stream)


# --- refusals ------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello"}]
BAD = [
    ({"prompt": "x", "tools": [{}]}, "tools: this server does not do that; it takes"),
    ({"prompt": "x", "frequency_penalty": 0.5}, "frequency_penalty"),
    ({"prompt": "x", "echo": True}, "echo"),
    ({"prompt": "x", "logprobs": 2}, "logprobs=2 asks for other tokens"),
    ({"prompt": "x", "temperature": -1}, "temperature"),
    ({"prompt": "x", "temperature": 0.001}, "temperature 0.001"),
    ({"prompt": "x", "max_tokens": 500}, "longest sequence of 128"),
    ({"prompt": "x", "n": 0}, "n: "),
    ({"prompt": ["x"] * 1000, "n": 1000}, "prompts times n"),
    ({"prompt": "x", "stop": ""}, "stop.0"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream=true"),
    ({"prompt": []}, "at least one prompt"),
    ({"prompt": ""}, "has no tokens"),
    ({"prompt": [5, 100_000]}, "the model knows 0 to 261"),
    ({"prompt": 5}, "prompt"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"messages": HELLO, "top_logprobs": 3, "logprobs": True}, "top_logprobs=3 asks for other"),
    ({"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, "differ"),
    ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": HELLO, "user": "me"}, "user: this server does not do that"),
]


@pytest.mark.parametrize(("body", "reason"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_what_it_does_not_do_is_refused_and_never_ignored(server, model, body, reason):
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    with server.http("generate") as http:
        answer = http.post(path, json={"model": model, **body})
        error = answer.json()["error"]
    assert answer.status_code == 400 and reason in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")


def test_fields_that_ask_for_nothing_are_no_reason_to_refuse(client, model):
    answer = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=4, frequency_penalty=0.0, presence_penalty=0,
        logit_bias={}, tools=[], response_format={"type": "text"}, stop=None, top_logprobs=0,
    )  # fmt: skip
    assert answer.usage.completion_tokens <= 4


def test_errors_are_of_the_clients_own_kinds(server, client, model):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert caught.value.code == "model_not_found" and model in str(caught.value)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt/4o'") as unknown:
        client.models.retrieve("gpt/4o")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="Invalid JSON"):
        client.post("/completions", cast_to=object, options={}, content=b"{")
    wrong = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError) as locked:
        wrong.models.list()
    assert "a valid token is needed" in locked.value.body  # its text is the status alone


def test_a_model_without_a_chat_template_says_so(tmp_path):
    folder = write_random_model(tmp_path / "model", hidden=64, heads=2, kv_heads=1)
    for path in folder.glob("chat_template*"):
        path.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    server = LiveServer(folder, tmp_path)
    with server.http("generate") as http:
        body = {"model": str(folder), "messages": HELLO}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert "no chat template: use /v1/completions" in answer.json()["error"]["message"]
        body = {"model": str(folder), "prompt": "Hello"}
        assert http.post("/v1/completions", json=body).status_code == 200
    assert server.close() == 0


# --- life ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_takes_its_sequences_along(server, model, stream):
    body = {"model": model, "prompt": [5, 6], "n": 3000, "max_tokens": 100, "ignore_eos": True}
    body["stream"], before = stream, server.state()["generated_tokens"]
    with server.http("generate") as http, contextlib.suppress(httpx.ReadTimeout):  # noqa: SIM117
        with http.stream("POST", "/v1/completions", json=body, timeout=1) as answer:
            next(answer.iter_lines())
    wait_until(lambda: not (server.state()["waiting"] or server.state()["in_flight"]))
    assert server.state()["generated_tokens"] - before < 100_000  # of 300 000


def test_a_running_job_is_not_held_up_by_a_long_request(server, client, tokenizer, model):
    stream = client.completions.create(
        model=model, prompt=IDS, n=2000, max_tokens=80, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with server.client(tokenizer, "job") as engine:
        request = GenerateRequest("p", (5, 6), seeds=(1, 2))
        assert len(engine.generate([request], SamplingParams(8))[0]) == 2
        assert server.state()["waiting"] > 100
    stream.close()
