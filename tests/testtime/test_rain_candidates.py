"""Candidates of RAIN against dense computations on the model's own logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlalign.config.testtime import RainConfig
from rlalign.models.random import write_random_model
from rlalign.rollout.search import Drawn
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.rain_candidates import LOWEST, clamp, draws, filtered, read, sample, sampled

PROMPT = (40, 50, 60)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    return open_engine(str(write_random_model(folder, "qwen2", max_positions=64)))


def never(tokens: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    return tokens, False


def dense(engine, ids: tuple[int, ...], tokens: tuple[int, ...], top_k: int, tau: float) -> float:
    """The product of filtered probabilities, from the model's full logits in float64."""
    with torch.no_grad():
        logits_TV = engine.model(torch.tensor([ids + tokens])).logits[0].double()
    p = 1.0
    for i, token in enumerate(tokens):
        row_V = logits_TV[len(ids) + i - 1] / tau
        kept = row_V.topk(top_k).indices
        assert token in kept
        p *= float((row_V[token] - row_V[kept].logsumexp(0)).exp())
    return p


@pytest.mark.parametrize("tau", [0.7, 1.0, 2.0])
def test_probabilities_of_sets_are_those_of_dense_top_k_distributions(engine, tau):
    cfg = RainConfig(candidate_temperature=tau, candidate_top_k=15)
    replies = engine.answer(draws(PROMPT, 4, cfg, lambda i: 100 + i))
    children, reserve = read(replies, 4, cfg, never)
    assert reserve == [] and 2 <= len(children) <= 10
    for child in children[1:]:
        assert child.p == pytest.approx(dense(engine, PROMPT, child.tokens, 15, tau), rel=1e-5)
    greedy = math.exp(
        sum(
            filtered(top, logp, tau)
            for top, logp in zip(replies[0].top, replies[0].logp, strict=True)
        )
    )
    assert greedy == pytest.approx(dense(engine, PROMPT, replies[0].ids, 15, tau), rel=1e-5)
    assert children[0].p > max(child.p for child in children[1:])


@pytest.mark.parametrize("tau", [0.7, 2.0])
def test_single_tokens_are_the_likeliest_and_the_rest_is_kept(engine, tau):
    cfg = RainConfig(candidate_temperature=tau, num_candidates=5, max_children=8)
    [request] = draws(PROMPT, 1, cfg, lambda i: i)
    children, reserve = read(engine.answer([request]), 1, cfg, never)
    with torch.no_grad():
        row_V = engine.model(torch.tensor([PROMPT])).logits[0, -1].double()
    likely = row_V.topk(8).indices.tolist()
    assert [child.tokens[0] for child in children] == likely[:5]
    assert [candidate.tokens[0] for candidate in reserve] == likely[5:]
    p_V = (row_V / tau).softmax(0)
    for child in children:
        share = child.p / sum(other.p for other in children)
        assert share == pytest.approx(float(p_V[child.tokens[0]] / p_V[likely[:5]].sum()), rel=1e-5)
    official = RainConfig(compat="official", num_candidates=5, max_children=8)
    children, _ = read(engine.answer([request]), 1, official, never)
    assert [child.tokens[0] for child in children] == sorted(likely[:5])


@given(st.floats(1e-12, 1), st.lists(st.floats(1e-9, 1), min_size=1, max_size=9))
def test_the_greedy_sequence_outranks_every_sample(greedy, samples):
    p = clamp(greedy, samples)
    assert p > max(samples)
    least = max(samples) + min(samples)
    assert p == (least if min(greedy, sum(samples)) < least else min(greedy, sum(samples)))


def test_the_clamp_by_hand():
    assert clamp(1e-9, [0.2, 0.05, 0.1]) == pytest.approx(0.25)
    assert clamp(0.3, [0.2, 0.05, 0.1]) == 0.3
    assert clamp(0.9, [0.2, 0.05, 0.1]) == pytest.approx(0.35)
    assert clamp(0.9, []) == 0.9


def drawn(*ids: int, logp: float = -0.5) -> Drawn:
    top = tuple(((i, logp), (i + 100, -2.0)) for i in ids)
    return Drawn(ids, (logp,) * len(ids), "length", top)


def test_duplicates_are_dropped_and_a_set_is_cut_where_the_answer_ends():
    cfg = RainConfig(num_candidates=3)
    replies = [drawn(1, 2), drawn(1, 2), drawn(3, 4), drawn(3, 9), drawn(3, 9), drawn(5, 6)]

    def close(tokens: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        return (tokens[:1], True) if tokens[0] == 3 else (tokens, False)

    children, _ = read(replies, 2, cfg, close)
    assert [(child.tokens, child.ends) for child in children] == [
        ((1, 2), False), ((3,), True), ((5, 6), False),
    ]  # fmt: skip
    alone, _ = read([drawn(1, 2), drawn(1, 2)], 2, cfg, never)
    assert [child.tokens for child in alone] == [(1, 2)]


def test_a_number_of_attempts_and_no_more_children_than_q():
    cfg = RainConfig(num_candidates=3, num_attempts=5)
    assert len(draws(PROMPT, 2, cfg, lambda i: i)) == 6
    children, _ = read([drawn(i, i) for i in range(6)], 2, cfg, never)
    assert [child.tokens for child in children] == [(0, 0), (1, 1), (2, 2)]
    assert len(draws(PROMPT, 2, RainConfig(num_candidates=3), lambda i: i)) == 3
    assert len(draws(PROMPT, 2, RainConfig(num_candidates=1), lambda i: i)) == 1


def test_a_sampled_set_is_drawn_with_its_own_seed_and_a_long_one_keeps_a_probability(engine):
    cfg = RainConfig()
    first, again, other = engine.answer([sample(PROMPT, 6, cfg, seed) for seed in (5, 5, 6)])
    assert first.ids == again.ids != other.ids
    assert sampled(drawn(*[1] * 3000), never).p == math.exp(LOWEST) > 0
