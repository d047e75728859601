import math

import pytest
import torch

from rlalign.rollout import sampling
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.sampling import keep_likeliest, likeliest, sample, uniform

M64 = 2**64 - 1


def splitmix64(seed, step):
    """The (step + 1)-th output of splitmix64 started at `seed`, in Python integers."""
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def rows(logits, seeds, steps, **params):
    params = SamplingParams(1, **params)
    return sample(logits, torch.tensor(seeds), torch.tensor(steps), params)


def by_hand(logits, u):
    """(token, log-prob) by walking the distribution function in Python floats."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total, walked = math.fsum(weights), 0.0
    for token, weight in enumerate(weights):
        walked += weight
        if walked > u * total:
            return token, math.log(weight / total)
    raise AssertionError


def test_uniform_is_splitmix64():
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    for seed in seeds:
        for step in (0, 1, 77):
            expected = ((splitmix64(seed & M64, step) >> 16) + 0.5) / 2**48
            assert float(uniform(torch.tensor([seed]), torch.tensor([step]))) == expected


def test_first_output_of_splitmix64_as_published():
    # Reference implementation by S. Vigna, state 1234567.
    assert splitmix64(1234567, 0) == 6457827717110365317


@pytest.mark.parametrize("axis", ["seed", "step"])
def test_uniform_is_uniform_along_seeds_and_steps(axis):
    count, cells = 64000, 64
    along, other = torch.arange(count), torch.full((count,), 5)
    u = uniform(along, other) if axis == "seed" else uniform(other, along)
    observed = torch.histc(u, cells, 0, 1)
    chi_square = float(((observed - count / cells) ** 2).sum() / (count / cells))
    assert chi_square < cells - 1 + 5 * (2 * (cells - 1)) ** 0.5
    neighbours = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(float(neighbours)) < 5 / count**0.5


def test_draws_invert_the_distribution_function():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 37, generator=generator) * 4
    seeds = list(range(200))
    token, logp = rows(logits, seeds, [3] * 200)
    for b in range(200):
        u = float(uniform(torch.tensor([b]), torch.tensor([3])))
        expected = by_hand(logits[b].double().tolist(), u)
        assert int(token[b]) == expected[0]
        assert float(logp[b]) == pytest.approx(expected[1], abs=2e-6)


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((20000, 9), -torch.inf)
    logits[:, [2, 5]] = torch.tensor([0.0, -12.0])
    token, logp = rows(logits, list(range(20000)), [0] * 20000)
    assert set(token.tolist()) <= {2, 5}
    assert torch.isfinite(logp).all()


def test_a_certain_token_has_logp_zero_whatever_the_scale():
    for scale in (1.0, 1e4, -1e4, 3e38):
        logits = torch.full((1, 5), -torch.inf)
        logits[0, 4] = scale
        token, logp = rows(logits, [7], [0])
        assert (int(token), float(logp)) == (4, 0.0)


def test_a_row_does_not_see_the_others(monkeypatch):
    logits = torch.randn(33, 50)
    seeds = list(range(33))
    together = rows(logits, seeds, [1] * 33, temperature=0.7, top_p=0.9, top_k=20)
    for b in range(33):
        alone = rows(logits[b : b + 1], [b], [1], temperature=0.7, top_p=0.9, top_k=20)
        assert int(alone[0]) == int(together[0][b])
        assert float(alone[1]) == float(together[1][b])
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 8 * 50 * 4)  # four rows at a time
    in_parts = rows(logits, seeds, [1] * 33, temperature=0.7, top_p=0.9, top_k=20)
    assert all(torch.equal(a, b) for a, b in zip(together, in_parts, strict=True))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.5), (9, 0.7)])
def test_filters_keep_what_a_sort_keeps(top_k, top_p):
    logits = torch.randn(40, 25, generator=torch.Generator().manual_seed(1)) * 3
    kept = keep_likeliest(logits, top_k, top_p).isfinite()
    for row, kept_row in zip(logits.tolist(), kept.tolist(), strict=True):
        order = sorted(range(25), key=lambda v: -row[v])[: top_k or 25]
        weights = [math.exp(row[v]) for v in order]
        expected, mass = set(), 0.0
        for v, weight in zip(order, weights, strict=True):
            if mass >= top_p * sum(weights):
                break
            expected.add(v)
            mass += weight
        assert {v for v in range(25) if kept_row[v]} == expected


def test_ties_with_the_last_token_kept_are_kept():
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])
    assert keep_likeliest(logits, 2, 1.0).isfinite().tolist() == [[True, True, True, True, False]]


def test_temperature_zero_is_greedy_at_temperature_one():
    logits = torch.randn(10, 30)
    token, logp = rows(logits, [1] * 10, [0] * 10, temperature=0.0, top_k=3, top_p=0.2)
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_show_as_nan(temperature):
    logits = torch.randn(3, 8)
    logits[1, 4] = torch.nan
    token, logp = rows(logits, [1, 2, 3], [0] * 3, temperature=temperature)
    assert logp.isnan().tolist() == [False, True, False]
    assert int(token.max()) < 8


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_the_likeliest_tokens_by_value_and_then_by_id(count):
    """Equals inside, at the edge and all along; rows of which few tokens can be drawn."""
    rng = torch.Generator().manual_seed(0)
    logits_BV = torch.randint(0, 4, (200, 8), generator=rng).float()
    logits_BV[torch.rand(200, 8, generator=rng) < 0.2] = -torch.inf
    logits_BV = logits_BV[logits_BV.amax(-1) > -torch.inf]
    params = SamplingParams(1, temperature=0.0, num_top=count)
    for logits_V, found in zip(logits_BV, likeliest(logits_BV, params), strict=True):
        logp = logits_V.log_softmax(-1).tolist()
        order = sorted(range(8), key=lambda v: (-logp[v], v))
        wanted = [(v, logp[v]) for v in order[:count] if logp[v] > -torch.inf]
        assert [v for v, _ in found] == [v for v, _ in wanted]
        assert [p for _, p in found] == pytest.approx([p for _, p in wanted])
