"""Trees that branch at fixed steps: their size, and their skeleton.

With K_i children of a node at step i (1 where it does not split), T steps and one root,

    W_0 = 1,  W_{i+1} = W_i K_i          nodes at each depth; W_T leaves
    calls = sum_{i<T} W_i                of the network: siblings share their parent's
    edges = sum_{i<T} W_{i+1},  nodes = 1 + edges

T = 20 with splits in two at 0, 3, 6 and 9 (arXiv 2509.06040) has 16 leaves, 203 calls and 218
edges; 16 chains have 320 of both.

Legend: N nodes in level order, R trees, T steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError
from rlalign.types import ODE, POLICY, ROOT, Tree


@dataclass(frozen=True, slots=True)
class TreeShape:
    """The shape of one tree, made by `tree_shape`.

    >>> shape = tree_shape(3, [1], [2])
    >>> shape.factors, shape.widths, shape.num_calls, shape.num_edges
    ((1, 2, 1), (1, 1, 2, 2), 4, 5)
    """

    factors: tuple[int, ...]  # K_i, one per step

    @property
    def num_steps(self) -> int:
        return len(self.factors)

    @property
    def widths(self) -> tuple[int, ...]:
        """W_0 .. W_T."""
        return tuple(itertools.accumulate(self.factors, lambda width, k: width * k, initial=1))

    @property
    def num_leaves(self) -> int:
        return math.prod(self.factors)

    @property
    def num_calls(self) -> int:
        """States that go through the network in a rollout."""
        return sum(self.widths[:-1])

    @property
    def num_edges(self) -> int:
        return sum(self.widths[1:])

    @property
    def num_nodes(self) -> int:
        return sum(self.widths)

    def levels(self, num_trees: int) -> list[slice]:
        """Where each depth of a `full_tree` lies: T + 1 slices of its nodes."""
        bounds = itertools.accumulate((num_trees * width for width in self.widths), initial=0)
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def tree_shape(
    num_steps: int,
    split_steps: Sequence[int],
    branch_factors: Sequence[int],
    *,
    split_last: bool = False,
) -> TreeShape:
    """The shape of a tree of `num_steps` that splits at `split_steps` (from 0, increasing).

    branch_factors: children of a split, one number for all or one for each. split_last: whether the
    last step may split, which is of no use where its noise does not reach the reward. Raises
    AlgoError for a schedule that is none, in place of growing fewer leaves than were asked for.
    """
    splits, limit = list(split_steps), num_steps if split_last else num_steps - 1
    if num_steps < 1:
        raise AlgoError(f"num_steps={num_steps}: a tree needs at least one step")
    if splits != sorted(set(splits)):
        raise AlgoError(f"split_steps={splits} must increase, each step at most once")
    if splits and not (splits[0] >= 0 and splits[-1] < limit):
        hint = "" if split_last else ", and the last step's noise does not reach the reward"
        raise AlgoError(
            f"split_steps={splits} must lie in 0 .. {limit - 1}: there are {num_steps} steps{hint}"
        )
    if len(branch_factors) not in (1, len(splits)) or any(k < 1 for k in branch_factors):
        raise AlgoError(
            f"branch_factor={list(branch_factors)} must be one number, or one for each of the "
            f"{len(splits)} split_steps, from 1 on"
        )
    factors = list(branch_factors) * (1 if len(branch_factors) == len(splits) else len(splits))
    children = dict(zip(splits, factors, strict=True))
    return TreeShape(tuple(children.get(step, 1) for step in range(num_steps)))


def full_tree(
    group_R: Tensor, shape: TreeShape, *, ode_steps: Collection[int] = (), num_actions: int = 1
) -> Tree:
    """R trees of one shape before anything is known of them: rewards NaN, log-probs 0.

    group_R: int64, the group of each tree. Nodes lie depth by depth (`shape.levels(R)`), and row
    r of a depth has the children r K .. r K + K - 1 of the next: states of a depth are
    `repeat_interleave` of those before, and the leaves of a tree lie together.
    ode_steps: deterministic steps. num_actions: of every other edge. Raises AlgoError where a tree
    would split at a deterministic step.
    """
    both = [step for step, k in enumerate(shape.factors) if k > 1 and step in ode_steps]
    if both:
        raise AlgoError(
            f"split_steps={both} are deterministic: their siblings would be equal; let these steps "
            "be stochastic"
        )
    num_trees = len(group_R)
    levels = shape.levels(num_trees)
    parents, tree_ids = [torch.full((num_trees,), -1)], [torch.arange(num_trees)]
    for level, factor in zip(levels, shape.factors, strict=False):
        parents.append(torch.arange(level.start, level.stop).repeat_interleave(factor))
        tree_ids.append(tree_ids[-1].repeat_interleave(factor))
    size_D = torch.tensor([level.stop - level.start for level in levels])
    kinds = [ROOT, *(ODE if step in ode_steps else POLICY for step in range(shape.num_steps))]
    kind_N = torch.tensor(kinds).repeat_interleave(size_D)
    tree_N = torch.cat(tree_ids)
    return Tree(
        parent_N=torch.cat(parents),
        depth_N=torch.arange(len(levels)).repeat_interleave(size_D),
        tree_N=tree_N,
        group_N=group_R[tree_N],
        kind_N=kind_N,
        reward_N=torch.full((len(tree_N),), torch.nan),
        logp_N=torch.zeros(len(tree_N)),
        num_actions_N=torch.where(kind_N == POLICY, num_actions, 0),
    )
