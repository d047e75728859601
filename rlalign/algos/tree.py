"""Trees of rollouts: structure, sampling weights, and the values of inner nodes.

A node's value is a weighted mean of its children's, from the leaves up,

    V(leaf) = its reward,    V(n) = sum_c w(c) V(c)  over the children c of n,   sum_c w(c) = 1

and the four ways of fusing rewards are four choices of w:

    child_mean     1 / #children                               unbiased for the value of the prefix
    leaf_mean      leaves under c / leaves under n             the mean over n's leaves
    edge_softmax   softmax over the children of beta log p(c)
    path_softmax   softmax over n's LEAVES of beta times the log-prob of the path from n to them

The last is BranchGRPO's (arXiv 2509.06040): with Z(leaf) = 0 and Z(n) = logsumexp_c (beta log p(c)
+ Z(c)), it is w(c) = exp(beta log p(c) + Z(c) - Z(n)). Children are drawn from the policy, so to
weigh them by its probability again counts the density twice: only uniform weights estimate V.

A leaf whose reward is not finite is dead, and so is a node with no living leaf: neither has a value
or a weight, and its siblings share what it would have had.

Legend: N nodes (parents before children), D depths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError
from rlalign.algos.segments import compact, segment_sum
from rlalign.types import ODE, ROOT, Tree

FUSE_MODES = ("child_mean", "leaf_mean", "edge_softmax", "path_softmax")


def is_leaf(tree: Tree) -> Tensor:
    """bool [N]."""
    leaf_N = torch.ones(len(tree), dtype=torch.bool)
    leaf_N[tree.parent_N[tree.parent_N >= 0]] = False
    return leaf_N


def levels(tree: Tree) -> list[Tensor]:
    """The nodes of each depth, roots first."""
    order_N = torch.argsort(tree.depth_N, stable=True)
    return list(order_N.split(torch.bincount(tree.depth_N).tolist()))


def sum_over_children(tree: Tree, value_N: Tensor) -> Tensor:
    """For each node the sum of its children's values: [N]."""
    child_N = tree.parent_N >= 0
    return torch.zeros_like(value_N).index_add(0, tree.parent_N[child_N], value_N[child_N])


def sum_over_leaves(tree: Tree, value_N: Tensor) -> Tensor:
    """For each node the sum of `value_N` over the leaves under it (itself, if it is one): [N]."""
    total_N = torch.where(is_leaf(tree), value_N, torch.zeros_like(value_N))
    for at in reversed(levels(tree)[1:]):
        total_N = total_N.index_add(0, tree.parent_N[at], total_N[at])
    return total_N


def merge_roots(tree: Tree) -> Tree:
    """The trees of a group below one root, its first: they start from one prompt. The other roots
    are left as dead leaves, so that every node keeps its number."""
    root_N = tree.parent_N < 0
    group_N, num_groups = compact(tree.group_N)
    first_G = torch.full((num_groups,), len(tree))
    roots = root_N.nonzero()[:, 0]
    first_G = first_G.scatter_reduce(0, group_N[roots], roots, "amin")
    root_of_N = first_G[group_N]
    return tree.replace(
        parent_N=torch.where(tree.depth_N == 1, root_of_N, tree.parent_N),
        reward_N=torch.where(
            root_N & (root_of_N != torch.arange(len(tree))), torch.nan, tree.reward_N
        ),
    )


def living(tree: Tree) -> Tensor:
    """bool [N]: nodes with a scorable leaf under them."""
    return sum_over_leaves(tree, tree.reward_N.isfinite().double()) > 0


def sampling_weights(tree: Tree) -> Tensor:
    """omega, float64 [N]: 1 / #roots of the group for a root, then each node's is shared out evenly
    among its living children. Over any full cut of a group they add up to 1; dead nodes have 0.

    With the number of children chosen before they are drawn, sum_n omega(n) grad log pi(n) A(n)
    estimates the policy gradient without bias.
    """
    alive_N = living(tree).double()
    root_N = tree.parent_N < 0
    roots_N = _per_group(tree, torch.where(root_N, alive_N, torch.zeros_like(alive_N)))
    children_N = sum_over_children(tree, alive_N)
    weight_N = torch.where(root_N, alive_N / roots_N.clamp(min=1), torch.zeros_like(alive_N))
    for at in levels(tree)[1:]:
        parent = tree.parent_N[at]
        weight_N[at] = alive_N[at] * weight_N[parent] / children_N[parent].clamp(min=1)
    return weight_N


def fuse(tree: Tree, mode: str = "child_mean", *, beta: float = 1.0, logp: str = "mean") -> Tensor:
    """Values of all nodes, float64 [N]; NaN for dead ones.

    beta: inverse temperature of the two softmaxes; 0 makes path_softmax leaf_mean. logp: an edge's
    log-prob as the `mean` over its actions, or their `sum` (the true density, which is one-hot for
    images). Raises AlgoError for an unknown mode.
    """
    weight_N = child_weights(tree, mode, beta=beta, logp=logp)
    alive_N = living(tree)
    value_N = torch.where(is_leaf(tree) & alive_N, tree.reward_N.double(), 0.0)
    for at in reversed(levels(tree)[1:]):
        value_N = value_N.index_add(0, tree.parent_N[at], weight_N[at] * value_N[at])
    return torch.where(alive_N, value_N, torch.nan)


def child_weights(tree: Tree, mode: str, *, beta: float = 1.0, logp: str = "mean") -> Tensor:
    """w of the module's docstring, float64 [N]: each node's among its siblings; 1 for a root."""
    alive_N = living(tree).double()
    if mode == "child_mean":
        score_N = torch.zeros(len(tree), dtype=torch.float64)
    elif mode == "leaf_mean":
        score_N = sum_over_leaves(tree, alive_N).log()
    elif mode in ("edge_softmax", "path_softmax"):
        edge_N = tree.logp_N.double() * (tree.num_actions_N if logp == "sum" else 1)
        score_N = beta * edge_N
        if mode == "path_softmax":
            return _path_softmax(tree, score_N, alive_N)
    else:
        raise AlgoError(f"algo.tree.fuse={mode!r} is none of {', '.join(FUSE_MODES)}")
    return _softmax_over_siblings(tree, score_N, alive_N)[0]


def validate(tree: Tree) -> None:
    """Raise AlgoError unless `tree` is a forest as `Tree` describes it, with a child per ODE step.

    Rewards may be missing: see the module's docstring.
    """
    lengths = {len(getattr(tree, name)) for name in Tree.__slots__}
    if len(lengths) != 1:
        raise AlgoError(f"the tensors of a tree have {sorted(lengths)} entries, not one number")
    parent_N, child_N = tree.parent_N, tree.parent_N >= 0
    late = (parent_N >= torch.arange(len(tree))).nonzero()[:, 0].tolist()
    if late:
        raise AlgoError(f"not a tree of rollouts: nodes {late[:5]} come before their parents")
    parent_C = parent_N[child_N]
    own_C = child_N.nonzero()[:, 0]
    facts = {
        "a child is one deeper than its parent, a root at 0": bool(
            (tree.depth_N[own_C] == tree.depth_N[parent_C] + 1).all()
            and (tree.depth_N[~child_N] == 0).all()
        ),
        "a child is of its parent's tree and group": bool(
            (tree.tree_N[own_C] == tree.tree_N[parent_C]).all()
            and (tree.group_N[own_C] == tree.group_N[parent_C]).all()
        ),
        "a tree has one root": len(tree.tree_N[~child_N].unique()) == int((~child_N).sum()),
        "roots, and only they, are of kind ROOT": bool(((tree.kind_N == ROOT) == ~child_N).all()),
        "a deterministic step has no siblings": bool(
            (sum_over_children(tree, torch.ones(len(tree)))[parent_C][
                tree.kind_N[own_C] == ODE
            ] == 1).all()
        ),
    }  # fmt: skip
    broken = [fact for fact, holds in facts.items() if not holds]
    if broken:
        raise AlgoError(f"not a tree of rollouts, where {'; where '.join(broken)}")


def _per_group(tree: Tree, value_N: Tensor) -> Tensor:
    """For each node the sum over its group."""
    group_N, num_groups = compact(tree.group_N)
    return segment_sum(value_N, group_N, num_groups)[group_N]


def _softmax_over_siblings(tree: Tree, score_N: Tensor, alive_N: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of the scores among living siblings, and for each node the logsumexp of its
    children's."""
    child = ((tree.parent_N >= 0) & (alive_N > 0)).nonzero()[:, 0]
    parent = tree.parent_N[child]
    top_N = torch.full_like(score_N, -torch.inf)
    top_N = top_N.scatter_reduce(0, parent, score_N[child], "amax")
    part = (score_N[child] - top_N[parent]).exp()
    total_N = torch.zeros_like(score_N).index_add(0, parent, part)
    weight_N = torch.where(tree.parent_N < 0, alive_N, torch.zeros_like(score_N))
    weight_N[child] = part / total_N[parent]
    return weight_N, top_N + total_N.log()


def _path_softmax(tree: Tree, edge_N: Tensor, alive_N: Tensor) -> Tensor:
    """From the leaves up: a node's score is its edge's plus the logsumexp of what is below it."""
    below_N = torch.zeros_like(edge_N)  # Z
    inner_N = ~is_leaf(tree)
    for at in reversed(levels(tree)[:-1]):
        _, summed_N = _softmax_over_siblings(tree, edge_N + below_N, alive_N)
        at = at[inner_N[at]]
        below_N[at] = summed_N[at]
    return _softmax_over_siblings(tree, edge_N + below_N, alive_N)[0]
