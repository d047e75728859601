"""The cheap bookkeeping of vllm_decode_cpu.py gives what vLLM's own gives, to the last bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from rlalign.config.schema import VllmConfig
from rlalign.models.random import write_random_model
from rlalign.rollout import vllm_start
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.vllm_requests import scoring, sequence_logp
from rlalign.rollout.vllm_stream import VllmStream

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

VOCAB = 40


@pytest.fixture
def ours() -> Any:
    from vllm.platforms import current_platform

    from rlalign.rollout import vllm_decode_cpu

    current_platform.import_kernels()
    return vllm_decode_cpu


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_seeds_drawn_ahead_are_those_drawn_one_by_one(ours):
    a, b, alone = generators(1, 2, 1)
    got = [(ours.next_seed(a), ours.next_seed(b))[0] for _ in range(2 * ours.AHEAD + 3)]
    assert got == [torch.randint(0, 2**31, (1,), generator=alone).item() for _ in got]


@pytest.mark.parametrize("filters", [(None, None), (3, None), (None, 0.8), (5, 0.6)])
def test_tokens_and_log_probs_are_those_of_vllms_sampler(ours, filters):
    """Rows come and go as sequences end; row 1 has no generator."""
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    sampler = TopKTopPSampler("processed_logprobs")
    theirs, mine = generators(1, 2, 3), generators(1, 2, 3)
    rng = torch.Generator().manual_seed(0)
    for rows in [(0, 2, 3)] * 3 + [(3, 0)] * 3:
        logits = torch.randn(4, VOCAB, generator=rng)
        k, p = (None if f is None else torch.full((4,), f) for f in filters)
        want = ours._sample(sampler, logits.clone(), dict(zip(rows, theirs, strict=False)), k, p)
        got = ours.sample(sampler, logits.clone(), dict(zip(rows, mine, strict=False)), k, p)
        assert torch.equal(want[0][list(rows)], got[0][list(rows)])
        assert torch.equal(want[1], got[1])


def test_log_probs_of_many_tokens_are_appended_as_one_by_one(ours):
    from vllm.logprobs import FlatLogprobs
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists

    rng = np.random.default_rng(0)
    found = []
    for append in (ours._append, ours.append_logprobs):
        processor = LogprobsProcessor(None, FlatLogprobs(), None, 0.0, 0, None)
        for count in (1, 5, 2):
            rng = np.random.default_rng(count)
            ids = rng.integers(0, VOCAB, (count, 2), np.int32)  # others want a top log-prob
            logp = rng.normal(size=(count, 2)).astype(np.float32)
            append(processor, LogprobsLists(ids, logp, rng.integers(1, VOCAB, count)))
        found.append((processor.logprobs, processor.cumulative_logprob))
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return write_random_model(path, hidden=64, heads=2, kv_heads=1, max_positions=256)


def told(folder: Path) -> tuple[dict[str, Any], int]:
    """What vLLM says of sequences that come, are scored, go away and end in different ways; and how
    often it ran out of cache."""
    stream = VllmStream(
        str(folder), AutoTokenizer.from_pretrained(folder), VllmConfig(max_num_seqs=8), max_len=160
    )
    scheduler = stream._engine.engine_core.engine_core.scheduler
    preempted: set[str] = set()
    params = SamplingParams(120, stop_token_ids=(7, 11, 13, 17), temperature=1.3)
    found: dict[str, Any] = {}
    steps = 0
    for i in range(12):
        ids = list(range(20 + i // 2, 60 + i // 2 + i))
        stream.add(f"draw {i}", ids, stream.sampling(params, seed=i))
    while stream.unfinished:
        if steps == 9:
            stream.abort(["draw 2", "draw 11"])
            stream.add("score", list(range(30, 70)), scoring(5))
            stream.add("draw 2", [20, 21], stream.sampling(SamplingParams(1), seed=3))
        for output in stream.step():
            said = output.outputs[0]
            scored = sequence_logp(output) if output.request_id == "score" else None
            found[output.request_id] = (
                steps, said.token_ids, said.logprobs, said.cumulative_logprob, said.finish_reason,
                said.stop_reason, scored,
            )  # fmt: skip
        preempted |= {name for name, r in scheduler.requests.items() if r.num_preemptions}
        steps += 1
    stream.close()
    return found, len(preempted)


@pytest.mark.parametrize("blocks", [400, 16])
def test_sequences_are_told_as_by_vllms_own_scheduler(ours, folder, monkeypatch, blocks):
    """With 16 blocks of cache sequences are preempted, and begin again."""
    options = vllm_start._cpu_options
    few = {"num_gpu_blocks_override": blocks}
    monkeypatch.setattr(vllm_start, "_cpu_options", lambda *args: options(*args) | few)
    with vllm_start.eager("cpu", VllmConfig()):
        got, preempted = told(folder)
    assert (preempted > 0) == (blocks == 16)
    monkeypatch.setattr(vllm_start, "_faster", lambda device, cfg: None)
    with vllm_start.eager("cpu", VllmConfig()):
        want, _ = told(folder)
    assert len(got) == 12
    assert {said[4] for said in got.values()} == {"stop", "length"}
    assert got == want


def test_another_version_of_vllm_keeps_its_own_scheduler(ours, monkeypatch):
    import vllm

    cfg = VllmConfig()
    assert vllm_start._faster("cpu", cfg) is ours.CpuScheduler
    assert vllm_start._faster("cuda", cfg) is None
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    assert vllm_start._faster("cpu", cfg) is None
