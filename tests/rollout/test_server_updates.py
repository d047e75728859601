"""Weights that change while sequences run: each token is of the version that it says, and as likely
as that version's trainer finds it."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlalign.models.lora import adapter_config, adapter_weights
from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams
from rlalign.types import FINISH_ABORT, FINISH_LENGTH, Sample
from tests.rollout.live_server import LiveServer
from tests.rollout.test_server import moved
from tests.rollout.test_server_lora import adapted

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

LENGTH = 110
PARAMS = SamplingParams(LENGTH, ignore_eos=True)
# 16 run together and as many wait in the engine; the others have not come so far.
REQUESTS = [GenerateRequest(f"p{i}", (5, 6, 7 + i), seeds=(1, 2, 3, 4)) for i in range(24)]


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory) -> Iterator[LiveServer]:
    server = LiveServer(folder, tmp_path_factory.mktemp("server"), "vllm.max_loras=2")
    yield server
    assert server.close() == 0, server.log.read_text()


@torch.no_grad()
def logp_of(model, prompt: tuple[int, ...], sample: Sample) -> torch.Tensor:
    """Of the completion's tokens."""
    ids = torch.tensor([prompt + sample.token_ids])
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def draw_during(engine, server, action) -> list[list[Sample]]:
    """A batch; `action` is called when some of it is drawn."""
    drawn: list[list[list[Sample]]] = []
    thread = threading.Thread(target=lambda: drawn.append(engine.generate(REQUESTS, PARAMS)))
    before = server.state()["generated_tokens"]
    thread.start()
    deadline = time.monotonic() + 30
    while server.state()["in_flight"] == 0 and server.state()["generated_tokens"] == before:
        assert time.monotonic() < deadline
    time.sleep(0.1)
    action()
    thread.join(60)
    assert drawn, "the batch did not come back"
    return drawn[0]


def check_tokens(groups: list[list[Sample]], models: dict) -> None:
    """Every token's log-prob is that of the model of its version, and no other's."""
    [first, *others] = models.values()
    for other in others:
        sample = next(sample for group in groups for sample in group if sample.token_ids)
        ids = REQUESTS[0].token_ids
        assert (logp_of(first, ids, sample) - logp_of(other, ids, sample)).abs().max() > 0.01
    for request, group in zip(REQUESTS, groups, strict=True):
        for sample in group:
            assert sum(span.num_tokens for span in sample.spans) == len(sample.token_ids)
            first = 0
            for span in sample.spans:
                at = slice(first, first + span.num_tokens)
                expected = logp_of(models[span.version], request.token_ids, sample)[at]
                got = torch.tensor(sample.logp)[at]
                assert (got - expected).abs().max() < 1e-3
                first += span.num_tokens


def versions(groups: list[list[Sample]]) -> list[tuple[int, ...]]:
    return [tuple(span.version for span in sample.spans) for group in groups for sample in group]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_kept_sequences_go_on_under_the_new_weights(server, folder, tokenizer, kind):
    make = moved if kind == "full" else adapted
    models = {version: make(folder, version) for version in (1, 2, 3)}
    config = None if kind == "full" else adapter_config(models[1])
    with server.client(tokenizer, kind, config, in_flight="keep") as engine:
        weights = adapter_weights if engine.capabilities.adapter_only else named_parameters
        engine.update_weights(weights(models[1]), 1)

        def update_twice() -> None:
            engine.update_weights(weights(models[2]), 2)
            time.sleep(0.1)
            engine.update_weights(weights(models[3]), 3)

        groups = draw_during(engine, server, update_twice)
        assert all(len(s.token_ids) == LENGTH for group in groups for s in group)
        assert any(len(spans) > 1 for spans in versions(groups))
        assert all(list(spans) == sorted(spans) for spans in versions(groups))
        check_tokens(groups, models)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_aborted_sequences_come_back_with_what_they_have(server, folder, tokenizer, kind):
    make = moved if kind == "full" else adapted
    models = {version: make(folder, version) for version in (1, 2)}
    config = None if kind == "full" else adapter_config(models[1])
    with server.client(tokenizer, kind, config) as engine:
        weights = adapter_weights if engine.capabilities.adapter_only else named_parameters
        engine.update_weights(weights(models[1]), 1)
        groups = draw_during(
            engine, server, lambda: engine.update_weights(weights(models[2]), 2, "abort")
        )
        samples = [sample for group in groups for sample in group]
        ended = [sample for sample in samples if sample.finish_reason == FINISH_ABORT]
        lengths = [len(sample.token_ids) for sample in ended]
        assert 0 in lengths and 0 < max(lengths) < LENGTH
        # The first ones may be whole before the update has arrived.
        whole = [sample for sample in samples if sample not in ended]
        assert {len(sample.token_ids) for sample in whole} <= {LENGTH}
        assert set(versions(groups)) == {(), (1,)}
        check_tokens(groups, models)
        again = engine.generate(REQUESTS, PARAMS)
        assert set(versions(again)) == {(2,)}
        check_tokens(again, models)


def test_an_update_that_waits_leaves_every_sequence_with_one_version(server, folder, tokenizer):
    models = {version: moved(folder, version) for version in (1, 2)}
    with server.client(tokenizer) as engine:
        engine.update_weights(models[1].named_parameters(), 1)
        groups = draw_during(
            engine, server, lambda: engine.update_weights(models[2].named_parameters(), 2)
        )
        assert set(versions(groups)) == {(1,), (2,)}  # those that had waited are of the new one
        check_tokens(groups, models)


def test_a_refused_update_disturbs_nothing_that_runs(server, folder, tokenizer):
    model = moved(folder, 1)
    with server.client(tokenizer) as engine:
        engine.update_weights(model.named_parameters(), 1)
        bad = {name: torch.full_like(p, torch.nan) for name, p in model.named_parameters()}

        def refused() -> None:
            with pytest.raises(EngineError, match="not finite"):
                engine.update_weights(bad.items(), 2, "keep")

        groups = draw_during(engine, server, refused)
        assert set(versions(groups)) == {(1,)}
        assert all(s.finish_reason == FINISH_LENGTH for group in groups for s in group)
        check_tokens(groups, {1: model})


def named_parameters(model):
    return model.named_parameters()
