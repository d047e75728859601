"""What is vLLM's own: how it starts and stops, deadlines, failures inside, putting weights back.

What every engine must do is in conformance.py.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign.config.schema import RolloutConfig, VllmConfig
from rlalign.models.random import write_random_model
from rlalign.rollout import vllm_weights
from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams
from rlalign.rollout.vllm import VllmEngine

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

REQUEST = GenerateRequest("p", tuple(range(10, 50)), seeds=(1, 2, 3))
PARAMS = SamplingParams(16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return write_random_model(path, hidden=64, heads=2, kv_heads=1, max_positions=128)


def start(folder: Path, **options) -> VllmEngine:
    cfg = RolloutConfig(max_completion_length=32, vllm=VllmConfig(max_num_seqs=8, **options))
    return VllmEngine(str(folder), AutoTokenizer.from_pretrained(folder), cfg, max_prompt_length=96)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[VllmEngine]:
    with start(folder) as engine:
        yield engine


@pytest.fixture
def engine(shared: VllmEngine, folder: Path) -> VllmEngine:
    shared.update_weights(AutoModelForCausalLM.from_pretrained(folder).named_parameters(), 0)
    return shared


def tokens(engine: VllmEngine) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in engine.generate([REQUEST], PARAMS)[0]]


def test_one_engine_a_process(shared: VllmEngine, folder: Path):
    with pytest.raises(EngineError, match="close it first"):
        start(folder)


def test_progress_is_told_after_every_step(engine: VllmEngine):
    seen: list[tuple[int, int]] = []
    engine.generate([REQUEST], PARAMS, on_progress=lambda *counts: seen.append(counts))
    assert len(seen) == PARAMS.max_completion_length
    assert seen == sorted(seen)
    assert seen[-1] == (3, 3)


def test_a_deadline_ends_the_wait_by_name_and_the_engine_goes_on(engine, monkeypatch):
    before = tokens(engine)
    monkeypatch.setattr(engine._cfg, "timeout_s", 1e-9)
    with pytest.raises(EngineError, match=r"generating: 0 of 3 sequences.*timeout_s"):
        engine.generate([REQUEST], PARAMS)
    monkeypatch.undo()
    assert tokens(engine) == before


def test_an_interrupt_leaves_no_request_behind(engine: VllmEngine):
    before = tokens(engine)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([REQUEST], PARAMS, on_progress=interrupt)
    assert engine._stream.unfinished == 0
    assert tokens(engine) == before


def test_temperatures_that_vllm_would_change_silently_are_refused(engine: VllmEngine):
    for temperature in (0.001, 2.5, -1.0):
        with pytest.raises(EngineError, match="temperature"):
            engine.generate([REQUEST], SamplingParams(4, temperature=temperature))


def test_weights_that_are_not_finite_are_refused(engine: VllmEngine, folder: Path):
    before = tokens(engine)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 3] = torch.nan
    with pytest.raises(EngineError, match=r"embed_tokens\.weight are not finite"):
        engine.update_weights(model.named_parameters(), 5)
    assert tokens(engine) == before


def break_loading() -> None:
    """vLLM fails in the middle of its next load, with some layers on the new weights."""
    patch, load = pytest.MonkeyPatch(), vllm_weights.load

    def broken(vllm, weights):
        patch.undo()
        load(vllm, {**weights, "model.layers.1.mlp.down_proj.weight": torch.zeros(3, 3)})

    patch.setattr(vllm_weights, "load", broken)


def test_a_load_that_breaks_off_inside_vllm_is_rolled_back(engine: VllmEngine, folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before, version = tokens(engine), engine.version
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.full_like(parameter, 0.05))
    break_loading()
    with pytest.raises(EngineError, match=r"old weights \(version 0\) stay in use"):
        engine.update_weights(model.named_parameters(), 8)
    assert (tokens(engine), engine.version) == (before, version)
    engine.update_weights(model.named_parameters(), 8)
    assert tokens(engine) != before


def test_a_failure_inside_vllm_is_told_and_final(shared: VllmEngine, folder: Path, monkeypatch):
    """Runs last on the shared engine: its state is lost."""

    def fail():
        raise RuntimeError("out of memory on a bad day")

    monkeypatch.setattr(shared._stream._engine, "step", fail)
    with pytest.raises(EngineError, match="failed while running: RuntimeError: out of memory"):
        shared.generate([REQUEST], PARAMS)
    monkeypatch.undo()
    with pytest.raises(EngineError, match="close this engine"):
        shared.score([(1, 2)])
    shared.close()


def test_start_and_stop_leave_the_process_as_it_was(folder: Path, monkeypatch):
    """And a rollback before the first update goes back to the model folder."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "400")  # more than the machine has: not obeyed
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads

    with start(folder) as engine:
        before = tokens(engine)
        model = AutoModelForCausalLM.from_pretrained(folder)
        break_loading()
        with pytest.raises(EngineError, match="stay in use"):
            engine.update_weights(model.named_parameters(), 1)
        assert tokens(engine) == before
        assert engine.version.version == 0

    after = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    assert after == kept
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (torch.get_num_threads(), torch.set_num_threads) == (threads, set_num_threads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_gib": 10_000}, "rollout.vllm.kv_cache_gib"),
        ({"max_model_len": 4096}, "rollout.vllm.max_model_len"),
    ],
)
def test_a_start_that_fails_says_which_option_to_change(folder: Path, options, message):
    with pytest.raises(EngineError, match=message):
        start(folder, **options)


def test_a_model_that_cannot_be_served_is_refused(tmp_path: Path):
    with pytest.raises(EngineError, match="there is no model folder"):
        tokenizer = AutoTokenizer.from_pretrained(write_random_model(tmp_path / "small_heads"))
        VllmEngine(str(tmp_path / "none"), tokenizer, RolloutConfig(), max_prompt_length=8)
    with pytest.raises(EngineError, match="heads have size 8"):
        start(tmp_path / "small_heads")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_said_at_once(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(EngineError, match="torch finds none"):
        VllmEngine(str(folder), tokenizer, RolloutConfig(), max_prompt_length=8, device="cuda")
