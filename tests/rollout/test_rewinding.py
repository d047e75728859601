"""Tokens read several at once and taken back: both decoders against plain forward passes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign.models.random import write_random_model
from rlalign.rollout.engine import GenerateRequest, SamplingParams
from rlalign.rollout.hf import HFEngine, make_decoder
from rlalign.rollout.hf_cache import CacheDecoder
from rlalign.rollout.hf_fast import FastDecoder

PROMPTS = [[5, 9, 17], [40], [7, 8, 9, 10, 11, 12]]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def make(architecture, **overrides):
        folder = tmp_path_factory.mktemp(architecture)
        write_random_model(folder, architecture, max_positions=128, **overrides)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        return model, AutoTokenizer.from_pretrained(folder)

    return make


def plain(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("kind", ["fast", "generic"])
@torch.inference_mode()
def test_rows_go_on_from_where_they_were_taken_back_to(load, architecture, kind):
    """Rounds of several tokens of which each row keeps its own number, one row leaving between."""
    model, _ = load(architecture)
    decoder = FastDecoder(model, 128) if kind == "fast" else CacheDecoder(model, 0)
    assert decoder.rewinds
    rows = [list(prompt) for prompt in PROMPTS]
    decoder.admit(rows, [1] * 3)
    rng = torch.Generator().manual_seed(1)
    for turn in range(6):
        count = 1 + turn % 4
        tokens = torch.randint(2, 200, (len(rows), count), generator=rng).tolist()
        logits_BNV = decoder.extend(tokens)
        for row, new, logits_NV in zip(rows, tokens, logits_BNV, strict=True):
            torch.testing.assert_close(
                logits_NV, plain(model, row + new)[-count:], atol=2e-5, rtol=1e-4
            )
        back = torch.randint(0, count + 1, (len(rows),), generator=rng).tolist()
        decoder.rewind(back)
        rows = [row + new[: count - n] for row, new, n in zip(rows, tokens, back, strict=True)]
        if turn == 2:
            decoder.keep([2, 1])
            rows = [rows[2], rows[1]]
        logits_BV = decoder.step([3] * len(rows))
        rows = [[*row, 3] for row in rows]
        for row, logits_V in zip(rows, logits_BV, strict=True):
            torch.testing.assert_close(logits_V, plain(model, row)[-1], atol=2e-5, rtol=1e-4)


def test_a_window_cannot_take_tokens_back(load):
    model, tokenizer = load("mistral", sliding_window=24)
    assert not make_decoder(model, tokenizer, 100).rewinds
    assert make_decoder(model, tokenizer, 20).rewinds


def test_a_row_after_one_that_failed_is_not_harmed(load):
    """The third prompt takes the place of the second, whose keys and values were NaN."""
    model, tokenizer = load("qwen2", tied=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[200] = torch.nan
    engine = HFEngine(model, tokenizer, max_batch_size=2)
    params = SamplingParams(12, temperature=0.0, ignore_eos=True)
    prompts = [(5, 9, 6, 6, 6), (5, 9, 200, 7), (5, 9)]
    first, failed, third = engine.rows([GenerateRequest("", p, (0,)) for p in prompts], params)
    assert failed[0].finish_reason == "failed"
    for prompt, [row] in ((prompts[0], first), (prompts[2], third)):
        [[alone]] = engine.rows([GenerateRequest("", prompt, (0,))], params)
        assert row.tokens == alone.tokens and len(row.tokens) == 12
