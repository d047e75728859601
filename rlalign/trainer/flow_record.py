"""What one step of a flow run leaves behind: figures, a row for each leaf, and the first trees with
their images. Names: docs/metrics.md."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from rlalign import algos
from rlalign.algos.branch_grpo import TreeCredit
from rlalign.config import AlgoConfig
from rlalign.tracking.png import data_uri
from rlalign.trainer.record_trees import tree_metrics, tree_rows
from rlalign.types import POLICY, Tree

if TYPE_CHECKING:
    from rlalign.trainer.flow_job import FlowRollout

THUMBNAIL = 128  # pixels: a run keeps dozens of images a step


def flow_metrics(rollout: FlowRollout, credit: TreeCredit, algo: AlgoConfig) -> dict[str, float]:
    """Reward figures of the leaves of all trees, and what the trees say about their splits."""
    batch, scores = rollout.batch, rollout.scores
    tree, shape = batch.tree, batch.plan.shape
    leaves = shape.levels(len(tree.tree_N.unique()))[-1]
    metrics = algos.finalize_metrics(
        algos.reward_metrics(tree.reward_N[leaves], tree.group_N[leaves], algo)
    )
    metrics = {"reward": float("nan")} | metrics
    for name, value_B in scores.by_function.items():
        known = value_B[torch.isfinite(value_B)]
        if len(known):
            metrics[f"rewards/{name}/mean"] = float(known.mean())
    for kind, count in scores.errors.items():
        metrics[f"rewards/errors/{kind}"] = float(count)
    of_trees = tree_metrics(tree, credit)
    for depth in range(1, shape.num_steps + 1):
        if shape.factors[depth - 1] == 1:  # the same as the depth before
            of_trees.pop(f"tree/explained_variance/{depth}", None)
    return metrics | of_trees


def picture_rows(step: int, rollout: FlowRollout, credit: TreeCredit) -> list[dict[str, Any]]:
    """The lines of the first trees, as the file of trees has them; images are data URIs."""
    images: list[str | None] = [None] * len(rollout.batch.tree)
    for node, image in rollout.pictures.items():
        images[node] = data_uri(_thumbnail(image))
    return list(tree_rows(step, rollout.batch.tree, credit, rollout.prompts, {"image": images}))


def leaf_rows(step: int, rollout: FlowRollout, credit: TreeCredit) -> list[dict[str, Any]]:
    """One row for each leaf of all processes, as the rollouts file has them."""
    batch, scores = rollout.batch, rollout.scores
    shape = batch.plan.shape
    leaves = shape.levels(len(batch.tree.tree_N.unique()))[-1]
    rows = []
    decided_N = _last_choice(batch.tree)
    for i, node in enumerate(range(leaves.start, leaves.stop)):
        prompt = rollout.prompts[int(batch.tree.group_N[node])]
        rows.append(
            {
                "step": step,
                "prompt_id": prompt.id,
                "index": i % shape.num_leaves,
                "tree": int(batch.tree.tree_N[node]),
                "prompt": prompt.source,
                "answer": prompt.answer,
                "completion": "",
                "reward": _number(scores.reward_B[i]),
                "acc": _number(scores.acc_B[i]),
                "rewards": {n: _number(v_B[i]) for n, v_B in scores.by_function.items()},
                "advantage": float(credit.advantage_N[decided_N[node]]),
            }
        )
    return rows


def _last_choice(tree: Tree) -> torch.Tensor:
    """For each node the last one on its path that the policy chose: below it steps may be
    deterministic."""
    at_N = torch.arange(len(tree))
    for _ in range(int(tree.depth_N.max())):
        above = (tree.kind_N[at_N] != POLICY) & (tree.parent_N[at_N] >= 0)
        at_N = torch.where(above, tree.parent_N[at_N], at_N)
    return at_N


def _thumbnail(image: torch.Tensor) -> torch.Tensor:
    """[C, H, W] of at most `THUMBNAIL` pixels a side; of a video the frame in its middle."""
    image_CHW = image if image.ndim == 3 else image[len(image) // 2]
    factor = math.ceil(max(image_CHW.shape[1:]) / THUMBNAIL)
    return F.avg_pool2d(image_CHW, factor, ceil_mode=True) if factor > 1 else image_CHW


def _number(value: torch.Tensor) -> float | None:
    return float(value) if torch.isfinite(value) else None
