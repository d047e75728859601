"""CoPG on real batches: tokens, masks, lengths, splits, rounding, metrics, bad input."""

import math

import pytest
import torch

from rlalign import algos
from rlalign.algos import AlgoError
from rlalign.algos.copg import copg_advantages, copg_loss, sequence_logratio

BETA = 0.3
EXACT = {"rtol": 0, "atol": 1e-12}
NAN, INF = math.nan, math.inf


def f64(values):
    return torch.as_tensor(values, dtype=torch.float64)


def figures(logp, score, **options):
    output = copg_loss(f64(logp), None, f64(score), beta=BETA, **options)
    return algos.finalize_metrics(output.metrics)


@pytest.mark.parametrize("normalization", ["none", "mean", "const"])
def test_a_log_ratio_is_summed_inside_the_mask_whatever_stands_outside(normalization):
    logp = f64([[-1.0, NAN, -3.0], [-0.5, -2.0, -INF]]).requires_grad_(True)
    ref = f64([[-0.5, INF, -1.0], [-0.25, NAN, NAN]])
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]])
    rho = sequence_logratio(
        logp, ref, mask, length_normalization=normalization, max_completion_length=10
    )
    per_token = {"none": [1, 1], "mean": [2, 1], "const": [10, 10]}[normalization]
    expected = f64([-2.5 / per_token[0], -0.25 / per_token[1]])
    torch.testing.assert_close(rho, expected, **EXACT)
    (gradient,) = torch.autograd.grad(rho.sum(), logp)
    share = [1 / n for n in per_token]
    torch.testing.assert_close(gradient, mask * f64(share)[:, None], **EXACT)


@pytest.mark.parametrize("normalization", ["none", "mean"])
def test_a_row_without_tokens_has_a_log_ratio_of_zero(normalization):
    logp = torch.full((1, 2), NAN, requires_grad=True)
    rho = sequence_logratio(logp, logp, torch.zeros(1, 2), length_normalization=normalization)
    rho.sum().backward()
    assert rho.tolist() == [0.0]
    assert logp.grad is not None and logp.grad.tolist() == [[0.0, 0.0]]


def test_summed_log_probs_are_divided_as_tokens_are():
    logp, ref = torch.randn(2, 6, 5, dtype=torch.float64)
    mask = (torch.rand(6, 5) < 0.6).long()
    mask[:, 0] = 1
    score = torch.randn(6, dtype=torch.float64)
    for name in ("mean", "const"):
        rho = sequence_logratio(logp, ref, mask, length_normalization=name, max_completion_length=5)
        tokens = copg_loss(rho, None, score, num_generations=3, beta=BETA)
        sums = copg_loss(
            (logp * mask).sum(1),
            (ref * mask).sum(1),
            score,
            num_generations=3,
            beta=BETA,
            length_normalization=name,
            length_N=mask.sum(1),
            max_completion_length=5,
        )
        assert sums.loss.item() == pytest.approx(tokens.loss.item(), abs=1e-12)
        torch.testing.assert_close(sums.advantage_N, tokens.advantage_N, **EXACT)


@pytest.mark.parametrize("loss_type", ["square", "surrogate"])
def test_a_normalised_length_divides_the_gradient_too(loss_type):
    logp, score = f64([1.0, -1.0, 0.5]).requires_grad_(True), f64([1.0, 0.0, 0.2])
    length = [4, 2, 8]
    output = copg_loss(
        logp,
        f64([0.0, 1.0, 0.0]),
        score,
        num_generations=3,
        beta=BETA,
        loss_type=loss_type,
        length_normalization="mean",
        length_N=torch.tensor(length),
    )
    a = [1.0 - BETA * 1 / 4, 0.0 + BETA * 2 / 2, 0.2 - BETA * 0.5 / 8]
    expected = [-(x - (sum(a) - x) / 2) / 3 / n for x, n in zip(a, length, strict=True)]
    (gradient_N,) = torch.autograd.grad(output.loss, logp)
    torch.testing.assert_close(gradient_N, f64(expected), **EXACT)


def test_the_parts_of_a_sequence_add_up():
    """As when the tokens of a sequence lie on two devices: partial sums first, then CoPG."""
    logp, ref = torch.randn(2, 4, 9, dtype=torch.float64)
    score, mask = f64([1.0, 0.0, 0.5, 0.2]), torch.ones(4, 9)
    gradients = []
    for cuts in ([9], [5, 4]):
        leaf = logp.clone().requires_grad_(True)
        parts = zip(leaf.split(cuts, 1), ref.split(cuts, 1), mask.split(cuts, 1), strict=True)
        rho = torch.stack([sequence_logratio(*part) for part in parts]).sum(0)
        loss = copg_loss(rho, None, score, num_generations=2, beta=BETA).loss
        gradients += torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_a_row_left_out_changes_only_its_group(garbage):
    logp, score = f64([0.3, -1.0, 2.0, 0.5, 0.1]), f64([1.0, 0.2, -0.4, 0.7, 0.0])
    group_id_N = torch.tensor([0, 0, 0, 1, 1])
    whole_N = copg_advantages(logp, None, score, group_id_N=group_id_N, beta=BETA)
    kept = [0, 2, 3, 4]
    valid_N = torch.tensor([True, False, True, True, True])
    spoilt, worse = logp.clone(), score.clone()
    spoilt[1] = worse[1] = garbage
    leaf = spoilt.requires_grad_(True)
    output = copg_loss(leaf, worse, worse, group_id_N=group_id_N, valid_N=valid_N, beta=BETA)
    smaller = logp[kept].requires_grad_(True)
    without = copg_loss(smaller, score[kept], score[kept], group_id_N=group_id_N[kept], beta=BETA)
    assert output.loss.item() == pytest.approx(without.loss.item(), abs=1e-12)
    (ours_N,) = torch.autograd.grad(output.loss, leaf)
    (theirs_N,) = torch.autograd.grad(without.loss, smaller)
    torch.testing.assert_close(ours_N[kept], theirs_N, **EXACT)
    assert ours_N[1] == 0 and output.advantage_N[1] == 0
    valid_only_N = copg_advantages(
        spoilt.detach(), None, worse, group_id_N=group_id_N, valid_N=valid_N, beta=BETA
    )
    torch.testing.assert_close(valid_only_N[3:], whole_N[3:], **EXACT)
    assert (valid_only_N[[0, 2]] - whole_N[[0, 2]]).abs().min() > 1e-3


SPLITS = ([[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 2, 4], [1, 3, 5, 6, 7]], [[7], [4, 0, 2], [3, 6, 1, 5]])


@pytest.mark.parametrize("loss_type", ["square", "surrogate"])
@pytest.mark.parametrize("split", SPLITS)
def test_micro_batches_of_whole_groups_add_up_to_the_batch(split, loss_type):
    """Three groups, one of a single row: loss, gradient, and every metric."""
    logp, score, weight_N = torch.randn(3, 8, dtype=torch.float64)
    group_id_N = torch.tensor([5, 2, 5, 2, 5, 2, 2, 9])
    weight_N = weight_N.abs()[group_id_N % 3]
    options = {"beta": BETA, "loss_type": loss_type}

    def part_of(rows, **more):
        leaf = logp[rows].requires_grad_(True)
        output = copg_loss(
            leaf,
            None,
            score[rows],
            group_id_N=group_id_N[rows],
            group_weight_N=weight_N[rows],
            **options,
            **more,
        )
        return output, torch.autograd.grad(output.loss, leaf)[0]

    whole, whole_N = part_of(list(range(8)))
    num_groups = sum(float(weight_N[group_id_N == g][0]) for g in (5, 2, 9))
    total, gradient_N, metrics = 0.0, torch.zeros_like(logp), []
    for rows in split:
        output, part_N = part_of(rows, num_groups=num_groups)
        total += output.loss.item()
        gradient_N[rows] += part_N
        metrics.append(output.metrics)
    assert total == pytest.approx(whole.loss.item(), abs=1e-12)
    torch.testing.assert_close(gradient_N, whole_N, **EXACT)
    merged = algos.finalize_metrics(algos.merge_metrics(metrics))
    assert merged == pytest.approx(algos.finalize_metrics(whole.metrics), abs=1e-12)


@pytest.mark.parametrize("scale", ["rloo", "pair", "command_a"])
def test_two_passes_allow_groups_to_be_split(scale):
    """Without a graph first, for the derivative in each log-prob; then any rows at a time."""
    features, ref = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    options = {"num_generations": 3, "beta": BETA, "scale": scale}
    score = torch.randn(6, dtype=torch.float64)
    whole = copg_loss(features @ weight, ref, score, **options).loss
    (expected,) = torch.autograd.grad(whole, weight)
    logp_N = (features @ weight).detach().requires_grad_(True)
    (slope_N,) = torch.autograd.grad(copg_loss(logp_N, ref, score, **options).loss, logp_N)
    for rows in ([0, 4], [1, 5, 2], [3]):
        (slope_N[rows] * (features[rows] @ weight)).sum().backward()
    torch.testing.assert_close(weight.grad, expected, **EXACT)


def test_no_rows_at_all_give_a_loss_that_runs_backward():
    """Every process must take part in the backward pass of a step, also one without rows."""
    empty = torch.zeros(0, requires_grad=True)
    output = copg_loss(
        empty, None, torch.zeros(0), group_id_N=torch.zeros(0, dtype=torch.long), num_groups=3
    )
    output.loss.backward()
    assert output.loss.item() == 0 and empty.grad is not None


def test_float32_follows_float64_over_4096_tokens():
    generator = torch.Generator().manual_seed(0)
    logp = -torch.randn(8, 4096, generator=generator, dtype=torch.float64).abs()
    ref = logp + 0.05 * torch.randn(8, 4096, generator=generator, dtype=torch.float64)
    score, mask = torch.randn(8, generator=generator, dtype=torch.float64), torch.ones(8, 4096)

    def advantages(dtype):
        rho = sequence_logratio(logp.to(dtype), ref.to(dtype), mask)
        found = copg_advantages(rho, None, score.to(dtype), num_generations=4, beta=0.06)
        assert found.dtype == dtype
        return found.double()

    exact = advantages(torch.float64)
    assert ((advantages(torch.float32) - exact) / exact).abs().max() < 1e-4


def test_a_common_offset_of_a_thousand_nats_costs_no_digits_of_the_scores():
    """In one sum, scores of 1e-4 beside beta rho = 3e4 would be rounded to multiples of 2e-3."""
    score = torch.tensor([1e-4, 2e-4, 4e-4])
    found = copg_advantages(torch.full((3,), 1e5), None, score, num_generations=3, beta=BETA)
    expected = [-2e-4, -0.5e-4, 2.5e-4]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_half_precision_is_widened_even_under_autocast():
    logp = torch.tensor([3.0, -2.0, 0.125, 1.0], dtype=torch.bfloat16)
    score = torch.tensor([1.0, 0.0, 0.5, 0.1], dtype=torch.bfloat16)
    plain = copg_loss(logp.float(), None, score.float(), num_generations=2, beta=BETA)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = copg_loss(logp, None, score, num_generations=2, beta=BETA)
    assert found.loss.dtype == found.advantage_N.dtype == torch.float32
    assert found.loss.item() == plain.loss.item()


def test_the_reference_and_the_scores_get_no_gradient():
    logp, ref, score = (torch.randn(4, requires_grad=True) for _ in range(3))
    output = copg_loss(logp, ref, score, num_generations=2)
    output.loss.backward()
    assert ref.grad is None and score.grad is None and logp.grad is not None
    assert not output.advantage_N.requires_grad


def test_metrics_by_hand():
    """Two groups of two, one tied, and a single row; rho ranks the first pair wrongly."""
    found = figures(
        [1.0, 3.0, -2.0, 2.0, -7.0],
        [1.0, 0.0, 0.5, 0.5, 9.0],
        group_id_N=torch.tensor([0, 0, 1, 1, 2]),
    )
    root = math.sqrt(2)
    a = [1 - BETA * 1, 0 - BETA * 3], [0.5 + BETA * 2, 0.5 - BETA * 2]
    gaps = [abs(x - y) for x, y in a]
    assert found == pytest.approx(
        {
            "copg/loss": sum(gap**2 / (4 * BETA) for gap in gaps) / 3,
            "copg/reg_reward_std": sum(gap / root for gap in gaps) / 2,
            "copg/fit_r2": 1 - gaps[0] ** 2 / 1.0,
            "copg/accuracy": 0.0,
            "copg/kl_data": -3.0 / 5,
            "copg/logratio_std": (2 / root + 4 / root) / 2,
            "copg/logratio_abs/max": 7.0,
            "copg/beta_logratio_span": BETA * (2 + 4) / 2,
            "copg/score_span": 0.5,
            "groups/singleton": 1 / 3,
            "groups/tied": 1 / 2,
        }
    )


def test_at_the_reference_nothing_fits_and_pairs_are_a_coin_toss_at_the_optimum_all_do():
    score = [1.0, 0.0, 0.5, 0.3]
    start = figures([0.0] * 4, score, num_generations=2)
    assert start["copg/fit_r2"] == 0.0 and start["copg/accuracy"] == 0.5
    end = figures([r / BETA + 4.0 for r in score], score, num_generations=2)
    assert end["copg/fit_r2"] == pytest.approx(1.0, abs=1e-12) and end["copg/accuracy"] == 1.0
    assert end["copg/reg_reward_std"] == pytest.approx(0.0, abs=1e-12)
    assert end["copg/beta_logratio_span"] == pytest.approx(end["copg/score_span"])
    past = figures([3 * r / BETA for r in score], score, num_generations=2)
    assert past["copg/fit_r2"] == pytest.approx(-3.0)


ONE = torch.zeros(4)
BAD = {
    "completion per prompt": ({"num_generations": 1}, "at least 2 scored.*group 0 has 1"),
    "one source": (
        {"num_generations": 2, "source_id_N": torch.tensor([3, 3, 5, 5])},
        "all of one source",
    ),
    "all left out": ({"num_generations": 2, "valid_N": torch.zeros(4)}, "group 0 has 0"),
    "ragged": ({"num_generations": 3}, "num_generations=3 does not divide.*4; pass group_id_N"),
    "no groups": ({}, "either group_id_N or num_generations"),
    "groups twice": ({"num_generations": 2, "group_id_N": ONE.long()}, "either group_id_N"),
    "too few ids": ({"group_id_N": torch.zeros(3)}, r"group_id_N has shape \(3,\)"),
    "beta 0": ({"num_generations": 2, "beta": 0.0}, "algo.beta=0.*use loss_type=surrogate"),
    "beta -1": ({"num_generations": 2, "beta": -1.0}, "algo.beta=-1.0 must be >= 0"),
    "beta 0, command_a": (
        {"num_generations": 2, "beta": 0.0, "loss_type": "surrogate", "scale": "command_a"},
        "scale=rloo or pair",
    ),
    "loss_type": ({"num_generations": 2, "loss_type": "cube"}, "algo.copg.loss_type='cube'"),
    "scale": ({"num_generations": 2, "scale": "x"}, "algo.copg.scale='x' is none of rloo, pair"),
    "normalization": (
        {"num_generations": 2, "length_normalization": "sum"},
        "algo.copg.length_normalization='sum' is none of",
    ),
    "no lengths": (
        {"num_generations": 2, "length_normalization": "mean"},
        "length_normalization=mean.*length_N, which is missing",
    ),
    "no limit": ({"num_generations": 2, "length_normalization": "const"}, "length=None"),
    "num_groups": ({"num_generations": 2, "num_groups": 0}, "num_groups=0.0"),
    "no weight": ({"num_generations": 2, "group_weight_N": ONE}, "num_groups=0.0"),
    "uneven weight": (
        {"num_generations": 2, "group_weight_N": torch.tensor([1.0, 1.0, 1.0, 2.0])},
        "group_weight_N of group 1 differs",
    ),
    "pair weights, rloo": (
        {"num_generations": 2, "pair_weight_NN": torch.ones(4, 4)},
        "use loss_type=square with scale=pair",
    ),
    "asymmetric": (
        {
            "num_generations": 2,
            "scale": "pair",
            "pair_weight_NN": torch.arange(16.0).reshape(4, 4),
        },
        "rows 0 and 1.*not symmetric",
    ),
    "pair weight shape": (
        {"num_generations": 2, "scale": "pair", "pair_weight_NN": torch.ones(2, 2)},
        r"give one weight for each two rows, \(4, 4\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_refused_with_the_reason(name):
    options, message = BAD[name]
    with pytest.raises(AlgoError, match=message):
        copg_loss(ONE, ONE, torch.tensor([1.0, 0.0, 0.5, 0.2]), **options)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_scores_and_references_must_be_finite(bad):
    group_id_N = torch.tensor([7, 8, 7, 8])
    spoilt = torch.tensor([0.5, bad, 0.0, bad])
    with pytest.raises(AlgoError, match="scores must be finite; found 2 non-finite in group 8"):
        copg_loss(ONE, ONE, spoilt, group_id_N=group_id_N)
    with pytest.raises(AlgoError, match=f"pi_ref assigns {bad} to completion 0 of group 8"):
        copg_loss(ONE, spoilt, ONE, group_id_N=group_id_N)


def test_missing_scores_are_an_error_not_a_broadcast():
    for scores in (torch.zeros(3), torch.zeros(1), torch.zeros(4, 1)):
        with pytest.raises(AlgoError, match="score_N has shape"):
            copg_loss(ONE, ONE, scores, num_generations=2)


def test_a_micro_batch_of_single_rows_is_no_error_in_a_batch_that_has_pairs():
    leaf = torch.randn(2, requires_grad=True)
    output = copg_loss(leaf, None, torch.ones(2), num_generations=1, num_groups=5)
    output.loss.backward()
    assert output.loss.item() == 0 and leaf.grad is not None and leaf.grad.tolist() == [0.0, 0.0]
