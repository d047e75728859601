"""Logit fusion with the large model in vLLM: the same answers as with transformers alone."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlalign.config.schema import VllmConfig
from rlalign.config.testtime import FusionConfig
from rlalign.models.random import write_random_model
from rlalign.models.tokenizer import build_tokenizer
from rlalign.rollout import hf, vllm_choose, vllm_start
from rlalign.rollout.engine import EngineError
from rlalign.testtime.decode_text import TextJob, decode_text
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.fusion_models import FusedModel
from rlalign.testtime.fusion_rows import new_row
from rlalign.testtime.fusion_vllm import Turn, open_on_vllm
from rlalign.testtime.logit_fusion import logit_fusion
from rlalign.testtime.open_fusion import open_fusion
from tests.testtime.fusion_cases import random_member

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)
POISON = 270  # a token of the large model that makes its logits NaN
PROMPTS = [f"{i}+{j}=?" for i in range(4) for j in (3, 11, 2222)]
LENGTH, CONTEXT, PLACES = 20, 64, 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """large, small, expert. Heads of 32: the smallest that vLLM's CPU kernels take."""
    root = tmp_path_factory.mktemp("fusion")
    shape = {"heads": 2, "kv_heads": 1, "vocab": POISON + 1, "tied": False}
    padded = {"vocab": POISON + 20}  # the large model has columns that the others do not
    names = ("large", "small", "expert")
    for seed, name in enumerate(names):
        hidden = 64 if name == "large" else 32
        own = shape | (padded if name == "large" else {"heads": 1})
        write_random_model(root / name, hidden=hidden, max_positions=2 * CONTEXT, seed=seed, **own)
    [file] = (root / "large").glob("*.safetensors")
    weights = load_file(file)
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    weights["lm_head.weight"][POISON] = 0
    weights["lm_head.weight"][build_tokenizer(CONTEXT).eos_token_id] *= 2  # some answers end
    save_file(weights, file, {"format": "pt"})
    return [str(root / name) for name in names]


@pytest.fixture(scope="module")
def fused(folders):
    large, small, expert = folders
    with open_fusion(
        large, small, [expert], backend="vllm", max_batch_size=PLACES, max_model_len=CONTEXT
    ) as found:
        yield found


@pytest.fixture(scope="module")
def reference(folders):
    large, small, expert = folders
    return open_fusion(large, small, [expert], max_batch_size=PLACES)


def told(results):
    """All that an answer is, but the time it took."""
    return [
        (r.token_ids, r.text, r.finish, r.stop_reason, r.trace, r.error, r.num_generated_tokens,
         r.num_prefill_tokens, r.num_engine_calls, dict(r.counters))
        for r in results
    ]  # fmt: skip


@needs_vllm
@pytest.mark.parametrize("refills", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_p": 0.9}, {"alpha_min": 1.0, "alpha_max": 1.0}]
)
def test_answers_are_those_of_transformers(fused, reference, options, refills, monkeypatch):
    """Tokens, strengths and accounts; more prompts than places, rows that end early."""
    if not refills:
        monkeypatch.setattr(hf, "is_plain_decoder", lambda model, longest: False)
    want = logit_fusion(reference, PROMPTS, max_new_tokens=LENGTH, **options)
    got = logit_fusion(fused, PROMPTS, max_new_tokens=LENGTH, **options)
    assert told(got) == told(want)
    assert len({len(r.token_ids) for r in got}) > 1
    assert len({alpha for r in got for alpha in r.trace["alphas"]}) > 3 or "alpha_min" in options


@needs_vllm
def test_each_ending_is_told(fused, reference):
    budget = {"max_new_tokens": LENGTH, "max_tokens": 7}
    got = logit_fusion(fused, PROMPTS, **budget)
    assert told(got) == told(logit_fusion(reference, PROMPTS, **budget))
    assert {"max_tokens"} < {r.stop_reason for r in got} | {"stop"}
    [timed] = logit_fusion(fused, PROMPTS[:1], max_new_tokens=LENGTH, max_wall_s=1e-9)
    assert timed.stop_reason == "max_wall_s" and len(timed.token_ids) == 1


@needs_vllm
def test_a_bad_row_does_not_stop_the_rest(fused):
    prompts = ["abc", [5, POISON, 7], [5] * CONTEXT, [5] * (CONTEXT - 2), [], "xyz"]
    done = []
    results = logit_fusion(
        fused, prompts, max_new_tokens=6, on_done=lambda i, result: done.append(i)
    )
    assert [bool(r.error) for r in results] == [False, True, True, False, True, False]
    assert "the logits of large are not finite" in results[1].error
    assert results[1].num_prefill_tokens == 9 and results[1].num_engine_calls == 3  # three models
    assert f"fills vLLM's context of {CONTEXT} tokens" in results[2].error
    assert len(results[3].token_ids) == 2
    assert sorted(done) == list(range(len(prompts)))
    for i in (0, 3, 5):
        [alone] = logit_fusion(fused, [prompts[i]], max_new_tokens=6)
        assert alone.token_ids == results[i].token_ids


@needs_vllm
def test_rows_that_broke_leave_nothing_in_the_cache(fused, reference):
    """Those that come after them get their blocks, and NaN times a weight of zero is NaN."""
    want = told(logit_fusion(reference, PROMPTS, max_new_tokens=LENGTH))
    for _ in range(3):
        broken = [[5, POISON, 7], [9] * 40 + [POISON], [POISON] * 50]
        assert all(r.error for r in logit_fusion(fused, broken, max_new_tokens=1))
        assert told(logit_fusion(fused, PROMPTS, max_new_tokens=LENGTH)) == want
    mixed = [x for prompt in PROMPTS for x in (prompt, [5, POISON, 7])]
    got = logit_fusion(fused, mixed, max_new_tokens=LENGTH)[::2]
    assert [r.token_ids for r in got] == [r[0] for r in want]


@needs_vllm
def test_what_breaks_off_leaves_nothing_behind(fused):
    def stop(index, result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        logit_fusion(fused, PROMPTS, max_new_tokens=LENGTH, on_done=stop)
    assert fused.stream.unfinished == 0 and not fused.turn.active
    assert not any(r.error for r in logit_fusion(fused, PROMPTS[:2], max_new_tokens=3))


@needs_vllm
def test_what_vllm_refuses_is_that_rows_error(fused, monkeypatch):
    add = fused.stream.add

    def refusing(name, *args):
        if name == "1":
            raise EngineError("vLLM refuses it: no")
        add(name, *args)

    monkeypatch.setattr(fused.stream, "add", refusing)
    results = logit_fusion(fused, PROMPTS[:3], max_new_tokens=3)
    assert [r.error for r in results] == ["", "DecodeError: vLLM refuses it: no", ""]


@needs_vllm
def test_a_vllm_without_logits_is_given_up(fused, monkeypatch):
    monkeypatch.setattr(fused.stream, "step", lambda: [])
    monkeypatch.setattr(fused, "cfg", VllmConfig(timeout_s=0.05))
    with pytest.raises(EngineError, match=r"no logits for any of 5 sequences in 0\.05 s"):
        logit_fusion(fused, PROMPTS, max_new_tokens=3)
    assert fused.stream.unfinished == 0


@needs_vllm
def test_a_long_run_is_no_silent_one(fused, monkeypatch):
    """The deadline counts from the last token, not from the beginning."""
    clock = itertools.count(0.0, 0.02)
    monkeypatch.setattr("rlalign.testtime.fusion_vllm.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(fused, "cfg", VllmConfig(timeout_s=2.0))
    assert not any(r.error for r in logit_fusion(fused, PROMPTS, max_new_tokens=LENGTH))
    assert next(clock) > 4.0


@needs_vllm
def test_an_end_that_is_not_ours_fails_its_row(fused, monkeypatch):
    plain = logit_fusion(fused, PROMPTS, max_new_tokens=4)
    long = [prompt for prompt, r in zip(PROMPTS, plain, strict=True) if r.finish == "length"][:2]
    step = fused.stream.step

    def stepping():
        [*step()]
        ended = SimpleNamespace(request_id="1", outputs=[SimpleNamespace(finish_reason="abort")])
        row = fused.turn.active.get("1")
        return [ended] if row is not None and len(row.tokens) == 2 else []

    monkeypatch.setattr(fused.stream, "step", stepping)
    first, second = logit_fusion(fused, long, max_new_tokens=2)
    assert not first.error and not second.error  # they were ended by us in that step
    first, second = logit_fusion(fused, long, max_new_tokens=3)
    assert not first.error and len(first.token_ids) == 3
    assert second.error == "DecodeError: vLLM ended it after 2 tokens, reason 'abort'"


@needs_vllm
def test_another_call_in_the_midst_of_one_is_refused(fused):
    refused = []

    def ask_again(index, result):
        with pytest.raises(DecodeError, match="answering another call"):
            logit_fusion(fused, ["abc"])
        refused.append(index)

    results = logit_fusion(fused, PROMPTS, max_new_tokens=3, on_done=ask_again)
    assert len(refused) == len(results) and not any(r.error for r in results)
    assert not logit_fusion(fused, ["abc"], max_new_tokens=3)[0].error


@needs_vllm
def test_steps_are_in_turn_and_the_environment_is_as_before(fused):
    config = fused.stream._engine.vllm_config.scheduler_config
    assert config.async_scheduling is False
    assert not set(vllm_start.FIRST_RUNNER) & set(os.environ)


@needs_vllm
def test_drafts_are_for_transformers(fused):
    with pytest.raises(DecodeError, match="speculate is for backend=hf"):
        logit_fusion(fused, ["abc"], speculate=2)


@needs_vllm
def test_the_command_runs_it(fused, folders, tmp_path, monkeypatch):
    opened = []

    def counted(*args, **options):
        opened.append(args)
        return open_on_vllm(*args, **options)

    module = importlib.import_module("rlalign.testtime.open_fusion")
    monkeypatch.setattr(module, "open_on_vllm", counted)
    fused.close()  # the last test of this engine
    with pytest.raises(EngineError, match="closed"):
        logit_fusion(fused, ["abc"])
    large, small, expert = folders
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "1+2=?"}\n{"prompt": "3+4=?"}\n')
    tokens = {}
    for backend in ("hf", "vllm"):
        out = tmp_path / f"{backend}.jsonl"
        decode_text(
            TextJob(
                "logit-fusion", large, source, out,
                ["max_new_tokens=5"], small=small, experts=[expert], backend=backend,
            )
        )  # fmt: skip
        tokens[backend] = [json.loads(line)["token_ids"] for line in out.open()]
        assert len(opened) == (backend == "vllm")
    assert tokens["hf"] == tokens["vllm"] and len(tokens["hf"]) == 2
    with pytest.raises(DecodeError, match="max_model_len=0"):
        open_fusion(large, small, [expert], backend="vllm", max_model_len=0)


class LargeBeside(FusedModel):
    """The small models in lock step, as where the large one is elsewhere."""

    @property
    def in_lock_step(self):
        return self.members[1:]


@pytest.mark.parametrize("refills", [True, False])
def test_rows_that_were_put_aside_come_back(refills, monkeypatch):
    """As a vLLM short of memory does it: any rows, in any order, at any step."""
    if not refills:
        monkeypatch.setattr(hf, "is_plain_decoder", lambda model, longest: False)
    large, small, expert = (random_member(seed) for seed in (1, 2, 3))
    cfg = FusionConfig(max_new_tokens=8)
    plain = logit_fusion(FusedModel(large, small, [expert]), PROMPTS[:4], cfg)
    beside = LargeBeside(large, small, [expert])
    rows = [new_row(beside, prompt, i, cfg, None, "") for i, prompt in enumerate(PROMPTS[:4])]
    turn = Turn()
    steps = [[0, 1], [1, 0], [2], [0, 2, 1], [3, 1], [1, 3, 2, 0], [0], [2, 3, 0]] * 4
    with beside.decoding(CONTEXT) as step:
        turn.begin(beside, step, cfg)
        turn.active = {str(row.index): row for row in rows}
        for names in steps:
            names = [str(i) for i in names if not rows[i].finish_reason]
            if not names:
                continue
            ids = [[*rows[int(n)].prompts[0].ids, *rows[int(n)].tokens] for n in names]
            logits = torch.stack([large.model(torch.tensor([x])).logits[0, -1] for x in ids])
            chosen = turn.choose(names, logits)
            assert chosen == [rows[int(n)].tokens[-1] for n in names]
    assert [tuple(row.tokens) for row in rows] == [r.token_ids for r in plain]
    assert [row.alphas for row in rows] == [r.trace["alphas"] for r in plain]


@needs_vllm
def test_half_read_prompts_choose_nothing():
    asked = []

    def choose(names, logits):
        asked.append((names, logits.tolist()))
        return [7, 8]

    batch = SimpleNamespace(num_reqs=3, req_ids=["x-0", "x-1", "x-2", "gone"])
    runner = SimpleNamespace(input_batch=batch, _sample=None)
    runner.discard_request_mask = SimpleNamespace(np=np.array([False, True, False, False]))
    vllm_choose.install(runner, choose, lambda name: name.removeprefix("x-"))
    output = runner._sample(torch.tensor([[0.0], [1.0], [2.0]]), None)
    assert asked == [(["0", "2"], [[0.0], [2.0]])]
    assert output.sampled_token_ids.tolist() == [[7], [0], [8]]
    assert output.logprobs_tensors is None
    with pytest.raises(EngineError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        vllm_choose.install(SimpleNamespace(), choose, str)
