"""Which edges train and how much each counts, against loops over linked nodes."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.algos import AlgoError
from rlalign.algos.branch_grpo import tree_credit
from rlalign.algos.tree import fuse
from rlalign.algos.tree_pruning import (
    WEIGHTS,
    WIDTH_PRUNE,
    edge_weights,
    on_chain,
    pruned_depths,
    select_edges,
)
from rlalign.algos.tree_shape import full_tree, tree_shape
from rlalign.types import ODE, POLICY, Tree
from rlalign.verify import tree_reference as reference
from rlalign.verify.cases import config
from rlalign.verify.trees import random_forest

RAGGED = settings(deadline=None, max_examples=50)
FORESTS = st.randoms(use_true_random=False).map(random_forest)
SHAPE = tree_shape(20, [0, 3, 6, 9], [2])


def cfg_of(*, size=0, start=10, direction="later", interval=30, stop=20, **tree):
    window = dataclasses.replace(
        config().tree.depth_prune,
        size=size,
        start=start,
        direction=direction,
        interval=interval,
        stop=stop,
    )
    return config("branch_grpo", tree={"depth_prune": window, **tree})


def grown(seed: int = 0, groups=(3,), ode_steps=()) -> Tree:
    tree = full_tree(torch.tensor(groups), SHAPE, ode_steps=ode_steps)
    leaves = SHAPE.levels(len(groups))[-1]
    generator = torch.Generator().manual_seed(seed)
    reward_N = tree.reward_N.clone()
    reward_N[leaves] = torch.rand(leaves.stop - leaves.start, generator=generator)
    return tree.replace(reward_N=reward_N)


def kept(tree: Tree, cfg, *, step=0, max_steps=300) -> torch.Tensor:
    return select_edges(tree, fuse(tree), cfg, step=step, max_steps=max_steps)


@pytest.mark.parametrize(
    ("settings_", "edges"),
    [
        ({}, 218),
        ({"width_prune": "parent_top1"}, 138),
        ({"width_prune": "extreme_b", "width_prune_b": 4}, 138),
        ({"width_prune": "extreme_b", "width_prune_b": 8}, 218),
        ({"width_prune": "extreme_b", "width_prune_b": 1}, 218 - 14 * 10),
        ({"width_prune": "official_mode1"}, 138),
        ({"width_prune": "official_mode2"}, 138),
        ({"width_prune": "official_mode2", "width_prune_ratio": 0.25}, 58 + 40),
        ({"size": 5, "start": 15}, 138),  # five depths of full width
        ({"size": 4, "start": 10}, 218 - 4 * 16),
        ({"size": 4, "start": 7}, 218 - 3 * 8 - 16),
        ({"size": 4, "start": 17, "width_prune": "parent_top1"}, 58 + 6 * 8),
    ],
)
def test_published_counts(settings_, edges):
    tree = grown()
    assert int(kept(tree, cfg_of(**settings_)).sum()) == edges
    two = grown(groups=(3, 8))
    assert int(kept(two, cfg_of(**settings_)).sum()) == 2 * edges


def test_the_same_prompt_in_two_trees_has_its_extremes_among_all_leaves():
    tree = grown(groups=(3, 3))
    assert int(kept(tree, cfg_of(width_prune="extreme_b")).sum()) == 2 * 58 + 8 * 10


def test_a_mixed_tree_trains_its_stochastic_edges_only():
    """Published: 34 edges a tree, for which the network sees 19 states."""
    tree = grown(ode_steps=set(range(20)) - {0, 1, 2, 3, 6, 9})
    keep_N = kept(tree, cfg_of())
    assert int(keep_N.sum()) == 34
    assert len(tree.parent_N[keep_N].unique()) == 19
    assert bool((tree.kind_N[keep_N] == POLICY).all())
    credit = tree_credit(tree, cfg_of(), torch.ones(len(tree), dtype=torch.int64))
    ode_N = tree.kind_N == ODE
    assert float((credit.advantage_N[ode_N].abs() + credit.weight_N[ode_N]).sum()) == 0
    assert int((tree.kind_N == POLICY).sum()) == 34


def test_the_parents_of_a_full_tree_and_of_one_pruned_are_as_published():
    tree = grown()
    full_N, pruned_N = kept(tree, cfg_of()), kept(tree, cfg_of(size=5, start=15))
    assert len(tree.parent_N[full_N].unique()) == 203
    assert len(tree.parent_N[pruned_N].unique()) == 123
    assert len(tree.parent_N[full_N & (tree.depth_N < 20)].unique()) == 187


@pytest.mark.parametrize(
    ("settings_", "windows"),
    [
        (
            {"size": 4, "start": 10},  # as in the paper: later, every 30 steps, up to the end
            {0: 10, 29: 10, 30: 11, 89: 12, 209: 16, 210: 17, 240: 17, 9000: 17},
        ),
        (
            {"size": 4, "start": 15, "direction": "earlier", "stop": 9},  # as in its code
            {0: 15, 29: 15, 30: 14, 180: 9, 210: 9, 9000: 9},
        ),
        (
            {"size": 4, "start": 15, "direction": "earlier", "stop": 9, "interval": 1},
            {0: 15, 1: 14, 6: 9, 7: 9},
        ),
        ({"size": 2, "start": 16, "stop": 17}, {0: 16, 3000: 16}),
        ({"size": 2, "start": 5, "direction": "earlier", "stop": 5}, {0: 5, 3000: 5}),
    ],
)
def test_the_window_slides_and_stops(settings_, windows):
    cfg = cfg_of(**settings_)
    found = {step: pruned_depths(cfg, step) for step in windows}
    size = settings_["size"]
    assert found == {step: list(range(at, at + size)) for step, at in windows.items()}
    assert pruned_depths(cfg_of(), 0) == []


@pytest.mark.parametrize(("ratio", "last"), [(1.0, 9), (0.5, 4), (0.3, 2), (0.7, 6), (0.0, -1)])
def test_pruning_ends_after_its_share_of_the_run(ratio, last):
    tree, cfg = grown(), cfg_of(width_prune="parent_top1", prune_step_ratio=ratio)
    counts = [int(kept(tree, cfg, step=step, max_steps=10).sum()) for step in range(10)]
    assert counts == [138] * (last + 1) + [218] * (9 - last)


def test_parent_top1_keeps_the_better_of_two():
    tree = grown(7)
    keep_N = kept(tree, cfg_of(width_prune="parent_top1"))
    split = SHAPE.levels(1)[10]
    value_N, leaf = fuse(tree), SHAPE.levels(1)[20]
    for left in range(0, 16, 2):
        pair = value_N[split][left : left + 2]
        assert keep_N[leaf][left : left + 2].tolist() == (pair == pair.max()).tolist()
    assert bool(keep_N[split].all())  # the split edges themselves stay


def test_the_first_official_mode_leaves_out_depths_and_the_second_leaves():
    tree = grown(8)
    first_N = kept(tree, cfg_of(width_prune="official_mode1"))
    depth_N = kept(tree, cfg_of(size=5, start=16))
    assert torch.equal(first_N, depth_N)
    second_N = kept(tree, cfg_of(width_prune="official_mode2"))
    assert torch.equal(second_N, kept(tree, cfg_of(width_prune="extreme_b", width_prune_b=4)))


def chain_of(node: reference.Node) -> reference.Node | None:
    """The leaf that a chain's edge leads to."""
    if node.parent is None or len(node.parent.children) > 1:
        return None
    while len(node.children) == 1:
        node = node.children[0]
    return None if node.children else node


def last_split(leaf: reference.Node) -> reference.Node:
    above = leaf.above()
    return next((n for n in above if len(n.children) > 1), above[-1] if above else leaf)


def expected_edges(tree: Tree, cfg) -> list[bool]:
    nodes = reference.linked(tree)
    keep = [n for n in nodes if n.trains() and n.depth not in pruned_depths(cfg, 0)]
    leaves = sorted(
        (n for n in nodes if not n.children and n.leaves()), key=lambda n: (-n.reward, n.id)
    )
    mode, b, ratio = cfg.tree.width_prune, cfg.tree.width_prune_b, cfg.tree.width_prune_ratio
    chains = sorted((n for n in keep if chain_of(n)), key=lambda n: (-chain_of(n).reward, n.id))
    chosen = set()
    if mode == "parent_top1":
        seen = set()
        for leaf in leaves:
            if last_split(leaf) not in seen:
                chosen |= {n for n in chains if chain_of(n) is leaf}
            seen.add(last_split(leaf))
    for label in {n.group for n in nodes}:
        if mode == "extreme_b":
            own = [n for n in leaves if n.group == label]
            chosen |= {n for n in chains if chain_of(n) in own[:b] + own[-b:]}
        if mode == "official_mode2":
            own = [n for n in chains if n.group == label]
            number = max(2, int(len(own) * ratio))
            chosen |= set(own[: number // 2]) | set(own[len(own) - (number - number // 2) :])
            if number > len(own):
                chosen |= set(own)
    if mode == "official_mode1":
        for leaf in leaves:
            own = sorted((n for n in chains if chain_of(n) is leaf), key=lambda n: n.id)
            chosen |= set(own[: max(1, int(len(own) * ratio))])
    return [n in keep and (n not in chains or mode == "none" or n in chosen) for n in nodes]


@RAGGED
@given(FORESTS, st.data())
def test_ragged_trees_are_pruned_as_loops_do(tree, data):
    cfg = cfg_of(
        width_prune=data.draw(st.sampled_from(("none", *WIDTH_PRUNE))),
        width_prune_b=data.draw(st.sampled_from((1, 2))),
        width_prune_ratio=data.draw(st.sampled_from((0.25, 0.5, 1.0))),
        size=data.draw(st.sampled_from((0, 1, 2))),
        start=data.draw(st.sampled_from((1, 2, 3))),
    )
    assert kept(tree, cfg).tolist() == expected_edges(tree, cfg)
    chain_N = [chain_of(n) is not None for n in reference.linked(tree)]
    assert on_chain(tree).tolist() == chain_N


@RAGGED
@given(FORESTS, st.sampled_from(WEIGHTS), st.sampled_from((0, 1, 2)), st.booleans())
def test_shares_are_as_defined(tree, mode, size, tokens):
    cfg = cfg_of(weight=mode, size=size, start=1, width_prune="parent_top1")
    keep_N = kept(tree, cfg)
    actions_N = tree.num_actions_N if tokens else torch.ones_like(tree.num_actions_N)
    weight_N = edge_weights(tree, keep_N, cfg, actions_N)
    theirs = reference.weights(tree, keep_N.tolist(), actions_N.tolist(), cfg)
    torch.testing.assert_close(weight_N, torch.tensor(theirs, dtype=torch.float64))
    assert float(weight_N[~keep_N].sum()) == 0
    if mode != "omega_sum" and bool(keep_N.any()):
        assert float((weight_N * actions_N).sum()) == pytest.approx(1)


def losses(tree: Tree) -> torch.Tensor:
    return torch.rand(len(tree), generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def total(tree: Tree, cfg, loss_N: torch.Tensor) -> float:
    ones_N = torch.ones(len(tree), dtype=torch.int64)
    return float((edge_weights(tree, kept(tree, cfg), cfg, ones_N) * loss_N).sum())


def test_depth_mean_is_the_mean_over_depths_of_the_mean_of_each():
    tree = grown(groups=(3, 8, 5))
    loss_N = losses(tree)
    means = [float(loss_N[tree.depth_N == depth].mean()) for depth in range(1, 21)]
    assert total(tree, cfg_of(), loss_N) == pytest.approx(sum(means) / 20)
    pruned = cfg_of(size=4, start=10)
    left = [*means[:9], *means[13:]]
    assert total(tree, pruned, loss_N) == pytest.approx(sum(left) / 16)


def test_edge_mean_is_the_mean_over_all_edges():
    tree = grown(groups=(3, 8, 5))
    loss_N = losses(tree)
    edge_N = tree.depth_N > 0
    assert total(tree, cfg_of(weight="edge_mean"), loss_N) == pytest.approx(
        float(loss_N[edge_N].mean())
    )


def joined(one: Tree, other: Tree) -> Tree:
    fields = {}
    for field in dataclasses.fields(Tree):
        a, b = getattr(one, field.name), getattr(other, field.name)
        shift = {"parent_N": len(one), "tree_N": 100, "group_N": 100}.get(field.name, 0)
        fields[field.name] = torch.cat([a, torch.where(b >= 0, b + shift, b) if shift else b])
    return Tree(**fields)


def test_groups_of_different_size_count_the_same_under_depth_mean():
    """So it is a mean over groups of their own depths, and no longer one over the batch's."""
    small, big = full_tree(torch.tensor([0]), tree_shape(4, [0], [2])), grown(groups=(1, 1))
    both = joined(small.replace(reward_N=torch.ones(len(small))), big)
    loss_N, cut = losses(both), len(small)
    first_N, second_N = loss_N[:cut], loss_N[cut:]
    of_small = [float(first_N[small.depth_N == d].mean()) for d in range(1, 5)]
    of_big = [float(second_N[big.depth_N == d].mean()) for d in range(1, 21)]
    assert total(both, cfg_of(), loss_N) == pytest.approx(
        (sum(of_small) / 4 + sum(of_big) / 20) / 2
    )
    pooled = [float(loss_N[both.depth_N == d].mean()) for d in range(1, 21)]
    assert total(both, cfg_of(), loss_N) != pytest.approx(sum(pooled) / 20, abs=1e-3)


def test_omega_sum_adds_up_to_the_kept_depths():
    tree = grown(groups=(3, 3, 8))
    ones_N = torch.ones(len(tree), dtype=torch.int64)
    for settings_, depths in (({}, 20), ({"size": 4}, 16)):
        cfg = cfg_of(weight="omega_sum", **settings_)
        weight_N = edge_weights(tree, kept(tree, cfg), cfg, ones_N)
        assert float(weight_N.sum()) == pytest.approx(depths)


@pytest.mark.parametrize("width", WIDTH_PRUNE)
def test_pruning_touches_nothing_but_what_trains(width):
    tree = grown(4, groups=(3, 3, 8))
    before = [tensor.clone() for tensor in dataclasses.astuple(tree)]
    ones_N, state = torch.ones(len(tree), dtype=torch.int64), torch.random.get_rng_state()
    full = tree_credit(tree, cfg_of(), ones_N)
    pruned = tree_credit(tree, cfg_of(width_prune=width, size=3), ones_N)
    assert torch.equal(full.value_N, pruned.value_N)
    assert torch.equal(full.advantage_N, pruned.advantage_N)
    assert bool((pruned.keep_N <= full.keep_N).all()) and pruned.keep_N.sum() < full.keep_N.sum()
    assert torch.equal(torch.random.get_rng_state(), state)
    for ours, theirs in zip(dataclasses.astuple(tree), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_group_of_which_nothing_is_left_counts_nowhere(weight):
    tree = joined(full_tree(torch.tensor([0]), tree_shape(2, [0], [2])), grown(groups=(1,)))
    tree = tree.replace(reward_N=torch.where(tree.group_N == 0, 1.0, tree.reward_N))
    cfg, ones_N = cfg_of(weight=weight, size=3, start=1), torch.ones(len(tree), dtype=torch.int64)
    keep_N = kept(tree, cfg)
    assert not bool(keep_N[:5].any())
    alone = grown(groups=(1,))
    ours = edge_weights(tree, keep_N, cfg, ones_N)
    theirs = edge_weights(alone, kept(alone, cfg), cfg, ones_N[5:])
    torch.testing.assert_close(ours[5:], theirs)
    everything = cfg_of(weight=weight, size=20, start=1)
    assert float(edge_weights(tree, kept(tree, everything), everything, ones_N).sum()) == 0


def test_an_edge_without_actions_leaves_its_share_to_the_others():
    tree = grown()
    for weight in WEIGHTS:
        cfg = cfg_of(weight=weight)
        actions_N = torch.where(tree.depth_N == 4, 0, 2)
        weight_N = edge_weights(tree, kept(tree, cfg), cfg, actions_N)
        sums = 2 * 19 if weight == "omega_sum" else 1
        assert float((weight_N * actions_N).sum()) == pytest.approx(sums)
        assert float(weight_N[tree.depth_N == 4].sum()) == 0


def test_dead_leaves_are_no_candidates():
    tree = grown(groups=(3,))
    leaves = SHAPE.levels(1)[-1]
    reward_N = tree.reward_N.clone()
    reward_N[leaves.start : leaves.start + 12] = math.nan
    tree = tree.replace(reward_N=reward_N)
    keep_N = kept(tree, cfg_of(width_prune="extreme_b", width_prune_b=1))
    assert int(keep_N[leaves].sum()) == 2
    assert not bool(keep_N[leaves][:12].any())


def test_unknown_settings_are_refused():
    tree, ones_N = grown(), torch.ones(219, dtype=torch.int64)
    with pytest.raises(AlgoError, match=r"width_prune='best' is none of none, parent_top1"):
        kept(tree, cfg_of(width_prune="best"))
    with pytest.raises(AlgoError, match=r"weight='even' is none of depth_mean"):
        edge_weights(tree, kept(tree, cfg_of()), cfg_of(weight="even"), ones_N)
