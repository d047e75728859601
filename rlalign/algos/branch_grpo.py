"""BranchGRPO: rollouts are trees, and an edge is judged by what came of its siblings.

    V(leaf) = reward,  V(n) = mean of its children's                             (tree.py)
    A(n) = (V(n) - mean_d) / (sd_d + eps)   over the nodes of n's depth d        (tree_advantage.py)
    J = sum_e u_e min(rho_e A_e, clip(rho_e, 1 - eps_lo, 1 + eps_hi) A_e)        (tree_pruning.py)

over the kept edges e, with rho_e = pi_new / pi_old of the edge. Li et al. 2025, arXiv 2509.06040,
for flow models; the same over segments of tokens. The flat methods for flow models are the tree
that never branches: one root per sample, compared over the prompt.

`algo.tree.compat` says which of three accounts is meant: `paper` weighs leaves by the probability
of their path, `official` (the published code) does not, and both average over edges. That lets the
wide last depths decide, while an average over depths estimates the policy gradient without bias and
learns faster (the default).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlalign.algos import tree as trees
from rlalign.algos.base import Algorithm
from rlalign.algos.segments import group_stats
from rlalign.algos.tree_advantage import tree_advantages
from rlalign.algos.tree_pruning import edge_weights, select_edges
from rlalign.types import Tree

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

TIE_TOL = 1e-8  # relative spread below which rewards count as equal


class TreeCredit(NamedTuple):
    """What the loss needs of each node's edge, float64 [N] (`keep_N` bool)."""

    value_N: Tensor  # NaN: no scorable leaf below
    advantage_N: Tensor
    keep_N: Tensor  # trains in this step
    weight_N: Tensor  # share of the loss, for each action


def tree_credit(
    tree: Tree,
    cfg: AlgoConfig,
    actions_N: Tensor,
    *,
    step: int = 0,
    max_steps: int = 1,
    trains_N: Tensor | None = None,
) -> TreeCredit:
    """Values, advantages as the loss takes them, and each edge's share of the loss in `step`.

    actions_N: how many losses an edge has, 1 or its tokens. trains_N: bool, False for edges that
    are not to train whatever pruning says. A group whose edges all have advantage 0 counts in the
    shares, as it does in a flat batch, unless `algo.tree.drop_zero`.
    """
    value_N, advantage_N = tree_advantages(tree, cfg)
    keep_N = select_edges(tree, value_N, cfg, step=step, max_steps=max_steps)
    if trains_N is not None:
        keep_N = keep_N & trains_N
    if cfg.tree.drop_zero:
        keep_N = keep_N & (advantage_N != 0)
    weight_N = edge_weights(tree, keep_N, cfg, actions_N)
    if cfg.tree.advantage_clip:
        bound = cfg.tree.advantage_clip
        advantage_N = advantage_N.clamp(-bound, bound)
    return TreeCredit(value_N, advantage_N, keep_N, weight_N)


def explained_variance(tree: Tree, value_N: Tensor) -> dict[int, float]:
    """For each depth, the share of the leaf rewards' variance within groups that lies between its
    nodes (and the leaves above it, which ended early): never less than at the depth before, 1 at
    the last; 0 everywhere where all rewards of a group are equal.

    It says which split matters: a depth whose share grows over the one before decides outcomes.
    """
    leaf_N = trees.is_leaf(tree) & value_N.isfinite()
    stats = group_stats(value_N, tree.group_N, leaf_N, TIE_TOL)
    centred_N = torch.where(leaf_N & ~stats.tied_B, value_N - stats.mean_B, 0.0)
    total = float((centred_N**2).sum())
    count_N = trees.sum_over_leaves(tree, leaf_N.double())
    mean_N = trees.sum_over_leaves(tree, centred_N) / count_N.clamp(min=1)
    shares, ended = {}, 0.0
    for depth, at in enumerate(trees.levels(tree)):
        between = ended + float((count_N[at] * mean_N[at] ** 2).sum())
        shares[depth] = between / total if total > 0 else 0.0
        ended += float((centred_N[at] ** 2).sum())
    return shares


SHARED = {"adv_estimator": "tree", "loss_agg_mode": "token-mean"}
FLAT = {"scope": "prompt", "weight": "edge_mean"}

ALGORITHMS = (
    Algorithm(
        name="branch_grpo",
        summary="Trees of rollouts: depth-wise advantages, edges instead of samples.",
        source="Li et al. 2025, arXiv 2509.06040",
        defaults=SHARED,
        paper_settings={"epsilon": 1e-3, "tree.compat": "paper"},
    ),
    Algorithm(
        name="dance_grpo",
        summary="Flat rollouts of a flow model from one noise; a random part of the steps trains.",
        source="Xue et al. 2025, arXiv 2505.07818",
        defaults=SHARED,
        paper_settings={"epsilon": 1e-4},
        tree=FLAT,
    ),
    Algorithm(
        name="flow_grpo",
        summary="Flat rollouts of a flow model; rewards divided by the batch's deviation, KL.",
        source="Liu et al. 2025, arXiv 2505.05470",
        defaults={**SHARED, "scale_rewards": "batch", "beta": 0.04},
        paper_settings={"epsilon": 1e-4},
        tree=FLAT,
    ),
    Algorithm(
        name="mix_grpo",
        summary="Flat rollouts of a flow model, stochastic in a sliding window of steps only.",
        source="Li et al. 2025, arXiv 2507.21802",
        defaults=SHARED,
        paper_settings={"epsilon": 1e-4},
        tree=FLAT,
    ),
)
