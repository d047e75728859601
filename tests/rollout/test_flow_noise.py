"""Noise of denoising trees: a function of its key alone, normal, and correlated as promised."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from rlalign.rollout.flow_noise import edge_noise, initial_noise, sibling_noise
from rlalign.rollout.flow_steps import FlowError, sde_step, step_mean, step_table, time_grid
from rlalign.rollout.seeds import noise_key, sample_seed

TREES = [("digits/3", 0), ("digits/7", 0), ("digits/3", 1), ("", 0)]


@pytest.mark.parametrize("branch_factor", [1, 3])
def test_a_tree_draws_the_same_alone_in_any_order_and_in_any_company(branch_factor):
    def noise(trees):
        return edge_noise(5, 2, 4, trees, 8, (3, 3), branch_factor=branch_factor)

    together, backwards = noise(TREES), noise(TREES[::-1])
    assert together.shape == (4, 8, branch_factor, 3, 3)
    assert torch.equal(together, backwards.flip(0))
    for row, tree in enumerate(TREES):
        assert torch.equal(noise([tree])[0], together[row])
        alone = initial_noise(5, 2, [tree], (7,))
        assert torch.equal(alone[0], initial_noise(5, 2, TREES, (7,))[row])


def test_a_stream_is_philox_under_the_hash_of_its_key():
    """Drawn here by numpy alone, so that a run can be replayed elsewhere."""
    noise = edge_noise(5, 2, 4, TREES, 3, (7,), branch_factor=2, corr=2.0)
    for row, (prompt_id, tree) in enumerate(TREES):
        stream = np.random.Generator(np.random.Philox(key=noise_key(5, prompt_id, tree, 2, 4)))
        for node in range(3):
            shared, first, second = stream.standard_normal((3, 7), dtype=np.float32)
            for child, own in enumerate((first, second)):
                expected = torch.from_numpy((shared + 2 * own) / np.float32(5**0.5))
                torch.testing.assert_close(noise[row, node, child], expected)


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = edge_noise(0, 0, 0, TREES, 2, (5,))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, edge_noise(0, 0, 0, TREES, 2, (5,)))


def test_every_part_of_the_key_gives_another_stream():
    parts = itertools.product((0, 1), (0, 1), ("a", "b"), (0, 1), (-1, 0, 1))
    drawn = {}
    for seed, iteration, prompt, tree, time in parts:
        if time < 0:
            row = initial_noise(seed, iteration, [(prompt, tree)], (4,))
        else:
            row = edge_noise(seed, iteration, time, [(prompt, tree)], 1, (4,))
        drawn[seed, iteration, prompt, tree, time] = tuple(row.flatten().tolist())
    assert len(set(drawn.values())) == len(drawn) == 48


def test_keys_use_all_their_bits_and_are_no_completion_s_seed():
    keys = [noise_key(7, "p", 0, 1, time) for time in range(2000)]
    for bit in range(128):
        assert abs(sum(key >> bit & 1 for key in keys) - 1000) < 5 * 2000**0.5 / 2
    # Three fields and an id against two fields and an id that imitates the third.
    imitation = "\x00" * 8 + "p"
    assert noise_key(0, "p", 0, 0, 0) & (2**63 - 1) != sample_seed(0, imitation, 0, 0)
    with pytest.raises(OverflowError):
        noise_key(2**63, "p", 0, 0, 0)


def test_trees_may_share_their_start():
    shared = initial_noise(0, 3, TREES, (6,), shared=True)
    own = initial_noise(0, 3, TREES, (6,))
    assert torch.equal(shared, shared[:1].expand_as(shared))
    assert len({tuple(row) for row in own.tolist()}) == len(TREES)
    assert not torch.equal(shared, initial_noise(0, 4, TREES, (6,), shared=True))


@pytest.mark.parametrize("corr", [0.5, 1.0, 4.0, math.inf])
def test_siblings_are_standard_normal_and_correlate_as_the_paper_says(corr):
    num = 40_000
    noise = edge_noise(1, 0, 0, [("p", 0)], num, (2,), branch_factor=3, corr=corr)[0].double()
    rho = 0.0 if math.isinf(corr) else 1 / (1 + corr**2)
    bound = 5 / math.sqrt(num)
    for d in range(2):
        xi_3W = noise[:, :, d].T
        assert bool((xi_3W.mean(1).abs() < bound).all())
        expected = torch.full((3, 3), rho, dtype=torch.float64).fill_diagonal_(1)
        torch.testing.assert_close(xi_3W @ xi_3W.T / num, expected, atol=2 * bound, rtol=0)
        # the fourth moment of a normal variable
        assert (xi_3W**4).mean(1).tolist() == pytest.approx([3.0] * 3, abs=15 * bound)
    across = (noise[:-1, 0, 0] * noise[1:, 0, 0]).mean()  # children of different parents
    assert abs(float(across)) < bound


def test_the_published_code_s_scaling_is_there_to_be_compared():
    eta = torch.arange(6.0).reshape(1, 3, 2)
    shared = torch.full((1, 1, 2), 100.0)
    assert torch.equal(sibling_noise(shared, eta, 4.0, "official_scaled"), 4 * eta)


@pytest.mark.parametrize(
    ("corr", "mode"),
    [
        *((corr, "correlated") for corr in (0.0, -1.0, math.nan)),
        *((corr, "official_scaled") for corr in (0.0, math.inf)),
        (4.0, "joint"),
    ],
)
def test_degenerate_siblings_are_refused(corr, mode):
    with pytest.raises(FlowError, match="branch_"):
        edge_noise(0, 0, 0, TREES, 1, (2,), branch_factor=2, corr=corr, mode=mode)


def test_an_unbranched_step_needs_no_sibling_settings():
    plain = edge_noise(0, 0, 0, TREES, 2, (3,))
    assert torch.equal(plain, edge_noise(0, 0, 0, TREES, 2, (3,), corr=0.0))


@pytest.mark.parametrize(("kind", "eta"), [("dance", 0.6), ("flow", 0.7)])
def test_leaves_of_trees_have_the_marginal_of_the_sequential_sampler(kind, eta):
    """A linear velocity keeps every state Gaussian, so the sequential sampler's mean and variance
    are exact recursions; the leaves of trees that split twice must have them too, and two leaves
    that part at the first step the covariance that their shared noise explains."""
    num_steps, splits, num_trees, corr = 6, (0, 2), 3000, 2.0
    slope, offset = -0.7, 0.4
    table = step_table(time_grid(num_steps), kind, eta, dtype=torch.float64)
    trees = [(str(i), 0) for i in range(num_trees)]
    z = initial_noise(3, 0, trees, (4,))[:, None]  # [P, W, 4]
    mean, var, shared = 0.0, 1.0, 1.0
    for i in range(num_steps):
        k = 2 if i in splits else 1
        xi = edge_noise(3, 0, i, trees, z.shape[1], (4,), branch_factor=k, corr=corr)
        m = step_mean(table, torch.full((num_trees,), i), z, slope * z + offset)
        z = sde_step(m[:, :, None], table.std_T[i].expand(num_trees), xi).flatten(1, 2)
        a, b, std = (float(x[i]) for x in (table.a_T, table.b_T, table.std_T))
        gain = a + b * slope
        mean, var = gain * mean + b * offset, gain**2 * var + std**2
        # noise that the first and the last leaf have in common: the part that siblings share
        shared = gain**2 * shared + (std**2 / (1 + corr**2) if i == 0 else 0.0)
    assert z.shape[1] == 4
    size = num_trees * 4
    for leaf in range(4):
        x = z[:, leaf].flatten()
        assert float(x.mean()) == pytest.approx(mean, abs=5 * math.sqrt(var / size))
        assert float(x.var()) == pytest.approx(var, rel=5 * math.sqrt(2 / size))
    product = (z[:, 0] - mean) * (z[:, 3] - mean)
    assert float(product.mean()) == pytest.approx(shared, abs=5 * var * math.sqrt(2 / size))
