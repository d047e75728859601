# ruff: noqa: RUF009  (option() and section() return dataclass fields)
"""Rollouts that share their beginnings (docs/trees.md): how credit is given in a tree
(`algo.tree`), and how a tree of tokens grows (`rollout.tree`)."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.fields import option, section


@dataclass
class DepthPruneConfig:
    """A window of depths without gradient, which slides."""

    size: int = option(0, "Depths; 0: no window.", ge=0)
    start: int = option(10, "First depth of the window at the first step.", ge=1)
    direction: str = option("later", "Where it slides to.", choices=("later", "earlier"))
    interval: int = option(30, "Steps after which it slides by one.", ge=1)
    stop: int = option(
        20, "It never covers a later depth (later), or begins before it (earlier).", ge=1
    )


@dataclass
class TreeConfig:
    """Credit in a tree. Unset fields come from the `loss_type` and `compat`."""

    compat: str = option(
        "rlalign",
        "Where BranchGRPO's paper, its published code and our measurements differ.",
        choices=("rlalign", "paper", "official"),
    )
    fuse: str | None = option(
        None,
        "How the rewards of leaves become the values of inner nodes.",
        choices=("child_mean", "leaf_mean", "edge_softmax", "path_softmax"),
    )
    fuse_beta: float = option(1.0, "Inverse temperature of the softmaxes; 0: uniform.", ge=0)
    fuse_logp: str = option(
        "mean", "An edge's log-prob there: per action, or the sum.", choices=("mean", "sum")
    )
    advantage: str | None = option(
        None,
        "What a node's value is compared with.",
        choices=("depth", "sibling", "parent", "root_parent", "ancestors", "leaves"),
    )
    scope: str | None = option(
        None, "Compared within a tree, or over all trees of a prompt.", choices=("tree", "prompt")
    )
    baseline: str = option(
        "mean", "Mean of all that are compared, or of the others.", choices=("mean", "loo")
    )
    std_floor: float = option(1e-6, "A standard deviation below this is no signal.", ge=0)
    advantage_clip: float = option(5.0, "Bound of the advantage in the loss; 0: none.", ge=0)
    carry_leaves: bool = option(
        False, "A leaf that ended early is also compared with deeper nodes (advantage=depth)."
    )
    weight: str | None = option(
        None,
        "How much an edge counts in the loss.",
        choices=("depth_mean", "edge_mean", "omega_sum", "token_mean", "leaf_count"),
    )
    width_prune: str = option(
        "none",
        "Chains below the last split that train: all, the better one of siblings, those of the "
        "best and worst leaves, or what the published code keeps of them.",
        choices=("none", "parent_top1", "extreme_b", "official_mode1", "official_mode2"),
    )
    width_prune_b: int = option(4, "Best, and worst, leaves of a prompt under extreme_b.", ge=1)
    width_prune_ratio: float = option(
        0.5, "Share of the edges of chains that the official modes keep.", gt=0, le=1
    )
    prune_step_ratio: float = option(1.0, "Share of the run in which is pruned.", ge=0, le=1)
    drop_zero: bool | None = option(
        None, "Edges of advantage 0 count nowhere, in place of with a loss of 0."
    )
    prob_mask: float | None = option(
        None,
        "Tokens as likely as this, or likelier, do not train (SPO); unset: all do.",
        gt=0,
        le=1,
    )
    depth_prune: DepthPruneConfig = section(DepthPruneConfig, "Depths without gradient.")


@dataclass
class TokenTreeConfig:
    """How a tree of tokens grows; `num_trees` 0: no trees, `num_generations` flat samples."""

    num_trees: int = option(0, "Trees of a prompt; 0: flat samples.", ge=0)
    segmenter: str = option(
        "fixed",
        "Where branches part: after every segment_length tokens, or at the least likely tokens "
        "of finished chains.",
        choices=("fixed", "surprisal"),
    )
    segment_length: int = option(32, "Tokens of a segment.", ge=1)
    align: int = option(
        0,
        "Splits move to where the sequence, prompt included, is a multiple of this and one token "
        "long: with the engine's cache block, a beginning is read from the cache whole.",
        ge=0,
    )
    branch_factor: list[int] = option(
        [2],
        "Children of a node, by depth (the last number holds for all deeper); 1: no split.",
    )
    max_depth: int = option(
        16, "Segments from the root; the last runs to the end of the completion.", ge=1
    )
    max_leaves: int = option(16, "Finished samples of a tree; a full tree splits no more.", ge=1)
    fallback: bool = option(
        False, "Samples that ended early are replaced by further ones from an earlier split."
    )
    num_forks: int = option(2, "surprisal: tokens of a tree to fork at, each round.", ge=1)
    num_rounds: int = option(1, "surprisal: rounds of forking.", ge=0)
    fork_width: int = option(2, "surprisal: continuations of a fork.", ge=1)
