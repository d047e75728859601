"""Which edges of a tree train, and how much each counts.

Pruning comes after the advantages and touches nothing but the gradient: rollouts, rewards and
values are those of the whole tree. Depth first, then width (BranchGRPO, arXiv 2509.06040):

    depth          a window of consecutive depths is left out; it slides as training goes on
    parent_top1    of the siblings at the last split, the best keeps its chain
    extreme_b      the chains of a group's b best and b worst leaves stay

A chain is what follows below a node whose siblings it was last compared with, down to its leaf; the
edge into that node stays. Leaving depths out is block-coordinate descent, unbiased for those that
are kept; leaving branches out by their value is not.

Each kept edge e has a share u_e of the loss, over all groups of the batch:

    depth_mean     the kept depths of a group count the same, and within one omega (tree.py) does
    edge_mean      every edge counts the same                   the paper's and the code's
    omega_sum      omega of each action: the sum estimates the policy gradient
    token_mean     every action counts the same, once
    leaf_count     every action counts as often as leaves share it: the flat loss over the leaves

The actions of an edge (tokens; a denoising step is one) share what the edge has.

Legend: N nodes, G groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos import tree as trees
from rlalign.algos.errors import AlgoError
from rlalign.algos.segments import compact, segment_sum
from rlalign.types import POLICY, Tree

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

WEIGHTS = ("depth_mean", "edge_mean", "omega_sum", "token_mean", "leaf_count")


def select_edges(
    tree: Tree, value_N: Tensor, cfg: AlgoConfig, *, step: int, max_steps: int
) -> Tensor:
    """bool [N]: the edges that train in `step` (from 0) of a run of `max_steps`.

    value_N: as `tree_advantages` returns them, NaN for dead nodes. A group of which pruning would
    leave nothing keeps nothing, and counts nowhere.
    """
    keep_N = value_N.isfinite() & (tree.kind_N == POLICY)
    if step > cfg.tree.prune_step_ratio * max_steps:
        return keep_N
    pruned = pruned_depths(cfg, step)
    keep_N = keep_N & ~torch.isin(tree.depth_N, torch.tensor(pruned, dtype=torch.long))
    if cfg.tree.width_prune != "none":
        keep_N = keep_N & (on_kept_chain(tree, value_N, cfg) | ~on_chain(tree))
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


def on_kept_chain(tree: Tree, value_N: Tensor, cfg: AlgoConfig) -> Tensor:
    """bool [N]: nodes with a leaf under them whose chain width pruning keeps."""
    leaf_N = trees.is_leaf(tree) & value_N.isfinite()
    rank_N = value_N.nan_to_num(0.0)
    if cfg.tree.width_prune == "parent_top1":
        key_N, (best, worst) = _last_split(tree), (1, 0)
    elif cfg.tree.width_prune == "extreme_b":
        key_N, (best, worst) = tree.group_N, (cfg.tree.width_prune_b,) * 2
    else:
        raise AlgoError(
            f"algo.tree.width_prune={cfg.tree.width_prune!r} is none of none, parent_top1, "
            "extreme_b"
        )
    kept_N = torch.zeros(len(tree), dtype=torch.bool)
    for sign, number in ((-1, best), (1, worst)):
        at = leaf_N.nonzero()[:, 0]
        at = at[torch.argsort(sign * rank_N[at], stable=True)]
        at = at[torch.argsort(key_N[at], stable=True)]  # by key, and within one by rank
        size_K = torch.bincount(compact(key_N[at])[0]) if len(at) else at
        place = torch.arange(len(at)) - (size_K.cumsum(0) - size_K).repeat_interleave(size_K)
        kept_N[at[place < number]] = True
    return trees.sum_over_leaves(tree, kept_N.double()) > 0


def edge_weights(tree: Tree, keep_N: Tensor, cfg: AlgoConfig, actions_N: Tensor) -> Tensor:
    """u, float64 [N]: each kept edge's share of the loss, for each of its actions; 0 elsewhere.

    actions_N: how many losses an edge has, 1 or its tokens. Raises AlgoError for an unknown
    `algo.tree.weight`.
    """
    mode, keep64_N = cfg.tree.weight, keep_N.double()
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
