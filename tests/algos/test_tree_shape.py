"""The size of a branching tree, and the skeleton of many."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.algos import AlgoError
from rlalign.algos import tree as trees
from rlalign.algos.tree_shape import full_tree, tree_shape
from rlalign.types import ODE, POLICY, ROOT

DENSE = tree_shape(20, [0, 3, 6, 9], [2])


@st.composite
def schedules(draw):
    """(num_steps, splits, one factor per split)."""
    num_steps = draw(st.integers(1, 9))
    splits = sorted(draw(st.sets(st.integers(0, num_steps - 1), max_size=4)))
    factors = draw(st.lists(st.integers(1, 3), min_size=len(splits), max_size=len(splits)))
    return num_steps, splits, factors


def grown(num_steps, splits, factors, num_trees):
    """(parent, depth, tree) of each node, one at a time."""
    nodes = [(-1, 0, tree) for tree in range(num_trees)]
    level = list(range(num_trees))
    calls = 0
    for step in range(num_steps):
        children = []
        for parent in level:
            calls += 1
            for _ in range(factors[splits.index(step)] if step in splits else 1):
                children.append(len(nodes))
                nodes.append((parent, step + 1, nodes[parent][2]))
        level = children
    return nodes, calls, len(level)


def test_the_default_schedule_has_the_published_numbers():
    assert DENSE.widths == (1, 2, 2, 2, 4, 4, 4, 8, 8, 8, *(16,) * 11)
    assert (DENSE.num_calls, DENSE.num_edges, DENSE.num_nodes) == (203, 218, 219)
    assert DENSE.num_leaves == 16
    assert int(DENSE.num_nodes / DENSE.num_leaves * 100) == 1368  # printed as NFE in the paper


@pytest.mark.parametrize(
    ("splits", "factor", "leaves", "calls", "edges"),  # per leaf
    [
        ((0, 4, 8, 12), 2, 16, 10.56, 11.50),
        ((0, 5, 10, 15), 2, 16, 8.44, 9.38),
        ((9, 12, 15, 18), 2, 16, 4.25, 5.19),
        ((0, 3, 6, 9), 3, 81, 11.46, 12.44),
        ((0, 3, 6, 9), 4, 256, 10.99, 11.98),
        ((0, 3, 6, 9, 12), 2, 32, 9.84, 10.81),
        ((), 2, 1, 20, 20),
    ],
)
def test_other_schedules(splits, factor, leaves, calls, edges):
    shape = tree_shape(20, splits, [factor])
    assert shape.num_leaves == leaves
    assert shape.num_calls / leaves == pytest.approx(calls, abs=0.006)
    assert shape.num_edges / leaves == pytest.approx(edges, abs=0.006)


@settings(deadline=None)
@given(schedules(), st.integers(1, 3))
def test_a_forest_is_what_growing_it_node_by_node_gives(schedule, num_trees):
    shape = tree_shape(*schedule, split_last=True)
    nodes, calls, leaves = grown(*schedule, num_trees)
    forest = full_tree(torch.arange(num_trees) // 2 + 5, shape)
    trees.validate(forest)
    assert forest.parent_N.tolist() == [parent for parent, _, _ in nodes]
    assert forest.depth_N.tolist() == [depth for _, depth, _ in nodes]
    assert forest.tree_N.tolist() == [tree for _, _, tree in nodes]
    assert forest.group_N.tolist() == [tree // 2 + 5 for _, _, tree in nodes]
    assert shape.num_calls * num_trees == calls
    assert shape.num_leaves * num_trees == leaves
    assert shape.num_nodes * num_trees == len(forest) == shape.levels(num_trees)[-1].stop
    assert shape.num_edges == shape.num_nodes - 1


def test_a_depth_is_repeat_interleave_of_the_one_before():
    forest, levels = full_tree(torch.tensor([4, 4, 9]), DENSE), DENSE.levels(3)
    for step, factor in enumerate(DENSE.factors):
        above, below = levels[step], levels[step + 1]
        rows = torch.arange(above.stop - above.start).repeat_interleave(factor)
        assert torch.equal(forest.parent_N[below] - above.start, rows)
    assert forest.tree_N[levels[-1]].tolist() == [0] * 16 + [1] * 16 + [2] * 16


def test_kinds_and_actions_follow_the_steps():
    forest = full_tree(torch.tensor([0]), DENSE, ode_steps={1, 19}, num_actions=64)
    kind = dict(zip(forest.depth_N.tolist(), forest.kind_N.tolist(), strict=True))
    assert kind == {0: ROOT, **dict.fromkeys(range(1, 21), POLICY), 2: ODE, 20: ODE}
    actions = torch.where(forest.kind_N == POLICY, 64, 0)
    assert torch.equal(forest.num_actions_N, actions)
    assert forest.reward_N.isnan().all()


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ((20, [0, 3, 3], [2]), "each step at most once"),
        ((20, [3, 0], [2]), "must increase"),
        ((20, [0, 20], [2]), "must lie in 0 .. 18"),
        ((20, [0, 19], [2]), "does not reach the reward"),
        ((20, [-1, 3], [2]), "must lie in"),
        ((1, [0], [2]), "must lie in"),
        ((20, [0, 3, 6], [2, 3]), "one for each of the 3"),
        ((20, [0, 3], [2, 0]), "from 1 on"),
        ((20, [0, 3], []), "must be one number"),
        ((0, [], [2]), "at least one step"),
    ],
)
def test_a_schedule_that_is_none_is_refused(schedule, says):
    with pytest.raises(AlgoError, match=says):
        tree_shape(*schedule)


def test_the_last_step_splits_where_its_noise_is_rewarded():
    assert tree_shape(20, [19], [3], split_last=True).widths[-2:] == (1, 3)


def test_a_split_at_a_deterministic_step_is_refused():
    with pytest.raises(AlgoError, match=r"split_steps=\[3\] are deterministic"):
        full_tree(torch.tensor([0]), DENSE, ode_steps={1, 2, 3})
