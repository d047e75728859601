import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.unmask_order import ORDERS, SCHEDULED, TIME_END, due, propose, quota, surest


def ints(*values):
    return torch.tensor(values)


def proposal(logits, order, **params):
    count = len(logits)
    where = torch.arange(count)
    sampling = SamplingParams(1, **params)
    return propose(logits, where + 7, torch.zeros_like(where), where, sampling, order)


def filtered_probs(logits, temperature, top_p, top_k):
    """The distribution drawn from, of one place, in Python floats."""
    scaled = [x / (temperature or 1) for x in logits]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    probs = [w / math.fsum(weights) for w in weights]
    ranked = sorted(range(len(probs)), key=lambda v: -probs[v])[: top_k or None]
    mass, kept, total = 0.0, [], math.fsum(probs[v] for v in ranked)
    for v in ranked:
        if mass >= top_p * total:
            break
        kept.append(v)
        mass += probs[v]
    return [probs[v] / mass if v in kept else 0.0 for v in range(len(probs))]


# --- confidence


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.7},
        {"temperature": 1.5, "top_k": 3},
        {"temperature": 0.0, "top_p": 0.6},
    ],
)
def test_confidence_by_its_definition(params):
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) * 2
    full = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **params}
    for order in ORDERS:
        found = proposal(logits, order, **params)
        for n in range(40):
            token = int(found.token_N[n])
            row = logits[n].double().tolist()
            plain = filtered_probs(row, 1.0, 1.0, 0)
            probs = filtered_probs(row, **full)
            first, second = sorted(probs, reverse=True)[:2]
            expected = {
                "low_confidence": plain[token],
                "maskgit_plus": probs[token],
                "topk_margin": first - second,
                "entropy": sum(p * math.log(p) for p in probs if p),
            }
            if order in expected:
                assert float(found.confidence_N[n]) == pytest.approx(expected[order], abs=1e-5)
            assert float(found.prob_N[n]) == pytest.approx(plain[token], abs=1e-5)


def test_random_orders_are_permutations_with_equal_probability():
    """Over seeds, of three positions; the number stays the same at every step."""
    logits = torch.zeros(3, 5)
    params, position, counts = SamplingParams(1), torch.arange(3), Counter()
    for seed in range(3000):
        seed_N = torch.full((3,), seed)
        u = [
            propose(logits, seed_N, torch.full((3,), step), position, params, "random").confidence_N
            for step in (0, 5)
        ]
        assert torch.equal(*u)
        counts[tuple(u[0].argsort().tolist())] += 1
    assert len(counts) == 6
    assert sum((n - 500) ** 2 / 500 for n in counts.values()) < 5 + 5 * 10**0.5


def test_the_order_of_positions_is_not_the_noise_of_their_tokens():
    logits = torch.zeros(4000, 1000)
    where = torch.arange(4000)
    found = propose(logits, where, 0 * where, 0 * where, SamplingParams(1), "random")
    drawn_and_order = torch.stack([found.token_N.float(), found.confidence_N])
    assert abs(float(torch.corrcoef(drawn_and_order)[0, 1])) < 5 / 4000**0.5


def test_positions_are_drawn_by_the_softmax_of_their_confidence():
    """The first one, over seeds, at each of two steps; and the two draws are independent."""
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)) * 3
    params, where, count, alg_temp = SamplingParams(1, 0.0), torch.arange(3), 3000, 0.4
    weights = (proposal(logits, "maskgit_plus", temperature=0.0).confidence_N / alg_temp).softmax(0)
    pairs = Counter()
    for seed in range(count):
        first = []
        for step in (0, 1):
            keys = torch.full((3,), seed), torch.full((3,), step), where
            found = propose(logits, *keys, params, "maskgit_plus", alg_temp)
            first.append(int(found.confidence_N.argmax()))
        pairs[tuple(first)] += 1
    expected = {(i, j): count * float(weights[i] * weights[j]) for i in range(3) for j in range(3)}
    statistic = sum((pairs[pair] - e) ** 2 / e for pair, e in expected.items())
    assert min(expected.values()) > 5 and statistic < 8 + 5 * 16**0.5


# --- quotas


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ORDERS[:-1]), st.integers(1, 40), st.integers(1, 50))
def test_quotas_fill_a_block_in_time(order, size, steps):
    left, step, given_out = size, 0, []
    while left:
        [q] = quota(order, ints(step), steps, ints(size), ints(left)).tolist()
        assert 1 <= q <= left
        given_out.append(q)
        left, step = left - q, step + 1
    assert len(given_out) <= min(steps, size)
    if order not in SCHEDULED:
        rest = size % min(steps, size)
        base = size // min(steps, size)
        assert given_out == [base + 1] * rest + [base] * (min(steps, size) - rest)


def test_dreams_schedule_by_its_formula():
    steps, left, times = 8, 64, [1 + k * (TIME_END - 1) / 8 for k in range(9)]
    for k in range(steps):
        [q] = quota("entropy", ints(k), steps, ints(64), ints(left)).tolist()
        share = 1 - times[k + 1] / times[k]
        assert q == (math.floor(left * share) if k < steps - 1 else left)
        left -= q
    # Where the formula gives a step nothing, one position goes: 8 (1 - t1/t0) is 0.999.
    assert quota("entropy", ints(0), 8, ints(8), ints(8)).tolist() == [1]


def test_origin_goes_at_times_with_the_probabilities_of_the_schedule():
    """Of those still masked at t, each goes before s with probability 1 - s/t; the last step takes
    all. Steps at which nothing goes are not made."""
    steps, count = 4, 40000
    times = [1 + k * (TIME_END - 1) / steps for k in range(steps)] + [0.0]
    where = torch.arange(count)
    found = propose(torch.zeros(count, 2), where, 0 * where, 0 * where, SamplingParams(1), "origin")
    confidence, wanted, gone = found.confidence_N[None], torch.ones(1, count).bool(), []
    while bool(wanted.any()):
        chosen = surest(confidence, wanted, due(confidence, wanted, steps), None, None)
        gone.append(int(chosen.sum()))
        wanted &= ~chosen
    for k, number in enumerate(gone):
        p = times[k] - times[k + 1]
        assert abs(number - count * p) < 5 * (count * p * (1 - p)) ** 0.5
    alone = ints(1).bool()[None]
    assert due(torch.tensor([[0.01]]), alone, steps).tolist() == [1]  # a last one, at once


# --- who is committed


CONFIDENCES = st.lists(
    st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=12
).filter(lambda pairs: any(wanted for _, wanted in pairs))


@settings(max_examples=200, deadline=None)
@given(CONFIDENCES, st.integers(1, 5), st.sampled_from([None, 0.2, 0.8]),
       st.sampled_from([None, 0.4, 1.0, 3.0]))  # fmt: skip
def test_surest_by_sorting(pairs, least, threshold, factor):
    confidence = torch.tensor([[c for c, _ in pairs]])
    wanted = torch.tensor([[w for _, w in pairs]])
    ranked = sorted((i for i, (_, w) in enumerate(pairs) if w), key=lambda i: -pairs[i][0])
    count = min(least, len(ranked))
    if threshold is not None:
        count = max(count, sum(pairs[i][0] >= torch.tensor(threshold) for i in ranked))
    if factor is not None:
        far = [r for r, i in enumerate(ranked, 1) if pairs[i][0] >= 1 - factor / (r + 1)]
        count = max([count, *far])
    chosen = surest(confidence, wanted, ints(least).clamp(max=len(ranked)), threshold, factor)
    assert chosen[0].nonzero()[:, 0].tolist() == sorted(ranked[:count])
