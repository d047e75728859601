"""Several jobs at once on one server, each with its own LoRA adapter over the same model."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlalign.config.schema import LoraConfig
from rlalign.models.lora import adapter_config, adapter_weights, attach_lora
from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams
from rlalign.trainer.publish import WeightSyncError, check_engine, publish
from tests.rollout.live_server import LiveServer

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

IDS = list(range(10, 50))
PARAMS = SamplingParams(24, ignore_eos=True)
REQUESTS = [GenerateRequest(f"p{i}", (5, 6, 7 + i), seeds=tuple(range(4))) for i in range(4)]


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory) -> Iterator[LiveServer]:
    server = LiveServer(folder, tmp_path_factory.mktemp("server"), "vllm.max_loras=2")
    yield server
    assert server.close() == 0, server.log.read_text()


def adapted(folder: Path, seed: int, rank: int = 8):
    """The model with an adapter that does something."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    attach_lora(model, LoraConfig(rank=rank, alpha=16), seed)
    move(model, seed)
    return model


def move(model, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _, weight in adapter_weights(model):
        weight.copy_(0.1 * torch.randn(weight.shape, generator=rng))


@torch.no_grad()
def logp_of(model, ids) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def assert_made_by(model, groups, requests, version: int) -> None:
    """Every sample's log-probs are those of `model`, and its version is `version`."""
    for request, samples in zip(requests, groups, strict=True):
        for sample in samples:
            ids = [*request.token_ids, *sample.token_ids]
            want = logp_of(model, ids)[len(request.token_ids) - 1 :]
            torch.testing.assert_close(torch.tensor(sample.logp), want, atol=1e-4, rtol=0)
            assert [span.version for span in sample.spans] == [version]


def test_two_jobs_at_once_are_each_their_own_policy_through_every_update(server, folder, tokenizer):
    problems: list[BaseException] = []

    def job(seed: int, model) -> None:
        try:
            with server.client(tokenizer, f"job {seed}", adapter=adapter_config(model)) as engine:
                for version in range(1, 5):
                    move(model, 100 * seed + version)
                    publish(engine, adapter_weights(model), version)
                    check_engine(engine, IDS, logp_of(model, IDS), 1e-3)
                    assert_made_by(model, engine.generate(REQUESTS, PARAMS), REQUESTS, version)
        except BaseException as error:
            problems.append(error)

    jobs = [threading.Thread(target=job, args=(seed, adapted(folder, seed))) for seed in (1, 2)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join(120)
    assert not problems, problems


def test_a_job_without_an_update_yet_samples_from_the_base_model(server, folder, tokenizer):
    model = adapted(folder, 3)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    with server.client(tokenizer, adapter=adapter_config(model)) as engine:
        assert_made_by(base, engine.generate(REQUESTS, PARAMS), REQUESTS, version=0)


def test_what_is_in_flight_ends_under_the_policy_it_began_with(server, folder, tokenizer):
    old, new = adapted(folder, 4), adapted(folder, 5)
    requests = [GenerateRequest("p", (5, 6), seeds=tuple(range(16)))]
    params = SamplingParams(120, ignore_eos=True)
    with server.client(tokenizer, adapter=adapter_config(old)) as engine:
        publish(engine, adapter_weights(old), 1)
        result: list = []
        thread = threading.Thread(target=lambda: result.append(engine.generate(requests, params)))
        thread.start()
        while not server.state()["in_flight"]:
            time.sleep(0.005)
        publish(engine, adapter_weights(new), 2)
        assert thread.is_alive()
        assert_made_by(new, engine.generate(REQUESTS, PARAMS), REQUESTS, version=2)
        thread.join(60)
        assert_made_by(old, result[0], requests, version=1)


def test_adapters_come_back_after_the_engine_was_killed(server, folder, tokenizer):
    models = [adapted(folder, 6), adapted(folder, 7)]
    engines = [
        server.client(tokenizer, f"{i}", adapter=adapter_config(m)) for i, m in enumerate(models)
    ]
    for engine, model in zip(engines, models, strict=True):
        publish(engine, adapter_weights(model), 9)
    server.kill_engine()
    for engine, model in zip(engines, models, strict=True):
        assert_made_by(model, engine.generate(REQUESTS, PARAMS), REQUESTS, version=9)
        engine.close()


def test_places_are_counted_and_given_back(server, folder, tokenizer):
    config = adapter_config(adapted(folder, 8))
    with (
        server.client(tokenizer, "a", adapter=config),
        server.client(tokenizer, "b", adapter=config),
    ):
        with pytest.raises(EngineError, match="has an adapter's place"):
            server.client(tokenizer, "c", adapter=config)
        with pytest.raises(EngineError, match="has the server's weights"):
            server.client(tokenizer, "d")
    with server.client(tokenizer, "d") as engine:
        assert not engine.capabilities.adapter_only


def test_adapters_that_do_not_fit_are_refused_and_the_old_one_stays(server, folder, tokenizer):
    model = adapted(folder, 9)
    with server.client(tokenizer, adapter=adapter_config(model)) as engine:
        publish(engine, adapter_weights(model), 1)
        with pytest.raises(EngineError, match="not finite"):
            bad = {n: torch.full_like(w, torch.nan) for n, w in adapter_weights(model)}
            engine.update_weights(bad.items(), 2)
        engine._channel._adapter = {**engine._channel._adapter, "r": 64}
        with pytest.raises(EngineError, match=r"vLLM refuses the adapter.*max_lora_rank=16"):
            engine.update_weights(adapter_weights(adapted(folder, 9, rank=64)), 2)
        assert_made_by(model, engine.generate(REQUESTS, PARAMS), REQUESTS, version=1)


def test_an_adapter_that_is_changed_on_its_way_is_found_out_with_both_digests(
    server, folder, tokenizer, monkeypatch
):
    model = adapted(folder, 10)
    with server.client(tokenizer, adapter=adapter_config(model)) as engine:
        call = engine._call

        def tampering(method, path, body=None, **options):
            if path.endswith("/weights"):
                file = engine._channel._spool / str(body["version"]) / "adapter_model.safetensors"
                tensors = load_file(file)
                next(iter(tensors.values()))[0, 0] += 1e-3
                save_file(tensors, file)
            return call(method, path, body, **options)

        monkeypatch.setattr(engine, "_call", tampering)
        with pytest.raises(
            WeightSyncError, match=r"version 1 with digest .* version 1 with digest"
        ):
            publish(engine, adapter_weights(model), 1)
