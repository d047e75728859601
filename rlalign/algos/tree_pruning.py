"""Which edges of a tree train, and how much each counts.

Pruning comes after the advantages and touches nothing but the gradient: rollouts, rewards and
values are those of the whole tree. Depth first, then width (BranchGRPO, arXiv 2509.06040):

    depth           a window of consecutive depths is left out; it slides as training goes on
    parent_top1     of the siblings at the last split, the best keeps its chain
    extreme_b       the chains of a group's b best and b worst leaves stay
    official_mode1  of each chain the first edges stay: pruning by depth, in effect
    official_mode2  of the edges of a group's chains the best and the worst stay

A chain is what follows below a node whose siblings it was last compared with, down to its leaf; the
edge into that node stays. The official modes are those of the published code, which keep the share
`width_prune_ratio`. Leaving depths out is block-coordinate descent, unbiased for those that are
kept; leaving branches out by their value is not.

Each kept edge e has a share u_e of the loss, over all groups of the batch:

    depth_mean     the kept depths of a group count the same, and within one omega (tree.py) does
    edge_mean      every edge counts the same, and shares that among its actions; the paper's
    omega_sum      omega of each action: the sum estimates the policy gradient
    token_mean     every action counts the same, once
    leaf_count     every action counts as often as leaves share it: the flat loss over the leaves

An action is a token, or a step of denoising.

Legend: N nodes, G groups, A candidates for pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos import tree as trees
from rlalign.algos.errors import AlgoError
from rlalign.algos.segments import compact, segment_sum
from rlalign.types import POLICY, Tree

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

WIDTH_PRUNE = ("parent_top1", "extreme_b", "official_mode1", "official_mode2")
WEIGHTS = ("depth_mean", "edge_mean", "omega_sum", "token_mean", "leaf_count")
Ends = Callable[[Tensor], tuple[Tensor | int, Tensor | int]]  # of how many -> (best, worst)


def select_edges(
    tree: Tree, value_N: Tensor, cfg: AlgoConfig, *, step: int, max_steps: int
) -> Tensor:
    """bool [N]: the edges that train in `step` (from 0) of a run of `max_steps`.

    value_N: as `tree_advantages` returns them, NaN for dead nodes. A group of which pruning would
    leave nothing keeps nothing, and counts nowhere.
    """
    keep_N = value_N.isfinite() & (tree.kind_N == POLICY)
    if step >= round(cfg.tree.prune_step_ratio * max_steps):
        return keep_N
    pruned = pruned_depths(cfg, step)
    keep_N = keep_N & ~torch.isin(tree.depth_N, torch.tensor(pruned, dtype=torch.long))
    if cfg.tree.width_prune != "none":
        chain_N = keep_N & on_chain(tree)
        keep_N = keep_N & (~chain_N | _kept_of_chains(tree, value_N, chain_N, cfg))
    return keep_N


def pruned_depths(cfg: AlgoConfig, step: int) -> list[int]:
    """Child depths that the sliding window leaves out in `step` (from 0)."""
    window = cfg.tree.depth_prune
    if not window.size:
        return []
    moved = step // window.interval
    if window.direction == "later":
        first = min(window.start + moved, max(window.stop - window.size + 1, window.start))
    else:
        first = max(window.start - moved, min(window.stop, window.start))
    return list(range(first, first + window.size))


def on_chain(tree: Tree) -> Tensor:
    """bool [N]: below the last split on the way to a leaf, and not the edge of the split itself."""
    children_N = trees.sum_over_children(tree, torch.ones(len(tree), dtype=torch.int64))
    chain_N = torch.zeros(len(tree), dtype=torch.bool)  # a leaf, or on the way to just one
    leaf_N = trees.is_leaf(tree)
    for at in reversed(trees.levels(tree)):
        child = at[tree.parent_N[at] >= 0]
        parent = tree.parent_N[child]
        alone = children_N[parent] == 1
        chain_N[at] |= leaf_N[at]
        chain_N[parent[alone]] = chain_N[child[alone]]
    split_N = torch.zeros(len(tree), dtype=torch.bool)
    edge_N = tree.parent_N >= 0
    split_N[edge_N] = children_N[tree.parent_N[edge_N]] > 1
    return chain_N & edge_N & ~split_N


def _kept_of_chains(tree: Tree, value_N: Tensor, chain_N: Tensor, cfg: AlgoConfig) -> Tensor:
    """bool [N]: what width pruning keeps of the edges `chain_N`."""
    mode, ratio, b = cfg.tree.width_prune, cfg.tree.width_prune_ratio, cfg.tree.width_prune_b
    leaf_N = trees.is_leaf(tree) & value_N.isfinite()

    def first(size_A: Tensor) -> tuple[Tensor, int]:
        return (ratio * size_A).long().clamp(min=1), 0

    def both_ends(size_A: Tensor) -> tuple[Tensor, Tensor]:
        number_A = (ratio * size_A).long().clamp(min=2)
        return number_A // 2, number_A - number_A // 2

    if mode == "parent_top1":
        leaf_N = _ends(leaf_N, _last_split(tree), value_N, lambda _: (1, 0))
    elif mode == "extreme_b":
        leaf_N = _ends(leaf_N, tree.group_N, value_N, lambda _: (b, b))
    elif mode == "official_mode1":
        its_leaf_N = trees.sum_over_leaves(tree, torch.arange(len(tree)))
        return _ends(chain_N, its_leaf_N, value_N, first)
    elif mode == "official_mode2":
        return _ends(chain_N, tree.group_N, value_N, both_ends)
    else:
        raise AlgoError(f"algo.tree.width_prune={mode!r} is none of none, {', '.join(WIDTH_PRUNE)}")
    return trees.sum_over_leaves(tree, leaf_N.double()) > 0


def _ends(candidate_N: Tensor, key_N: Tensor, value_N: Tensor, ends: Ends) -> Tensor:
    """bool [N]: of the candidates that share a key, the best and the worst by value, as many as
    `ends` says; the earlier first among equals."""
    at_A = candidate_N.nonzero()[:, 0]
    at_A = at_A[torch.argsort(value_N[at_A], descending=True, stable=True)]
    at_A = at_A[torch.argsort(key_N[at_A], stable=True)]  # by key, and within one by value
    index_A, num_keys = compact(key_N[at_A])
    size_K = torch.bincount(index_A, minlength=num_keys)
    place_A = torch.arange(len(at_A)) - (size_K.cumsum(0) - size_K)[index_A]
    best_A, worst_A = ends(size_K[index_A])
    kept_N = torch.zeros_like(candidate_N)
    kept_N[at_A[(place_A < best_A) | (place_A >= size_K[index_A] - worst_A)]] = True
    return kept_N


def edge_weights(tree: Tree, keep_N: Tensor, cfg: AlgoConfig, actions_N: Tensor) -> Tensor:
    """u, float64 [N]: each kept edge's share of the loss, for each of its actions; 0 elsewhere.

    actions_N: how many losses an edge has, 1 or its tokens; an edge without one is as if it were
    not kept. Raises AlgoError for an unknown `algo.tree.weight`.
    """
    mode, keep_N = cfg.tree.weight, keep_N & (actions_N > 0)
    keep64_N = keep_N.double()
    if mode == "depth_mean":
        weight_N = keep64_N * trees.sampling_weights(tree)
        return weight_N / _inverse_shares(tree, weight_N * actions_N)
    if mode == "omega_sum":
        groups = len(tree.group_N[keep_N].unique())
        return keep64_N * trees.sampling_weights(tree) / max(groups, 1)
    if mode == "edge_mean":
        return keep64_N / (actions_N.clamp(min=1) * keep64_N.sum().clamp(min=1))
    if mode == "leaf_count":
        keep64_N = keep64_N * trees.sum_over_leaves(tree, trees.living(tree).double())
    elif mode != "token_mean":
        raise AlgoError(f"algo.tree.weight={mode!r} is none of {', '.join(WEIGHTS)}")
    return keep64_N / (keep64_N * actions_N).sum().clamp(min=1)


def _inverse_shares(tree: Tree, total_N: Tensor) -> Tensor:
    """What to divide by so that the kept depths of a group add up to the same, those of a group to
    the same, and all to 1."""
    group_N, num_groups = compact(tree.group_N)
    depths = int(tree.depth_N.max()) + 1
    key_N = group_N * depths + tree.depth_N
    total_K = segment_sum(total_N, key_N, num_groups * depths)
    kept_G = (total_K > 0).view(-1, depths).sum(1).double()
    shares_N = total_K[key_N] * kept_G[group_N] * (kept_G > 0).sum()
    return torch.where(shares_N > 0, shares_N, 1.0)


def _last_split(tree: Tree) -> Tensor:
    """For each node its nearest ancestor with more than one child (the root, where there is
    none)."""
    children_N = trees.sum_over_children(tree, torch.ones(len(tree), dtype=torch.int64))
    split_N = torch.arange(len(tree))
    for at in trees.levels(tree)[1:]:
        parent = tree.parent_N[at]
        split_N[at] = torch.where(children_N[parent] > 1, parent, split_N[parent])
    return split_N
