"""GVM's weights: closed forms, limits, optimality, and the variance they promise."""

import dataclasses
import itertools
import math

import pytest
import torch

from rlalign import algos
from rlalign.algos import PilotStats, gvm
from rlalign.algos.allocate import allocate
from rlalign.algos.gvm import gvm_weights
from rlalign.config import AlgoConfig


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def config(loss_type: str = "gvm_raft", **allocation) -> AlgoConfig:
    cfg = AlgoConfig(loss_type=loss_type)
    section = dataclasses.replace(cfg.allocation, **allocation)
    return algos.resolve(
        dataclasses.replace(cfg, allocation=section), engine_shares_parameters=True
    )


def stats(rate: torch.Tensor, norm: torch.Tensor, num_samples: int = 8) -> PilotStats:
    count = torch.full_like(rate, num_samples)
    zero = torch.zeros_like(rate)
    return PilotStats(count, rate * num_samples, norm, norm**2, zero, norm, norm**2)


def test_weights_of_the_proposition():
    """By hand: 1/sqrt(p + 1e-3 / p)."""
    found = gvm_weights(t(1, 0.5, 0.25, 0.125), t(1, 1, 1, 1))
    torch.testing.assert_close(found, t(0.999500, 1.411394, 1.984189, 2.742042), atol=1e-6, rtol=0)


def test_without_damping_they_are_neymans_and_with_much_the_opposite():
    rate, norm = t(0.9, 0.3, 0.01), t(2, 1, 3)
    torch.testing.assert_close(gvm_weights(rate, norm, alpha=0), norm / rate.sqrt())
    damped = gvm_weights(rate, norm, alpha=1e12)
    torch.testing.assert_close(damped / damped[0], norm * rate.sqrt() / (2 * math.sqrt(0.9)))


@pytest.mark.parametrize(("alpha", "beta"), [(1e-3, 2.0), (0.02, 3.0)])
def test_they_rise_to_the_published_peak_and_fall_after_it(alpha, beta):
    peak = (alpha * (beta - 1)) ** (1 / beta)
    p = torch.linspace(1e-4, 1, 5001, dtype=torch.float64)
    w = gvm_weights(p, torch.ones_like(p), alpha, beta)
    assert (w[p < peak].diff() > 0).all() and (w[p > peak].diff() < 0).all()
    highest = float(gvm_weights(t(peak), t(1), alpha, beta))
    assert highest == pytest.approx(math.sqrt((beta - 1) / (beta * peak)), rel=1e-12)
    if (alpha, beta) == (1e-3, 2.0):
        assert (peak, highest) == pytest.approx((0.031623, 3.976354), abs=1e-6)


def test_what_cannot_be_weighed_weighs_nothing():
    found = gvm_weights(t(0, 0.5, 0.5, math.nan, 0.5), t(1, 0, math.inf, 1, math.nan))
    assert found.tolist() == [0] * 5


def test_norms_scale_the_shares_and_a_common_factor_does_not():
    rate = t(0.2, 0.5, 0.9, 0.5)
    norm = t(1.0, 2.0, 0.5, 3.0)
    count = allocate(gvm_weights(rate, norm), 400)
    assert torch.equal(allocate(gvm_weights(rate, 7.3 * norm), 400), count)
    more = allocate(gvm_weights(rate, norm * t(1, 1.5, 1, 1)), 400)
    assert more[1] > count[1] and (more[[0, 2, 3]] < count[[0, 2, 3]]).all()


def test_no_other_shares_have_a_smaller_variance():
    """KKT: w^2/n^2 is constant, and moving a little from any prompt to any other only adds."""
    rate, norm, alpha, beta = t(0.1, 0.4, 0.8, 1.0), t(1, 2, 1, 4), 1e-3, 2.0
    weight = gvm_weights(rate, norm, alpha, beta)
    share = 100 * weight / weight.sum()
    part = norm**2 / (rate * (1 + alpha / rate**beta))  # of the damped variance, by its text
    torch.testing.assert_close(part / share**2, (part / share**2)[:1].expand(4))
    least = float((part / share).sum())
    for i, j in itertools.permutations(range(4), 2):
        moved = share.clone()
        moved[i] -= 0.01
        moved[j] += 0.01
        assert float((part / moved).sum()) > least


def test_a_bound_on_accepted_samples():
    """sum n p >= N h sum_i G_i/(sum G) p_i/sqrt(p_i + alpha p_i^(1-beta)), h the exact constant
    sqrt(beta/(beta-1)) (alpha (beta-1))^(1/(2 beta)): 1 over the peak of w/G."""
    rng = torch.Generator().manual_seed(0)
    for alpha, beta in [(1e-3, 2.0), (0.05, 2.5), (0.2, 4.0)]:
        p = torch.rand(50, generator=rng, dtype=torch.float64).clamp(0.02)
        norm = torch.rand(50, generator=rng, dtype=torch.float64) + 0.1
        w = gvm_weights(p, norm, alpha, beta)
        h = math.sqrt(beta / (beta - 1)) * (alpha * (beta - 1)) ** (1 / (2 * beta))
        bound = float(h * (w * p).sum() / norm.sum())
        assert float((w / w.sum() * p).sum()) >= bound


# Six responses of one prompt, the first three right; one-parameter scores g per response.
PROBS = (0.1, 0.15, 0.05, 0.4, 0.2, 0.1)
SCORES = (1.3, -0.4, 2.0, 0.7, -1.1, 0.2)
RIGHT = (0, 1, 2)


def enumerate_draws(n: int):
    for draw in itertools.product(range(6), repeat=n):
        yield math.prod(PROBS[y] for y in draw), draw


def test_the_estimator_is_unbiased_and_its_variance_is_the_exact_one():
    """All 216 draws of three samples: Lemma 1, the shrink of the prompt mean, the variance."""
    n, p = 3, sum(PROBS[y] for y in RIGHT)
    posterior = {y: PROBS[y] / p for y in RIGHT}
    mean = sum(posterior[y] * SCORES[y] for y in RIGHT)
    square = sum(posterior[y] * SCORES[y] ** 2 for y in RIGHT)
    lemma, prompt_mean, second = 0.0, 0.0, 0.0
    for chance, draw in enumerate_draws(n):
        accepted = [SCORES[y] for y in draw if y in RIGHT]
        value = sum(accepted) / (n * p)
        lemma += chance * value
        second += chance * value**2
        prompt_mean += chance * (sum(accepted) / len(accepted) if accepted else 0.0)
    assert lemma == pytest.approx(mean, abs=1e-12)
    assert prompt_mean == pytest.approx((1 - (1 - p) ** n) * mean, abs=1e-12)
    assert second - lemma**2 == pytest.approx((square / p - mean**2) / n, abs=1e-12)
    exact = PilotStats(t(8), t(8 * p), t(0), t(square), t(mean**2), t(0), t(0))
    weight = gvm.weights(exact, config(grad_stat="exact", alpha=0.0).allocation)
    assert float(weight**2) == pytest.approx(n * (second - lemma**2), rel=1e-9)


@pytest.mark.parametrize("shares", [(2, 2), (1, 5)])
def test_pilot_and_own_samples_together_stay_unbiased(shares):
    """Two pilot samples decide how many more are drawn, 2 or `shares`: with the weights that the
    loss puts on both groups the expectation is right, with pooled samples it is not."""
    own = {0: shares[1], 1: 2, 2: shares[0]}  # right pilot samples -> more samples
    cfg = config(num_pilot_samples=2, budget_per_prompt=3)
    truth = sum(PROBS[y] * SCORES[y] for y in RIGHT)
    found, pooled = 0.0, 0.0
    value = [SCORES[y] if y in RIGHT else 0.0 for y in range(6)]
    for chance, pilot in enumerate_draws(2):
        n = own[sum(y in RIGHT for y in pilot)]
        first = sum(value[y] for y in pilot)
        weight_B = algos.aggregation_weights(
            torch.ones(2 + n, 1, dtype=torch.float64),
            torch.tensor([0] * n + [1] * 2),
            cfg,
            max_completion_length=1,
            group_weight_B=torch.tensor([1.0] * n + [algos.pilot_weight(cfg)] * 2),
        )[:, 0].tolist()
        later = sum(weight_B[:n]) * truth  # the expectation of those
        found += chance * (
            later + sum(w * value[y] for w, y in zip(weight_B[n:], pilot, strict=True))
        )
        pooled += chance * (first + n * truth) / (2 + n)
        assert sum(weight_B[n:]) / sum(weight_B[:n]) == pytest.approx(2 / 3)  # N'/b
    assert found == pytest.approx(truth, abs=1e-9)
    assert abs(pooled - truth) > 1e-3 or shares == (2, 2)


def test_estimates_of_a_pilot():
    """Two prompts: three right and one wrong sample, one wrong one."""
    norm_B = torch.tensor([1.0, 2.0, 3.0, 7.0, 5.0])
    right_B = torch.tensor([True, True, True, False, False])
    prompt_B = torch.tensor([0, 0, 0, 0, 1])
    found = PilotStats.of_norms(norm_B, right_B, prompt_B, 2, torch.tensor([2.0, 0.0]))
    assert found.rate_m.tolist() == [0.75, 0]
    assert found.right_norm_m.tolist() == [2, 0] and found.wrong_norm_m.tolist() == [7, 5]
    torch.testing.assert_close(found.right_square_m, t(14 / 3, 0))
    torch.testing.assert_close(found.right_mean_square_m, t((9 * 2.0 - 14) / 6, 0))


def test_a_norm_that_is_not_finite_and_the_mean_of_one_sample_say_nothing():
    norm_B = torch.tensor([3.0, math.inf, 2.0])
    found = PilotStats.of_norms(
        norm_B,
        torch.ones(3, dtype=torch.bool),
        torch.tensor([0, 0, 1]),
        2,
        torch.tensor([1.0, 4.0]),
    )
    assert found.right_norm_m.tolist() == [1.5, 2]
    assert found.right_mean_square_m.tolist() == [(4 * 1.0 - 2 * 4.5) / 2, 0]


def test_a_prior_adds_samples_of_the_mean_rate_and_accepted_ones_of_the_mean_norm():
    """Rates 3/4, 1/4 and 0, mean 1/3; norms 2 (three times) and 6: mean 3. A prior of 6 samples is
    two accepted ones more."""
    allocator = algos.make_allocator(config(rate_prior=6.0))
    allocator.begin(stats(t(0.75, 0.25, 0), t(2, 6, 0), num_samples=4))
    rate, norm = t(5, 3, 2) / 10, t((6 + 6) / 5, (6 + 6) / 3, 3)
    assert allocator.plan(3, 0).count_k == allocate(gvm_weights(rate, norm), 24).tolist()
    state = allocator.state_dict()["stats"]
    assert state["right_norm_m"] == pytest.approx(norm.tolist())
    assert state["right_square_m"] == pytest.approx([(12 + 24) / 5, (36 + 24) / 3, 12])


@pytest.mark.parametrize(("grad_stat", "norm"), [("mean", 2.0), ("rms", 3.0), ("exact", 2.0)])
def test_which_norm_weighs(grad_stat, norm):
    """Mean norm 2, mean square 9, of which 10 p are the mean gradient's, p = 1/2."""
    found = PilotStats(t(8), t(4), t(2), t(9), t(10), t(0), t(0))
    weight = gvm.weights(found, config(grad_stat=grad_stat, alpha=0.0).allocation)
    assert float(weight) == pytest.approx(norm / math.sqrt(0.5))


def test_a_pilot_group_counts_by_its_samples_or_by_what_they_are_of_the_budget():
    numbers = {"num_pilot_samples": 4, "budget_per_prompt": 8.0, "pilot_weight": 0.5}
    cfg = config(**numbers)
    assert algos.pilot_weight(cfg) == 0.25
    assert algos.pilot_weight(dataclasses.replace(cfg, prompt_weighting="sample")) == 0.5


def test_the_squared_mean_is_estimated_without_bias():
    """Over all ordered pairs drawn from three vectors, with replacement."""
    vectors = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -0.7]], dtype=torch.float64)
    truth = float((vectors.mean(0) ** 2).sum())
    total = 0.0
    for i, j in itertools.product(range(3), repeat=2):
        both = vectors[[i, j]]
        found = PilotStats.of_norms(
            both.norm(dim=1),
            torch.tensor([True, True]),
            torch.tensor([0, 0]),
            1,
            (both.mean(0) ** 2).sum()[None],
        )
        total += float(found.right_mean_square_m) / 9
    assert total == pytest.approx(truth, abs=1e-12)


def test_a_shard_is_shared_out_once_and_taken_in_order():
    allocator = algos.make_allocator(config(budget_per_prompt=8))
    rate, norm = t(1, 0.5, 0.25, 0.125, 0), t(1, 1, 1, 1, 1)
    allocator.begin(stats(rate, norm))
    first, second = allocator.plan(3, seed=1), allocator.plan(3, seed=2)
    expected = allocate(gvm_weights(rate, norm), 40).tolist()
    assert first.count_k + second.count_k == expected and expected[4] == 0
    assert (first.index_k, second.index_k) == ([0, 1, 2], [3, 4])


def test_equal_prompts_get_equal_shares():
    allocator = algos.make_allocator(config())
    allocator.begin(stats(torch.full((6,), 0.5, dtype=torch.float64), torch.ones(6)))
    assert allocator.plan(6, 0).count_k == [8] * 6
    assert allocator.metrics()["allocation/predicted_variance_ratio"] == pytest.approx(1)


@pytest.mark.parametrize(("on_empty", "expected"), [("uniform", [8, 8]), ("skip", [0, 0])])
def test_where_no_pilot_sample_was_right(on_empty, expected):
    allocator = algos.make_allocator(config(on_empty=on_empty))
    allocator.begin(stats(t(0, 0), t(0, 0)))
    assert allocator.plan(2, 0).count_k == expected
    assert allocator.metrics()["allocation/fallbacks"] == 1


def test_what_no_prompt_may_take_is_not_spent():
    """Of four prompts one was right in the pilot, and it may take 12 samples of the 32."""
    allocator = algos.make_allocator(config(max_samples=12))
    allocator.begin(stats(t(0.5, 0, 0, 0), torch.ones(4)))
    assert allocator.plan(4, 0).count_k == [12, 0, 0, 0]
    bounded = algos.make_allocator(config(min_samples=2, max_samples=13, group_size=3))
    bounded.begin(stats(t(0.5, 0, 0, 0), torch.ones(4)))
    assert bounded.plan(4, 0).count_k == [12, 3, 3, 3]


def test_filters_of_the_published_code():
    rate, norm = t(1, 0.9, 0.5, 0.1), t(1, 1, 1, 1)
    easy = algos.make_allocator(config(filter_threshold=0.8))
    easy.begin(stats(rate, norm))
    assert [n > 0 for n in easy.plan(4, 0).count_k] == [False, False, True, True]
    few = algos.make_allocator(config(filter_insufficient=2.0, alpha=0.0))
    few.begin(stats(rate, norm))
    shares = 32 * gvm_weights(rate, norm, 0) / gvm_weights(rate, norm, 0).sum()
    assert [n > 0 for n in few.plan(4, 0).count_k] == (rate * shares >= 2).tolist()


def test_propensities_weigh_each_prompt_by_its_samples_and_rate():
    cfg = config(train_on_pilot=False)
    cfg = algos.resolve(
        dataclasses.replace(cfg, prompt_weighting="inverse_propensity"),
        engine_shares_parameters=True,
    )
    allocator = algos.make_allocator(cfg)
    rate = t(1, 0.5, 0.25)
    allocator.begin(stats(rate, torch.ones(3)))
    shares = allocator.plan(3, 0)
    assert shares.weight_k == pytest.approx(
        [1 / n / p for n, p in zip(shares.count_k, rate.tolist(), strict=True)]
    )


def test_a_saved_state_goes_on_where_it_was():
    import json

    allocator = algos.make_allocator(config())
    allocator.begin(stats(t(1, 0.5, 0.25, 0.125), t(1, 2, 1, 1)))
    allocator.plan(1, 0)
    other = algos.make_allocator(config())
    other.load_state_dict(json.loads(json.dumps(allocator.state_dict())))
    assert other.plan(2, 0) == allocator.plan(2, 0)
    assert other.metrics() == allocator.metrics()


@pytest.mark.parametrize(
    ("loss_type", "fields", "allocation", "says"),
    [
        ("raft", {"prompt_weighting": "inverse_propensity"}, {}, "needs the n and p"),
        ("gvm_raft", {"prompt_weighting": "inverse_propensity"}, {}, "train_on_pilot"),
        ("gvm_raft", {}, {"grad_stat": "exact", "grad_reduction": "mean"}, "norm of a mean"),
        ("cures_grpo", {}, {"grad_params": "embed_tokens"}, "norm of a mean"),
        ("gvm_raft", {}, {"min_samples": 9}, "within the budget"),
        ("gvm_raft", {}, {"min_samples": 3, "budget_per_prompt": 3.0}, "whole units"),
        ("gvm_raft", {}, {"max_samples": 1}, "one unit"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(loss_type, fields, allocation, says):
    cfg = AlgoConfig(loss_type=loss_type, **fields)
    section = dataclasses.replace(cfg.allocation, group_size=2, **allocation)
    with pytest.raises(algos.AlgoError, match=says):
        algos.resolve(dataclasses.replace(cfg, allocation=section))


def test_singletons_under_a_group_baseline_are_warned_of():
    with pytest.warns(algos.AlgoWarning, match="it is wasted"):
        config("gvm_grpo", group_size=1)
    assert config("gvm_grpo").allocation.group_size == 2
    assert config("gvm_raft").allocation.group_size == 1
