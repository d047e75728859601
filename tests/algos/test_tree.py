"""Values and sampling weights of trees, against recursion over linked nodes."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.algos import AlgoError
from rlalign.algos import tree as trees
from rlalign.algos.tree_shape import full_tree, tree_shape
from rlalign.types import ENV, ODE, POLICY, ROOT, Tree
from rlalign.verify import tree_reference as reference
from rlalign.verify.cases import config
from rlalign.verify.trees import random_forest, without_dead

NAN = math.nan
RAGGED = settings(deadline=None, max_examples=40)
FORESTS = st.randoms(use_true_random=False).map(random_forest)


def small(reward, logp=None, **changes) -> Tree:
    """A root 0 with children 1 and 2; 3, 4 and 5 below 1, and 6 below 2."""
    size = 7
    tree = Tree(
        parent_N=torch.tensor([-1, 0, 0, 1, 1, 1, 2]),
        depth_N=torch.tensor([0, 1, 1, 2, 2, 2, 2]),
        tree_N=torch.zeros(size, dtype=torch.int64),
        group_N=torch.zeros(size, dtype=torch.int64),
        kind_N=torch.tensor([ROOT, *[POLICY] * 6]),
        reward_N=torch.tensor([NAN] * 3 + list(reward)),
        logp_N=torch.tensor([0.0, *(logp or [0.0] * 6)]),
        num_actions_N=torch.tensor([0, 1, 2, 3, 1, 2, 1]),
    )
    return tree.replace(**changes)


def close(ours, theirs):
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-9, atol=1e-12)


@RAGGED
@given(
    FORESTS,
    st.sampled_from(trees.FUSE_MODES),
    st.sampled_from(("mean", "sum")),
    st.sampled_from((0.0, 0.5, 1.0, 4.0)),
)
def test_every_fusion_is_what_recursion_gives(tree, mode, logp, beta):
    cfg = config("branch_grpo", tree={"fuse": mode, "fuse_logp": logp, "fuse_beta": beta})
    nodes = reference.linked(tree)
    close(
        trees.fuse(tree, mode, beta=beta, logp=logp),
        [reference.value(n, cfg) if n.leaves() else NAN for n in nodes],
    )


@RAGGED
@given(FORESTS)
def test_omega_is_the_probability_of_a_random_walk(tree):
    nodes = reference.linked(tree)
    close(trees.sampling_weights(tree), [reference.omega(n, nodes) for n in nodes])


@RAGGED
@given(FORESTS)
def test_a_value_is_the_omega_weighted_mean_of_the_leaves_below(tree):
    omega_N, value_N = trees.sampling_weights(tree), trees.fuse(tree, "child_mean")
    for node in reference.linked(tree):
        if node.leaves():
            total = sum(float(omega_N[leaf.id]) * leaf.reward for leaf in node.leaves())
            assert total == pytest.approx(float(omega_N[node.id] * value_N[node.id]), abs=1e-12)


@RAGGED
@given(FORESTS, st.sampled_from(trees.FUSE_MODES))
def test_the_weights_of_living_siblings_add_up_to_one(tree, mode):
    weight_N = trees.child_weights(tree, mode)
    for node in reference.linked(tree):
        if node.leaves() and node.children:
            assert sum(float(weight_N[n.id]) for n in node.children) == pytest.approx(1)
        for child in node.children:
            assert (weight_N[child.id] > 0) == bool(child.leaves())


@RAGGED
@given(FORESTS, st.sampled_from(trees.FUSE_MODES))
def test_constant_rewards_have_constant_values(tree, mode):
    reward_N = torch.where(tree.reward_N.isfinite(), 0.75, tree.reward_N)
    value_N = trees.fuse(tree.replace(reward_N=reward_N), mode)
    close(value_N[value_N.isfinite()], [0.75] * int(trees.living(tree).sum()))


@RAGGED
@given(FORESTS, st.sampled_from(("mean", "sum")))
def test_without_temperature_paths_count_the_same(tree, logp):
    ours = trees.fuse(tree, "path_softmax", beta=0.0, logp=logp)
    torch.testing.assert_close(ours, trees.fuse(tree, "leaf_mean"), equal_nan=True)


@RAGGED
@given(st.randoms(use_true_random=False))
def test_balanced_trees_have_one_mean(draw):
    shape = tree_shape(5, [0, 2, 3], [draw.choice((2, 3)), 1, 2])
    tree = full_tree(torch.tensor([3, 3, 8]), shape)
    leaf_N = trees.is_leaf(tree)
    rewards = torch.tensor([draw.choice((0.0, 0.5, 1.0)) for _ in range(int(leaf_N.sum()))])
    tree = tree.replace(reward_N=tree.reward_N.index_copy(0, leaf_N.nonzero()[:, 0], rewards))
    one, other = trees.fuse(tree, "child_mean"), trees.fuse(tree, "leaf_mean")
    torch.testing.assert_close(one, other)
    omega_N = trees.sampling_weights(tree)
    expected = [1 / (shape.widths[d] * (2 if g == 3 else 1)) for d, g in _places(tree)]
    close(omega_N, expected)


def _places(tree):
    return zip(tree.depth_N.tolist(), tree.group_N.tolist(), strict=True)


@RAGGED
@given(FORESTS)
def test_merged_roots_have_all_leaves_of_their_group_below_them(tree):
    merged = trees.merge_roots(tree)
    for mode in ("child_mean", "leaf_mean"):
        before_N, after_N = trees.fuse(tree, mode), trees.fuse(merged, mode)
        below_N = tree.depth_N > 0
        torch.testing.assert_close(after_N[below_N], before_N[below_N], equal_nan=True)
    leaves_N = trees.sum_over_leaves(merged, trees.living(merged).double())
    for node in reference.linked(tree, one_root=True):
        assert int(leaves_N[node.id]) == len(node.leaves())
    assert bool((merged.parent_N < torch.arange(len(tree))).all())


def test_values_by_hand():
    tree = small([1.0, 0.0, 1.0, 0.0], logp=[-1.0, -2.0, -0.5, -1.5, -1.0, -3.0])
    close(trees.fuse(tree, "child_mean")[:3], [(2 / 3 + 0) / 2, 2 / 3, 0.0])
    close(trees.fuse(tree, "leaf_mean")[:3], [2 / 4, 2 / 3, 0.0])
    e = math.exp
    one = (e(-0.5) + e(-1.0)) / (e(-0.5) + e(-1.5) + e(-1.0))
    close(trees.fuse(tree, "edge_softmax")[:3], [e(-1) / (e(-1) + e(-2)) * one, one, 0.0])
    paths = [e(-1.5), e(-2.5), e(-2.0), e(-5.0)]
    whole = (paths[0] + paths[2]) / sum(paths)
    close(trees.fuse(tree, "path_softmax")[:3], [whole, one, 0.0])
    # summed over actions: 1 + 3 x 0.5, 1 + 1 x 1.5, 1 + 2 x 1, 2 x 2 + 1 x 3
    paths = [e(-2.5), e(-2.5), e(-3.0), e(-7.0)]
    whole = (paths[0] + paths[2]) / sum(paths)
    close(trees.fuse(tree, "path_softmax", logp="sum")[0], whole)


def test_a_true_density_of_many_dimensions_picks_one_path():
    tree = small([1.0, 0.0, 0.0, 0.0], logp=[-1.0, -1.0, -0.9, -1.1, -1.2, -1.0])
    tree = tree.replace(num_actions_N=torch.full((7,), 10_000))
    value_N = trees.fuse(tree, "path_softmax", logp="sum")
    assert float(value_N[0]) == 1.0
    assert float(trees.fuse(tree, "path_softmax", logp="mean")[0]) == pytest.approx(0.29, abs=0.01)


@pytest.mark.parametrize(
    ("reward", "value", "omega"),
    [
        # one leaf lost: its siblings share its half of omega
        ([1.0, NAN, 0.0, 1.0], [3 / 4, 1 / 2, 1.0], [1, 1 / 2, 1 / 2, 1 / 4, 0, 1 / 4, 1 / 2]),
        # the only leaf of a branch lost: the other branch has all
        ([1.0, 1.0, 0.0, math.inf], [2 / 3, 2 / 3, NAN], [1, 1, 0, 1 / 3, 1 / 3, 1 / 3, 0]),
        ([NAN, NAN, NAN, 1.0], [1.0, NAN, 1.0], [1, 0, 1, 0, 0, 0, 1]),  # one left
        ([NAN, NAN, NAN, NAN], [NAN, NAN, NAN], [0, 0, 0, 0, 0, 0, 0]),  # none left
    ],
)
def test_the_dead_leave_their_share_to_their_siblings(reward, value, omega):
    tree = small(reward)
    close(trees.fuse(tree)[:3], value)
    close(trees.sampling_weights(tree), omega)


@RAGGED
@given(FORESTS, st.sampled_from(trees.FUSE_MODES))
def test_a_dead_node_is_as_good_as_none(tree, mode):
    smaller, left = without_dead(tree)
    if len(smaller):
        torch.testing.assert_close(trees.fuse(tree, mode)[left], trees.fuse(smaller, mode))
        omega_N = trees.sampling_weights(tree)
        torch.testing.assert_close(omega_N[left], trees.sampling_weights(smaller))
        assert float(omega_N.sum()) == pytest.approx(float(omega_N[left].sum()))


def test_an_unknown_fusion_is_refused():
    with pytest.raises(AlgoError, match=r"algo\.tree\.fuse='mean' is none of child_mean"):
        trees.fuse(small([0.0] * 4), "mean")


@RAGGED
@given(FORESTS)
def test_a_forest_is_valid(tree):
    trees.validate(tree)


def _changed(tensor, at, value):
    return tensor.index_fill(0, torch.tensor([at]), value)


@pytest.mark.parametrize(
    ("name", "at", "value", "says"),
    [
        ("parent_N", 1, 4, r"nodes \[1\] come before their parents"),
        ("parent_N", 3, 99, r"nodes \[3\] come before their parents"),
        ("depth_N", 4, 3, "one deeper"),
        ("depth_N", 0, 1, "one deeper"),
        ("tree_N", 2, 1, "of its parent's tree"),
        ("group_N", 6, 1, "of its parent's tree and group"),
        ("parent_N", 1, -1, "a tree has one root"),
        ("kind_N", 1, ROOT, "only they, are of kind ROOT"),
        ("kind_N", 0, ENV, "roots, and only they"),
        ("kind_N", 4, ODE, "has no siblings"),
    ],
)
def test_what_is_no_tree_is_refused_with_the_reason(name, at, value, says):
    tree = small([0.0, 1.0, 0.0, 1.0])
    trees.validate(tree.replace(kind_N=_changed(tree.kind_N, 6, ODE)))  # an only child may be
    broken = tree.replace(**{name: _changed(getattr(tree, name), at, value)})
    with pytest.raises(AlgoError, match=says):
        trees.validate(broken)


def test_tensors_of_different_lengths_are_refused():
    with pytest.raises(AlgoError, match=r"have \[6, 7\] entries"):
        trees.validate(small([0.0] * 4, logp_N=torch.zeros(6)))


def test_labels_may_be_any_numbers():
    tree = random_forest(random.Random(0))
    far = tree.replace(group_N=tree.group_N * -(10**12), tree_N=tree.tree_N - 10**15)
    torch.testing.assert_close(trees.sampling_weights(far), trees.sampling_weights(tree))
