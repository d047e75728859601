"""Credit in a tree: what a node's value says about the edge that led into it.

With V the values (tree.py), pa the parent, and mean and sd over the nodes that are compared:

    depth        (V(n) - mean) / sd   over the nodes of one depth                        BranchGRPO
    sibling      the same over the children of one parent
    parent       (V(n) - V(pa)) / sd of the siblings (population)                        SPO
    root_parent  ((V(n) - V(root)) + (V(n) - V(pa))) / sqrt(leaves under n)              TreeRL
    ancestors    mean over the ancestors a of V(n) - V(a)                                TreePO
    leaves       z-score among all leaves of the prompt plus that within the tree        Tree-GRPO

`algo.scale_rewards` decides sd: `group` those that are compared, `batch` one over all, `none` 1.
`scope=prompt` compares the trees of a prompt with each other, and puts them below one root; `tree`
compares each tree with itself. Below the last branching, depths have just the z-scores that GRPO
gives to the leaves. The credit of TreePO and Tree-GRPO is a leaf's, the same for every token on its
path: an edge that several leaves share gets their mean, which is the same gradient on policy
(`weight=leaf_count` counts it as often as there are leaves).

Statistics are float64, sd with ddof=1; what has nothing to compare with, or a spread below
`std_floor`, gets 0. Sources: arXiv 2509.06040 (BranchGRPO), 2505.23564 (SPO), 2506.11902 (TreeRL),
2508.17445 (TreePO), 2509.21240 (Tree-GRPO).

Legend: N nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos import tree as trees
from rlalign.algos.errors import AlgoError
from rlalign.algos.segments import group_stats
from rlalign.types import POLICY, Tree

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

SIBLING_EPS = 1e-8  # added to SPO's standard deviation


def tree_advantages(tree: Tree, cfg: AlgoConfig) -> tuple[Tensor, Tensor]:
    """(value_N, advantage_N), float64: NaN values for dead nodes; advantages are 0 for those, for
    roots, and for edges that the policy did not choose.

    Raises AlgoError for an unresolved config.
    """
    section = cfg.tree
    rule = ADVANTAGES.get(section.advantage or "")
    if rule is None:
        raise AlgoError(
            f"algo.tree.advantage={section.advantage!r} is none of {', '.join(ADVANTAGES)}; "
            "pass the config through rlalign.algos.resolve first"
        )
    value_N = _fused(tree, cfg)
    compared, compared_N = tree, value_N
    if section.scope == "prompt":
        compared = trees.merge_roots(tree)
        compared_N = _fused(compared, cfg)
    advantage_N = rule(compared, compared_N.nan_to_num(0.0), compared_N.isfinite(), cfg)
    trains_N = value_N.isfinite() & (tree.kind_N == POLICY)
    return value_N, torch.where(trains_N, advantage_N, torch.zeros_like(advantage_N))


def _depth(tree: Tree, value_N: Tensor, alive_N: Tensor, cfg: AlgoConfig) -> Tensor:
    if not cfg.tree.carry_leaves:
        return _compared(value_N, alive_N, _scope(tree, cfg), tree.depth_N, cfg)
    advantage_N = torch.zeros_like(value_N)
    leaf_N = trees.is_leaf(tree)
    for depth, at in enumerate(trees.levels(tree)):
        shallow = (leaf_N & (tree.depth_N < depth)).nonzero()[:, 0]
        both = torch.cat([at, shallow])
        zero = torch.zeros_like(both)
        found = _compared(value_N[both], alive_N[both], _scope(tree, cfg)[both], zero, cfg)
        advantage_N[at] = found[: len(at)]
    return advantage_N


def _sibling(tree: Tree, value_N: Tensor, alive_N: Tensor, cfg: AlgoConfig) -> Tensor:
    family_N, edge_N = tree.parent_N, tree.parent_N >= 0
    return _compared(value_N, alive_N & edge_N, family_N, torch.zeros_like(family_N), cfg)


def _parent(tree: Tree, value_N: Tensor, alive_N: Tensor, cfg: AlgoConfig) -> Tensor:
    advantage_N = value_N - _value_of_parent(tree, value_N)
    stats = group_stats(value_N, tree.parent_N, alive_N, cfg.reward_tie_tol)
    if cfg.scale_rewards == "group":
        share_N = (stats.count_B - 1).clamp(min=0) / stats.count_B.clamp(min=1)
        advantage_N = advantage_N / (stats.std_B * share_N.sqrt() + SIBLING_EPS)
    silent_N = stats.tied_B | (stats.std_B < cfg.tree.std_floor)
    return torch.where(silent_N, torch.zeros_like(advantage_N), advantage_N)


def _root_parent(tree: Tree, value_N: Tensor, alive_N: Tensor, cfg: AlgoConfig) -> Tensor:
    """Of leaves centred on the mean of the others of their prompt, as TreeRL does."""
    leaf_N = alive_N & trees.is_leaf(tree)
    stats = group_stats(value_N, tree.group_N, leaf_N, cfg.reward_tie_tol)
    centred_N = (value_N - stats.mean_B) * stats.count_B / (stats.count_B - 1).clamp(min=1)
    centred = tree.replace(reward_N=torch.where(leaf_N, centred_N, torch.nan))
    fused_N = _fused(centred, cfg).nan_to_num(0.0)
    count_N = trees.sum_over_leaves(tree, leaf_N.double()).clamp(min=1)
    own_N = (fused_N - _value_of_root(tree, fused_N)) + (fused_N - _value_of_parent(tree, fused_N))
    own_N = torch.where(stats.tied_B, 0.0, own_N / count_N.sqrt())
    # what all tokens of the batch, leaf by leaf, have on average is taken off
    tokens_N = torch.where(alive_N, _trained_actions(tree) * count_N, torch.zeros_like(count_N))
    return own_N - (tokens_N * own_N).sum() / tokens_N.sum().clamp(min=1)


def _ancestors(tree: Tree, value_N: Tensor, alive_N: Tensor, cfg: AlgoConfig) -> Tensor:
    """TreePO: each leaf against the mean under each of its ancestors, of which those count that
    have more than one leaf (and the root); whitened over the tokens of the batch, leaf by leaf."""
    leaf_N = alive_N & trees.is_leaf(tree)
    leaves_N = trees.sum_over_leaves(tree, leaf_N.double())
    mean_N = trees.fuse(tree, "leaf_mean").nan_to_num(0.0)
    counts_N = ((leaves_N > 1) | (tree.parent_N < 0)).double()
    sum_N, number_N = torch.zeros_like(value_N), torch.zeros_like(value_N)
    tokens_N = _trained_actions(tree)
    for at in trees.levels(tree)[1:]:  # over the ancestors of each node
        parent = tree.parent_N[at]
        sum_N[at] = sum_N[parent] + counts_N[parent] * mean_N[parent]
        number_N[at] = number_N[parent] + counts_N[parent]
        tokens_N[at] += tokens_N[parent]  # of the whole path
    tied_N = group_stats(value_N, tree.group_N, leaf_N, cfg.reward_tie_tol).tied_B
    of_leaf_N = torch.where(tied_N, 0.0, value_N - sum_N / number_N.clamp(min=1))
    shared_N = _mean_of_leaves(tree, of_leaf_N, alive_N)
    if cfg.scale_rewards == "none":
        return shared_N
    tokens_N = torch.where(leaf_N, tokens_N, torch.zeros_like(tokens_N))
    mean = (tokens_N * of_leaf_N).sum() / tokens_N.sum().clamp(min=1)
    variance = (tokens_N * (of_leaf_N - mean) ** 2).sum() / (tokens_N.sum() - 1).clamp(min=1)
    if float(variance) < cfg.tree.std_floor**2:
        return torch.zeros_like(shared_N)
    return (shared_N - mean) / (variance.sqrt() + cfg.adv_eps)


def _leaves(tree: Tree, value_N: Tensor, alive_N: Tensor, cfg: AlgoConfig) -> Tensor:
    leaf_N = alive_N & trees.is_leaf(tree)
    one_N = torch.zeros_like(tree.depth_N)
    between_N = _compared(value_N, leaf_N, tree.group_N, one_N, cfg)
    within_N = _compared(value_N, leaf_N, tree.tree_N, one_N, cfg)
    return _mean_of_leaves(tree, between_N + within_N, alive_N)


def _compared(
    value_N: Tensor, valid_N: Tensor, scope_N: Tensor, depth_N: Tensor, cfg: AlgoConfig
) -> Tensor:
    """(V - mean) / sd over the nodes of one scope and depth; `baseline=loo` takes the mean of the
    others."""
    key_N = scope_N * (int(depth_N.max()) + 1) + depth_N if len(depth_N) else scope_N
    stats = group_stats(value_N, key_N, valid_N, cfg.reward_tie_tol)
    centred_N = value_N - stats.mean_B
    if cfg.tree.baseline == "loo":
        centred_N = centred_N * stats.count_B / (stats.count_B - 1).clamp(min=1)
    std_N = stats.std_B
    if cfg.scale_rewards == "batch":
        std_N = group_stats(value_N, depth_N, valid_N, cfg.reward_tie_tol).std_B
    if cfg.scale_rewards != "none":
        centred_N = centred_N / (std_N + cfg.adv_eps)
    silent_N = ~valid_N | stats.tied_B | (stats.std_B < cfg.tree.std_floor)
    return torch.where(silent_N, torch.zeros_like(centred_N), centred_N)


def _fused(tree: Tree, cfg: AlgoConfig) -> Tensor:
    section = cfg.tree
    return trees.fuse(tree, section.fuse or "", beta=section.fuse_beta, logp=section.fuse_logp)


def _trained_actions(tree: Tree) -> Tensor:
    return torch.where(tree.kind_N == POLICY, tree.num_actions_N, 0).double()


def _scope(tree: Tree, cfg: AlgoConfig) -> Tensor:
    return tree.group_N if cfg.tree.scope == "prompt" else tree.tree_N


def _mean_of_leaves(tree: Tree, value_N: Tensor, alive_N: Tensor) -> Tensor:
    """For each node the mean of `value_N` over the living leaves under it."""
    leaf_N = alive_N & trees.is_leaf(tree)
    total_N = trees.sum_over_leaves(tree, torch.where(leaf_N, value_N, torch.zeros_like(value_N)))
    return total_N / trees.sum_over_leaves(tree, leaf_N.double()).clamp(min=1)


def _value_of_parent(tree: Tree, value_N: Tensor) -> Tensor:
    """A root's is its own."""
    at_N = torch.where(tree.parent_N >= 0, tree.parent_N, torch.arange(len(tree)))
    return value_N[at_N]


def _value_of_root(tree: Tree, value_N: Tensor) -> Tensor:
    of_N = value_N.clone()
    for at in trees.levels(tree)[1:]:
        of_N[at] = of_N[tree.parent_N[at]]
    return of_N


ADVANTAGES: Mapping[str, Callable[[Tree, Tensor, Tensor, AlgoConfig], Tensor]] = {
    "depth": _depth,
    "sibling": _sibling,
    "parent": _parent,
    "root_parent": _root_parent,
    "ancestors": _ancestors,
    "leaves": _leaves,
}
