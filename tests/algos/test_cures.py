"""CurES: which prompts are drawn, and how many samples each gets."""

import dataclasses
import itertools
import json
import math
import warnings

import pytest
import torch

from rlalign import algos
from rlalign.algos import PilotStats, cures, gvm
from rlalign.algos.allocate import allocate
from rlalign.algos.gvm import gvm_weights
from rlalign.config import AlgoConfig


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def config(loss_type: str = "cures_grpo", **allocation) -> AlgoConfig:
    cfg = AlgoConfig(loss_type=loss_type)
    section = dataclasses.replace(cfg.allocation, **{"group_size": 1, **allocation})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", algos.AlgoWarning)
        return algos.resolve(
            dataclasses.replace(cfg, allocation=section), engine_shares_parameters=True
        )


def stats(rate: torch.Tensor, num_samples: int = 8) -> PilotStats:
    """Unit norms; the mean gradient of the right is (1 - p) long, as where right and wrong samples
    each pull one way: E_1 g - E_0 g = 1."""
    one, count = torch.ones_like(rate), torch.full_like(rate, num_samples)
    return PilotStats(count, rate * num_samples, one, one, 0 * one, one, one)


GRID = t(0, 0.25, 0.5, 0.75, 1)


def test_probabilities_of_prompts():
    """tau = 0.1; by hand: exp(sqrt(p(1-p)) / 0.1)."""
    found = cures.sampling_probs(GRID, 0.1)
    torch.testing.assert_close(
        found, t(0.003308, 0.251236, 0.490912, 0.251236, 0.003308), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("tau", [0.05, 0.3, 2.0])
def test_they_are_symmetric_peak_at_a_half_and_are_bounded(tau):
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    rho = cures.sampling_probs(p, tau)
    torch.testing.assert_close(rho, rho.flip(0))
    assert (rho[:51].diff() > 0).all() and float(rho.sum()) == pytest.approx(1)
    assert float(rho.max() / rho.min()) == pytest.approx(math.exp(1 / (2 * tau)))


def test_limits_of_the_temperature():
    rate = t(0.1, 0.5, 0.9, 0.5)
    torch.testing.assert_close(cures.sampling_probs(rate, 1e9), torch.full((4,), 0.25).double())
    torch.testing.assert_close(cures.sampling_probs(rate, 1e-4), t(0, 0.5, 0, 0.5))


# Five responses of a softmax policy over logits; the first two are right.
PROBS = torch.tensor([0.3, 0.15, 0.25, 0.2, 0.1], dtype=torch.float64)
RIGHT = torch.tensor([1, 1, 0, 0, 0], dtype=torch.float64)
SCORES = torch.eye(5, dtype=torch.float64) - PROBS  # grad log pi of each response


def moments() -> tuple[float, float, float, torch.Tensor, torch.Tensor]:
    p = float((PROBS * RIGHT).sum())
    right, wrong = PROBS * RIGHT / p, PROBS * (1 - RIGHT) / (1 - p)
    square = (SCORES**2).sum(1)
    return p, float(right @ square), float(wrong @ square), right @ SCORES, wrong @ SCORES


def test_sigma_is_the_spread_of_the_weighted_score():
    """By enumeration: E |(r-p) g|^2 - |E (r-p) g|^2, and with the mean of the right ones alone."""
    p, square_1, square_0, mean_1, mean_0 = moments()
    weighted = (RIGHT - p)[:, None] * SCORES
    exact = float(PROBS @ (weighted**2).sum(1) - ((PROBS @ weighted) ** 2).sum())
    gap = ((mean_1 - mean_0) ** 2).sum()
    found = cures.sigma(t(p), t(square_1), t(square_0), gap[None])
    assert float(found**2) == pytest.approx(exact, abs=1e-12)
    of_right = PilotStats(
        t(8), t(8 * p), t(0), t(square_1), (mean_1**2).sum()[None], t(0), t(square_0)
    )
    ours = cures.weights(of_right, t(p), config().allocation)
    assert float(ours**2) == pytest.approx(exact, abs=1e-12)


def test_the_official_variant_is_the_spread_of_the_weighted_norm():
    p, square_1, square_0, *_ = moments()
    norm = SCORES.norm(dim=1)
    norm_1 = float((PROBS * RIGHT / p) @ norm)
    norm_0 = float((PROBS * (1 - RIGHT) / (1 - p)) @ norm)
    scalar = (RIGHT - p) * norm
    exact = float(PROBS @ scalar**2 - (PROBS @ scalar) ** 2)
    of_norms = PilotStats(t(8), t(8 * p), t(norm_1), t(square_1), t(0), t(norm_0), t(square_0))
    ours = cures.weights(of_norms, t(p), config(compat="official").allocation)
    assert float(ours**2) == pytest.approx(exact, abs=1e-12)


def test_swapping_right_and_wrong_changes_nothing():
    one = cures.sigma(t(0.3), t(2.0), t(5.0), t(0.4))
    other = cures.sigma(t(0.7), t(5.0), t(2.0), t(0.4))
    torch.testing.assert_close(one, other)


def test_equal_classes_give_a_bell_and_gvm_does_not():
    """Equal norms, equal class means: sigma = |g| sqrt(p (1-p)); 20 samples by hand."""
    one = torch.ones(5, dtype=torch.float64)
    found = cures.sigma(GRID, 4 * one, 4 * one, 0 * one)
    torch.testing.assert_close(found, 2 * (GRID * (1 - GRID)).sqrt())
    share = 20 * found / found.sum()
    torch.testing.assert_close(share, t(0, 6.34, 7.32, 6.34, 0), atol=5e-3, rtol=0)
    p = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    ones = torch.ones_like(p)
    assert (gvm_weights(p, ones).diff() < 0).all()
    bell = cures.sigma(p, ones, ones, 0 * ones)
    assert (bell[p < 0.49].diff() > 0).all() and (bell[p > 0.49].diff() < 0).all()


def test_without_a_baseline_it_is_gvms_exact_spread():
    """A = r: variance p E_1|g|^2 - p^2 |E_1 g|^2 = p^2 (E_1|g|^2/p - |E_1 g|^2)."""
    p, square_1, _, mean_1, _ = moments()
    weighted = RIGHT[:, None] * SCORES
    spread = float(PROBS @ (weighted**2).sum(1) - ((PROBS @ weighted) ** 2).sum())
    of_right = PilotStats(t(8), t(8 * p), t(0), t(square_1), (mean_1**2).sum()[None], t(0), t(0))
    gvm_config = config("gvm_raft", grad_stat="exact", alpha=0.0).allocation
    assert p**2 * float(gvm.weights(of_right, gvm_config)) ** 2 == pytest.approx(spread, abs=1e-12)


def test_the_posterior_counts_whatever_the_order():
    results = [(3, 1), (0, 2), (5, 0)]
    found = set()
    for order in itertools.permutations(results):
        allocator = algos.make_allocator(config())
        allocator.begin(stats(t(0.5, 0.25)))
        for right, wrong in order:
            allocator.observe(algos.Shares([1], [right + wrong], [1.0]), [right])
        state = allocator.state_dict()
        found.add((tuple(state["right"]), tuple(state["wrong"])))
    assert found == {((4.0, 2.0 + 8), (4.0, 6.0 + 3))}
    rate = cures.posterior_mean(t(4, 10), t(4, 9))
    torch.testing.assert_close(rate, t(5 / 10, 11 / 21))


def test_a_new_shard_forgets():
    allocator = algos.make_allocator(config())
    allocator.begin(stats(t(0.5, 0.25)))
    allocator.observe(algos.Shares([0], [100], [1.0]), [100])
    allocator.begin(stats(t(0.5, 0.25)))
    assert allocator.state_dict()["right"] == [4, 2]


def test_a_step_draws_by_rho_and_shares_its_own_budget():
    allocator = algos.make_allocator(config(budget_per_prompt=6))
    rate = t(0.5, 0.5, 0.0, 1.0, 0.5, 0.25)
    allocator.begin(stats(rate, 1000))
    times = torch.zeros(6)
    for seed in range(400):
        shares = allocator.plan(4, seed)
        assert sum(shares.count_k) == 24 and len(set(shares.index_k)) == len(shares.index_k)
        times[shares.index_k] += 1
    rho = cures.sampling_probs(cures.posterior_mean(1000 * rate, 1000 * (1 - rate)), 0.1)
    expected = 400 * (1 - (1 - rho) ** 4)
    assert ((times - expected).abs() < 5 * (expected * (1 - expected / 400)).sqrt() + 1).all()
    assert allocator.plan(4, 7) == allocator.plan(4, 7)


def test_a_prompt_drawn_twice_is_one_group_that_counts_twice():
    cfg = dataclasses.replace(config(), prompt_weighting="prompt")
    allocator = algos.make_allocator(cfg)
    allocator.begin(stats(t(0.5)))
    shares = allocator.plan(3, 0)
    assert (shares.index_k, shares.count_k, shares.weight_k) == ([0], [24], [3.0])
    by_sample = algos.make_allocator(config())
    by_sample.begin(stats(t(0.5)))
    assert by_sample.plan(3, 0).weight_k == [1.0]


def test_each_time_that_a_prompt_is_drawn_brings_its_own_samples():
    cfg = dataclasses.replace(config(), prompt_weighting="prompt")
    allocator = algos.make_allocator(cfg)
    allocator.begin(stats(t(0.5, 0.5)))
    for seed in range(20):
        shares = allocator.plan(3, seed)
        assert shares.count_k == [8 * times for times in shares.weight_k]


def test_importance_makes_the_mean_that_of_the_data_set():
    """E sum_k weight_k x_k / num_prompts is the mean of x, over all draws of two prompts."""
    cfg = config(importance=True)
    cfg = dataclasses.replace(cfg, prompt_weighting="prompt")
    allocator = algos.make_allocator(cfg)
    rate = t(0.5, 0.25, 0.9)
    allocator.begin(stats(rate, 8))
    rho = cures.sampling_probs(cures.posterior_mean(8 * rate, 8 * (1 - rate)), 0.1)
    value, total, weight_of = t(1, -2, 5), 0.0, {}
    for seed in range(200):
        shares = allocator.plan(2, seed)
        weight_of[tuple(shares.index_k)] = dict(zip(shares.index_k, shares.weight_k, strict=True))
    for i, j in itertools.product(range(3), repeat=2):
        drawn = weight_of[tuple(sorted({i, j}))]
        total += float(rho[i] * rho[j]) * sum(w * float(value[k]) for k, w in drawn.items()) / 2
    assert total == pytest.approx(float(value.mean()), rel=1e-9)


def test_importance_that_samples_undo_is_warned_about():
    section = dataclasses.replace(AlgoConfig().allocation, importance=True)
    for weighting, warned in (("sample", True), ("prompt", False)):
        cfg = AlgoConfig(loss_type="cures_grpo", prompt_weighting=weighting, allocation=section)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            algos.resolve(cfg)
        assert any("still counts by its samples" in str(w.message) for w in caught) is warned


def test_prompts_drawn_twice_do_not_stop_a_run_with_max_samples():
    allocator = algos.make_allocator(config(max_samples=8))
    allocator.begin(stats(t(0.5, 0.25)))
    shares = allocator.plan(5, 0)
    assert shares.count_k == [8] * len(shares.index_k)


def test_a_class_without_pilot_samples_borrows_the_others_norm():
    """All right in the pilot: p is the posterior's, so the prompt is not given up."""
    only_right = PilotStats(t(4), t(4), t(2), t(4), t(0), t(0), t(0))
    rate = cures.posterior_mean(t(4), t(0))
    found = cures.weights(only_right, rate, config().allocation)
    p = 5 / 6
    assert float(found) == pytest.approx(2 * math.sqrt(p * (1 - p)))


def test_a_saved_state_goes_on_where_it_was():
    allocator = algos.make_allocator(config())
    allocator.begin(stats(t(0.5, 0.25, 0.75)))
    shares = allocator.plan(3, 0)
    allocator.observe(shares, [n // 2 for n in shares.count_k])
    other = algos.make_allocator(config())
    other.load_state_dict(json.loads(json.dumps(allocator.state_dict())))
    assert other.plan(3, 5) == allocator.plan(3, 5)


def test_budgets_are_spent_exactly_in_units():
    allocator = algos.make_allocator(config(budget_per_prompt=5, group_size=2))
    allocator.begin(stats(t(0.5, 0.25, 0.75)))
    counts = allocator.plan(3, 1).count_k
    assert sum(counts) == 14 and all(n % 2 == 0 for n in counts)
    assert allocate(torch.ones(2), 5, unit=2).sum() == 4
