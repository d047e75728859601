"""What vLLM says, read."""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace

import pytest

from rlalign.rollout.engine import EngineError, SamplingParams

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)

INF = math.inf


def flat(*steps: list[tuple[int, float]]):
    """vLLM's own list: for each step the sampled token, then the likeliest ones."""
    from vllm.logprobs import FlatLogprobs

    found = FlatLogprobs()
    for step in steps:
        ids, logp = zip(*step, strict=True)
        found.append_fast(list(ids), list(logp), iter(range(len(step))), [None] * len(step))
    return found


def completion(*steps: list[tuple[int, float]]):
    return SimpleNamespace(logprobs=flat(*steps))


def test_log_probs_of_sampled_tokens_are_the_first_of_each_step():
    from rlalign.rollout.vllm_requests import sampled_logp

    assert sampled_logp(flat([(5, -1.0)], [(6, -2.0)])) == [-1.0, -2.0]
    assert sampled_logp(flat([(5, -1.0), (7, -0.5)], [(6, -2.0), (6, -2.0)])) == [-1.0, -2.0]
    assert sampled_logp(flat([(5, -1.0)], [(6, -2.0), (7, -0.1), (8, -3.0)])) == [-1.0, -2.0]
    assert sampled_logp(flat()) == []


def test_the_likeliest_come_in_order_of_equals_the_lowest_first_without_the_impossible():
    from rlalign.rollout.vllm_requests import drawn_top

    got = drawn_top(
        completion(
            [(5, -1.0), (9, -0.5), (5, -1.0), (2, -1.0)],
            [(6, -2.0), (7, -0.1), (8, -INF), (3, -INF)],
        )
    )
    assert got == (((9, -0.5), (2, -1.0), (5, -1.0)), ((7, -0.1),))
    assert drawn_top(completion([(5, -1.0)], [(6, -2.0)])) == ()


def test_choices_are_read_past_the_sampled_token_and_before_the_padding():
    from rlalign.rollout.vllm_requests import chosen

    steps = [(3, -0.2), (5, -1.0), (6, -INF), (0, -INF), (0, -INF)]
    output = SimpleNamespace(outputs=[completion(steps)])
    assert chosen(output, (5, 6)) == (-1.0, -INF)
    nan = SimpleNamespace(outputs=[completion([(3, math.nan), (5, math.nan)])])
    with pytest.raises(EngineError, match="not finite"):
        chosen(nan, (5,))


def test_what_is_asked_for_is_as_much_as_there_is():
    from rlalign.rollout.vllm_requests import LATENTS_FROM, capturing, choosing, drawing

    params = SamplingParams(9, 0.5, 0.9, 7, stop_token_ids=(4,), num_top=500)
    asked = drawing(params, 3, {1, 2}, vocab=300)
    assert (asked.logprobs, asked.max_tokens, asked.temperature) == (300, 9, 0.5)
    assert (asked.top_p, asked.top_k, asked.stop_token_ids) == (0.9, 7, [1, 2, 4])
    free = drawing(SamplingParams(9, stop_token_ids=(4,), ignore_eos=True), 3, {1, 2}, 300)
    assert (free.logprobs, free.stop_token_ids) == (0, [])
    assert drawing(params, 3 + 2**40, {1}, 300).seed % 2**32 != asked.seed % 2**32
    assert (choosing((5, 6)).logprob_token_ids, choosing((5,)).max_tokens) == ([5, 6], 1)
    latents = capturing(4)
    assert latents.skip_reading_prefix_cache and latents.extra_args == {LATENTS_FROM: 3}
    assert latents.max_tokens == 1
