"""Trees of denoising steps: their leaves have the law of single samples, and siblings that of
siblings."""

from __future__ import annotations

import pytest
import torch

from rlalign.algos import tree as trees
from rlalign.config.schema import FlowConfig
from rlalign.rollout.flow import FlowTrees, grow, make_plan, resolve_flow, sample_ode

MEAN, SD, D = 0.7, 0.5, 3  # of the data, a Gaussian


def exact(z_NX, sigma_N, tree_N):
    """The velocity of a Gaussian's flow: E[eps - x0 | z], linear in z."""
    sigma = sigma_N.reshape(-1, *[1] * (z_NX.ndim - 1))
    variance = (1 - sigma) ** 2 * SD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * SD**2) / variance * (z_NX - (1 - sigma) * MEAN)


def grown(num_trees: int, seed: int = 0, **settings) -> FlowTrees:
    cfg = resolve_flow(FlowConfig(terminal="sample", **settings), "rlalign")
    keys = [(f"p{i}", 0) for i in range(num_trees)]
    group_R = torch.arange(num_trees)
    return grow(make_plan(cfg, 0), exact, keys, group_R, (D,), cfg, seed=seed, iteration=0)


@pytest.mark.parametrize("kind, eta", [("dance", 0.6), ("flow", 0.7)])
@pytest.mark.parametrize("splits, factors", [([0, 3], [2]), ([1, 2], [3, 2])])
def test_leaves_have_the_law_of_single_samples(kind, eta, splits, factors):
    """Whatever the correlation of siblings: each is N(0, I) by itself."""
    options = {"num_steps": 12, "sde_kind": kind, "eta": eta}
    tree = grown(3000, split_steps=splits, branch_factor=factors, branch_corr=1.0, **options)
    alone = grown(6000, seed=1, split_steps=[], **options)
    first = tree.final_LX[:: tree.final_LX.shape[0] // 3000]  # one leaf a tree: independent
    for leaves in (first, tree.final_LX):
        assert float(leaves.mean()) == pytest.approx(float(alone.final_LX.mean()), abs=0.03)
        assert float(leaves.var()) == pytest.approx(float(alone.final_LX.var()), rel=0.06)
    assert float(alone.final_LX.mean()) == pytest.approx(MEAN, abs=0.05)


def test_the_deterministic_sampler_reaches_the_data():
    cfg = FlowConfig(num_steps=200)
    x0 = sample_ode(exact, [(f"p{i}", 0) for i in range(2000)], (D,), cfg, seed=0, iteration=0)
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x0.std()) == pytest.approx(SD, rel=0.04)


@pytest.mark.parametrize("corr, rho", [(1.0, 0.5), (4.0, 1 / 17), (None, 0.0)])
def test_siblings_correlate_as_told_at_the_split(corr, rho):
    found = grown(4000, num_steps=4, split_steps=[0], branch_factor=[2], branch_corr=corr)
    start, pairs = found.state_DMX[0], found.state_DMX[1].view(-1, 2, D)
    plain = grown(4000, num_steps=4, split_steps=[])
    assert torch.equal(plain.state_DMX[0], start)  # the start does not know of splits
    mean = torch.stack([_mean_of_first_step(start)] * 2, 1)
    noise = (pairs - mean) / 0.7  # at sigma = 1 the std of kind flow is eta
    assert float((noise**2).mean()) == pytest.approx(1.0, abs=0.03)
    assert float((noise[:, 0] * noise[:, 1]).mean()) == pytest.approx(rho, abs=0.03)


def _mean_of_first_step(z):
    """z + d [v + g^2 / 2 eps_hat] at sigma = 1, where eps_hat = z, and d = -1/4, g^2 = .49 * 4."""
    v = exact(z, torch.ones(len(z)), None)
    return z - 0.25 * (v + 0.49 * 4 / 2 * z)


def test_the_rewarded_prediction_does_not_know_the_last_noise():
    cfg = resolve_flow(FlowConfig(num_steps=5, split_steps=[1], branch_factor=[2]), "rlalign")
    plan, keys = make_plan(cfg, 0), [("p", 0)]
    found = grow(plan, exact, keys, torch.zeros(1).long(), (D,), cfg, seed=0, iteration=0)
    last = found.state_DMX[4]
    sigma = torch.full((len(last),), float(plan.sigma_T1[4]))
    assert torch.equal(found.final_LX, last - sigma[:, None] * exact(last, sigma, None))
    trees.validate(found.tree)
    assert trees.is_leaf(found.tree).sum() == 2


def test_one_start_for_all_or_one_for_each():
    apart = grown(3, num_steps=3, split_steps=[]).state_DMX[0]
    shared = grown(3, num_steps=3, split_steps=[], shared_start=True)
    assert not torch.equal(apart[0], apart[1])
    assert torch.equal(shared.state_DMX[0][0], shared.state_DMX[0][1])
    assert not torch.equal(shared.final_LX[0], shared.final_LX[1])  # each its own way
