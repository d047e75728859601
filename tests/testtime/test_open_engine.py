"""Which engine a model is opened with. What the engines do: tests/rollout/search_conformance.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from rlalign.models.errors import ModelError
from rlalign.models.random import write_random_model
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.search import Draw
from rlalign.rollout.search_hf import HFSearch
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.open_engine import open_engine


def test_transformers_unless_told_otherwise(tmp_path: Path):
    engine = open_engine(str(write_random_model(tmp_path, max_positions=64)))
    assert isinstance(engine, HFSearch)
    assert engine.limits.max_len == 64
    [drawn] = engine.answer([Draw((5, 6), SamplingParams(4, ignore_eos=True), 1)])
    assert len(drawn.ids) == 4


def test_the_seed_keys_the_weights_of_a_mini_model():
    first, second, again = (open_engine("mini:chain", seed=seed) for seed in (0, 1, 0))
    request = Draw((5, 6, 7), SamplingParams(1, temperature=0.0))
    logp = [engine.answer([request])[0].logp for engine in (first, second, again)]
    assert logp[0] == logp[2] != logp[1]


def test_what_cannot_be_opened_is_said(tmp_path: Path):
    with pytest.raises(DecodeError, match=r"backend='sglang'.*hf, vllm"):
        open_engine("mini:chain", backend="sglang")
    with pytest.raises(ModelError, match="no such folder"):
        open_engine(str(tmp_path / "none"), backend="vllm")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize(
    ("positions", "wanted", "longest"), [(64, None, 64), (64, 48, 48), (8192, None, 4096)]
)
def test_vllm_holds_the_models_context_or_as_much_as_its_cache_may(
    tmp_path: Path, monkeypatch, positions, wanted, longest
):
    from rlalign.rollout.search_vllm import VllmSearch

    seen = {}

    def start(path, tokenizer, cfg, **options):
        seen.update(options, path=path, eos=tokenizer.eos_token_id, seqs=cfg.max_num_seqs)

    monkeypatch.setattr(VllmSearch, "open", start)
    write_random_model(tmp_path, max_positions=positions)
    open_engine(
        str(tmp_path), backend="vllm", dtype="bfloat16", max_batch_size=7, max_model_len=wanted
    )
    assert seen.pop("eos") is not None
    assert seen == {
        "path": str(tmp_path), "max_len": longest, "dtype": "bfloat16", "device": "cpu", "seqs": 7,
    }  # fmt: skip
