"""RAFT, RAFT++ and Reinforce-Rej: what is accepted, and what rejected samples do (nothing)."""

import dataclasses
import itertools
import math

import pytest
import torch

from rlalign import algos
from rlalign.config import AlgoConfig
from rlalign.types import TrainBatch

LENGTH = [3, 1, 4, 2, 4, 3]
GROUP = [0, 0, 1, 1, 2, 2]
ACC = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]


def cfg(loss_type: str, allocation: dict | None = None, **fields) -> AlgoConfig:
    config = AlgoConfig(loss_type=loss_type, **fields)
    section = dataclasses.replace(config.allocation, **(allocation or {}))
    return algos.resolve(
        dataclasses.replace(config, allocation=section), engine_shares_parameters=True
    )


def make_batch(acc=ACC, old_gap: float = 0.0) -> tuple[torch.Tensor, TrainBatch, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    logp_BT = -torch.rand(6, 4, generator=rng, dtype=torch.float64)
    mask_BT = (torch.arange(4) < torch.tensor(LENGTH)[:, None]).double()
    noise_BT = old_gap * torch.randn(6, 4, generator=rng, dtype=torch.float64)
    acc_B = torch.tensor(acc, dtype=torch.float64)
    batch = TrainBatch(
        sequences=tuple((0,) * (n + 1) for n in LENGTH),
        completion_len_B=torch.tensor(LENGTH),
        group_id_B=torch.tensor(GROUP),
        mask_BT=mask_BT,
        reward_B=acc_B,
        logp_rollout_BT=logp_BT + noise_BT,
        logp_old_BT=logp_BT + noise_BT,
    )
    return logp_BT, batch, acc_B


def gradient(config: AlgoConfig, acc=ACC, old_gap: float = 0.0, **changes) -> torch.Tensor:
    logp_BT, batch, acc_B = make_batch(acc, old_gap)
    batch = batch.replace(**changes)
    advantage_BT = algos.compute_advantages(
        batch.reward_B, acc_B, batch.group_id_B, batch.mask_BT, config
    )
    batch = batch.replace(advantage_BT=advantage_BT)
    batch = algos.attach_weights(batch, config, max_completion_length=4)
    leaf_BT = logp_BT.requires_grad_()
    loss = algos.policy_loss(leaf_BT, batch, config).loss
    return torch.autograd.grad(loss, leaf_BT)[0]


@pytest.mark.parametrize("name", ["raft", "raft++"])
def test_on_policy_the_gradient_is_that_of_cross_entropy_on_what_is_accepted(name):
    """The mean over accepted sequences of the mean over their tokens of -logp."""
    expected = [[0.0] * 4 for _ in range(6)]
    for row in (0, 2, 3):
        for t in range(LENGTH[row]):
            expected[row][t] = -1 / 3 / LENGTH[row]
    ours = gradient(cfg(name))
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def test_the_lower_clip_does_nothing_and_the_upper_one_does():
    base = gradient(cfg("raft++"), old_gap=0.5)
    assert torch.equal(gradient(cfg("raft++", epsilon=0.01, epsilon_high=0.28), old_gap=0.5), base)
    assert not torch.equal(gradient(cfg("raft++", epsilon_high=0.01), old_gap=0.5), base)


@pytest.mark.parametrize("over", ["accepted", "all"])
def test_rejected_samples_have_no_gradient(over):
    found = gradient(cfg("raft++", {"normalize_over": over}), old_gap=0.5)
    assert (found[[1, 4, 5]] == 0).all() and (found[[0, 2, 3]] != 0).any()


def test_averaging_over_all_scales_by_the_accepted_share_of_tokens():
    over = {
        name: gradient(cfg("raft", {"normalize_over": name}, loss_agg_mode="token-mean"))
        for name in ("accepted", "all")
    }
    share = (LENGTH[0] + LENGTH[2] + LENGTH[3]) / sum(LENGTH)
    torch.testing.assert_close(over["all"], share * over["accepted"])


def test_the_official_settings_are_those_of_the_published_code():
    assert cfg("raft++", {"compat": "official"}).allocation.normalize_over == "all"
    assert cfg("raft++").allocation.normalize_over == "accepted"


def test_a_prompt_weighted_mean_gives_each_prompt_with_an_accepted_sample_one_share():
    config = cfg("raft", prompt_weighting="prompt", loss_agg_mode="seq-mean-token-sum")
    found = gradient(config)
    assert found[0, 0] == -1 / 2  # alone in its group
    assert found[2, 0] == found[3, 0] == -1 / 4  # two of them


def test_where_nothing_is_accepted_nothing_happens():
    assert not gradient(cfg("raft"), acc=[0.0] * 6).any()


def test_the_kl_goes_over_rejected_samples_too():
    logp_BT = make_batch()[0]
    found = gradient(cfg("raft", beta=0.1), logp_ref_BT=logp_BT - 0.3)
    assert (found[4, :4] != 0).all()


def test_truncated_samples_are_rejected():
    kept_BT = algos.gradient_mask(
        torch.ones(2, 3), torch.ones(2), torch.tensor([True, False]), cfg("raft")
    )
    assert kept_BT.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_unscorable_samples_are_rejected():
    reward_B = torch.tensor([math.nan, 1.0])
    valid_B = reward_B.isfinite()
    accepted_B = algos.accepted(
        reward_B, torch.ones(2), torch.zeros(2, dtype=torch.long), valid_B, cfg("raft")
    )
    assert accepted_B.tolist() == [False, True]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_takes_the_best_of_each_prompt_whatever_the_order(k):
    reward, group = [0.3, 0.9, 0.9, -1.0, 5.0, 0.1], [4, 4, 4, 4, 2, 2]
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 37):
        reward_B = torch.tensor([reward[i] for i in order])
        group_B = torch.tensor([group[i] for i in order])
        config = cfg("raft", {"accept": "top_k", "top_k": k})
        taken = algos.accepted(
            reward_B, torch.zeros(6), group_B, torch.ones(6, dtype=torch.bool), config
        )
        for g in (2, 4):
            values = sorted((reward[i] for i in range(6) if group[i] == g), reverse=True)
            chosen = sorted(reward_B[taken & (group_B == g)].tolist(), reverse=True)
            assert chosen == pytest.approx(values[:k])


def test_reinforce_rej_is_plain_policy_gradient_on_mixed_groups():
    """Group 0 is mixed; groups 1 and 2 are all right and all wrong."""
    rej = gradient(cfg("reinforce_rej"), reward_B=2 * torch.tensor(ACC).double() - 1)
    total = sum(LENGTH)
    assert rej[0, 0] == pytest.approx(-1 / total) and rej[1, 0] == pytest.approx(1 / total)
    assert not rej[2:].any()
