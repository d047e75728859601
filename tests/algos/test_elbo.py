"""Losses of estimated log-probs: one ratio per completion, and the figures of the estimates.

Legend: B rows, J passes, T tokens.
"""

import dataclasses

import pytest
import torch

from rlalign import algos
from rlalign.types import Masks, TrainBatch
from rlalign.verify.cases import config
from rlalign.verify.elbo import make_case, value_and_slopes


def small_batch(**fields) -> TrainBatch:
    """Two rows of three tokens and one, two passes each."""
    hidden_BJT = torch.tensor([[[1, 0, 1], [0, 1, 0]], [[1, 0, 0], [1, 0, 0]]]).bool()
    weight_BJT = torch.tensor([[[0.75, 0, 0.75], [0, 1.5, 0]], [[0.5, 0, 0], [0.5, 0, 0]]])
    mask_BT = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    return TrainBatch(
        sequences=((1, 2, 3, 4), (1, 2)),
        completion_len_B=torch.tensor([3, 1]),
        group_id_B=torch.tensor([0, 0]),
        mask_BT=mask_BT,
        reward_B=torch.tensor([1.0, 0.0]),
        logp_rollout_BT=torch.zeros(2, 3),
        masks=Masks(hidden_BJT, weight_BJT),
        **fields,
    )


LOGP_BJT = torch.tensor([[[-1.0, 9, -2], [9, -3, 9]], [[-4.0, 9, 9], [-6.0, 9, 9]]])


def test_an_estimate_is_the_weighted_sum_over_passes():
    batch = small_batch()
    estimate_BT = algos.combine(LOGP_BJT, batch.masks)
    assert estimate_BT.tolist() == [[-0.75, -4.5, -1.5], [-5, 0, 0]]
    pass_BJ = algos.pass_estimates(LOGP_BJT, batch.masks)
    assert pass_BJ.tolist() == [[-4.5, -9.0], [-4.0, -6.0]]
    assert pass_BJ.mean(1).tolist() == estimate_BT.sum(1).tolist()


def estimate_metrics(batch, estimator):
    return algos.estimate_metrics(algos.pass_estimates(LOGP_BJT, batch.masks), batch, estimator)


def test_figures_of_the_estimates():
    figures = algos.finalize_metrics(estimate_metrics(small_batch(), "count_strat"))
    assert figures["elbo/per_token"] == pytest.approx((-6.75 - 5.0) / 4)
    spread = [torch.tensor([-4.5, -9.0]).std(), torch.tensor([-4.0, -6.0]).std()]
    assert figures["elbo/std_error"] == pytest.approx(float(sum(spread)) / 2**0.5 / 2)
    traced = estimate_metrics(small_batch(), "trace")
    assert set(traced) == {"elbo/per_token"}  # its passes are no estimates each
    assert not estimate_metrics(small_batch(), "block_noise")


def test_a_row_without_masks_counts_nowhere():
    batch = small_batch()
    weight_BJT = batch.masks.weight_BJT.clone()
    weight_BJT[1] = 0
    batch = batch.replace(masks=Masks(batch.masks.hidden_BJT, weight_BJT))
    assert algos.num_passes(batch.masks).tolist() == [2, 0]
    figures = algos.finalize_metrics(estimate_metrics(batch, "count"))
    assert figures["elbo/per_token"] == pytest.approx(-6.75 / 3)


@pytest.mark.parametrize(
    ("norm", "divisor"), [("none", [1, 1]), ("valid", [3, 1]), ("canvas", [8, 8])]
)
def test_what_divides_an_estimate(norm, divisor):
    cfg = config("bgpo")
    cfg = dataclasses.replace(cfg, likelihood=dataclasses.replace(cfg.likelihood, norm=norm))
    assert algos.ratio_divisor(small_batch(), cfg, 8).tolist() == divisor


def test_advantages_and_shares_of_rows():
    weight_BT = torch.tensor([[0.1, 0.1, 0.1], [0.7, 0, 0]])
    advantage_BT = torch.tensor([[1.0, 2.0, 3.0], [-1, 0, 0]])
    batch = small_batch(weight_BT=weight_BT, advantage_BT=advantage_BT)
    assert algos.row_advantage(batch).tolist() == pytest.approx([2.0, -1.0])
    assert algos.policy_weight(batch).tolist() == pytest.approx([0.3, 0.7])
    accepted = batch.replace(policy_weight_BT=weight_BT * 2)
    assert algos.policy_weight(accepted).tolist() == pytest.approx([0.6, 1.4])


def test_slopes_without_values_are_those_at_the_policy_that_sampled():
    """What the trainer counts on when it saves the first run: for every algorithm that says so."""
    for name in ("bgpo", "grpo", "gspo", "cispo", "wd1", "diffu_grpo", "espo"):
        cfg = dataclasses.replace(config(name, mismatch={"rollout_is": "none"}), beta=0.0)
        case = make_case(cfg)
        batch = case.batch.replace(logp_old_BJT=None)
        assert not algos.slopes_need_values(batch, cfg)
        _, known_BJT = value_and_slopes(case.logp_BJT, batch, cfg)
        _, unknown_BJT = value_and_slopes(torch.zeros_like(case.logp_BJT), batch, cfg)
        assert float(known_BJT.abs().max()) > 0
        torch.testing.assert_close(known_BJT, unknown_BJT, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["spg", "vrpo", "copg"])
def test_slopes_that_depend_on_values_say_so(name):
    cfg = config(name)
    batch = make_case(cfg).batch.replace(logp_old_BJT=None)
    assert algos.slopes_need_values(batch, cfg)


def test_old_estimates_are_needed_where_something_compares_with_them():
    several = {"num_iterations": 2}
    for name, needed in {"bgpo": 1, "wd1": 0, "spg": 0, "vrpo": 0, "tracerl": 1}.items():
        assert algos.needs_old_estimates(config(name, **several)) is bool(needed), name
    assert not algos.needs_old_estimates(config("bgpo"))


def test_vrpo_prefers_within_a_prompt_and_among_those_that_train():
    from rlalign.algos.vrpo import preferences

    batch = make_case(config("vrpo")).batch
    better_P, worse_P = preferences(batch, 1e-8)
    pairs = set(zip(better_P.tolist(), worse_P.tolist(), strict=True))
    # prompt 7 has rewards 1, .5, 0 in rows 0, 2, 4 (row 7 is empty), prompt 3 has 0, 1 in 1, 3
    assert pairs == {(0, 2), (0, 4), (2, 4), (3, 1)}


def test_spgs_upper_bound_is_above_its_lower_one():
    """With every pass masking the same share, a mean of logs below a log of means."""
    from rlalign.algos.spg import upper_bound

    hidden_BJT = torch.ones(3, 4, 5, dtype=torch.bool)
    masks = Masks(hidden_BJT, torch.full((3, 4, 5), 1 / 20))
    logp_BJT = -3 * torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    high_B = upper_bound(logp_BJT, masks, torch.full((3,), 5), 1.0)
    assert bool((high_B > algos.combine(logp_BJT, masks).sum(1)).all())
    far = upper_bound(logp_BJT - 500, masks, torch.full((3,), 5), 2.0)  # exp would be 0
    assert bool(far.isfinite().all())


def test_wd1_pulls_up_and_down_by_the_same_amount():
    cfg = config("wd1")
    reward_B = torch.tensor([1.0, 0.0, 0.25, 1.0, 1.0, float("nan"), 7.0])
    group_id_B = torch.tensor([0, 0, 0, 1, 1, 0, 2])
    mask_BT = torch.ones(7, 2)
    advantage_BT = algos.compute_advantages(reward_B, reward_B, group_id_B, mask_BT, cfg)
    assert float(advantage_BT[:3, 0].sum()) == pytest.approx(0, abs=1e-6)
    assert advantage_BT[0, 0] > 0 > advantage_BT[1, 0]
    assert advantage_BT[3:].abs().max() == 0  # tied, unscorable, alone
    shifted = algos.compute_advantages(reward_B + 900, reward_B, group_id_B, mask_BT, cfg)
    torch.testing.assert_close(shifted, advantage_BT, rtol=1e-4, atol=1e-4)
