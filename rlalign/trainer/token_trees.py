"""Training on trees of tokens: leaves are the rows, and a token that several share counts once.

A shared token belongs to the first row that may train and holds it, and is masked in the others, so
ratio, clip, KL, entropy and figures see each token once, and whatever works for rows works for
trees. How much it counts is the business of its node:

    advantage_bt = A(n),    weight_bt = u(n),    n = node_bt            (algos/branch_grpo.py)

A leaf that may not train (unscorable, aborted, or truncated under `mask_truncated_completions`)
takes along what leads to such leaves alone; what others share goes on training. Unscorable leaves
are no part of values either.

Shapes: B leaves, T tokens of the longest, N nodes of all trees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rlalign import algos
from rlalign.config import AlgoConfig, Config
from rlalign.types import Group, TrainBatch, Tree


def with_trees(batch: TrainBatch, groups: Sequence[Group], algo: AlgoConfig) -> TrainBatch:
    """`batch`, the leaves of `groups` as rows, with their trees and each token in one row only.

    Tokens as likely as `algo.tree.prob_mask` or likelier do not train.
    """
    tree = forest(groups, batch.reward_B)
    node_BT = torch.full(batch.mask_BT.shape, -1)
    own_BT = torch.zeros(batch.mask_BT.shape)
    trains = batch.mask_BT.any(dim=1).tolist()
    taken: set[int] = set()
    for row, path in enumerate(_paths(groups)):
        length_S = tree.num_actions_N[path]
        own = torch.tensor([trains[row] and node not in taken for node in path])
        taken.update(path if trains[row] else ())
        width = int(length_S.sum())
        node_BT[row, :width] = torch.tensor(path).repeat_interleave(length_S)
        own_BT[row, :width] = own.float().repeat_interleave(length_S)
    if algo.tree.prob_mask is not None:
        own_BT = own_BT * (batch.logp_rollout_BT < math.log(algo.tree.prob_mask))
    return batch.replace(tree=tree, node_BT=node_BT, mask_BT=batch.mask_BT * own_BT)


def forest(groups: Sequence[Group], reward_B: torch.Tensor) -> Tree:
    """The trees of all groups as one, with the rewards of their leaves; group i is `group_N` i.

    reward_B: of the samples of all groups, in order; NaN: unscorable.
    """
    parts, nodes, num_trees, row = [], 0, 0, 0
    for number, group in enumerate(groups):
        assert group.tree is not None
        tree, leaves = group.tree, torch.tensor([path[-1] for path in group.paths])
        parts.append(
            tree.replace(
                parent_N=torch.where(tree.parent_N < 0, -1, tree.parent_N + nodes),
                tree_N=tree.tree_N + num_trees,
                group_N=torch.full_like(tree.group_N, number),
                reward_N=tree.reward_N.index_copy(0, leaves, reward_B[row : row + len(leaves)]),
            )
        )
        nodes, row = nodes + len(tree), row + len(leaves)
        num_trees += int(tree.tree_N.max()) + 1
    fields = {name: [getattr(part, name) for part in parts] for name in Tree.__slots__}
    return Tree(**{name: torch.cat(tensors) for name, tensors in fields.items()})


def credit(batch: TrainBatch, config: Config, step: int) -> algos.TreeCredit:
    """Values, advantages and what trains in `step` (from 0), of the trees of a whole batch."""
    assert batch.tree is not None
    actions_N = _actions(batch)
    return algos.tree_credit(
        batch.tree,
        config.algo,
        actions_N,
        step=step,
        max_steps=config.trainer.max_steps,
        trains_N=actions_N > 0,
    )


def with_credit(batch: TrainBatch, config: Config, step: int) -> TrainBatch:
    """Attach the advantages (of all tokens, also where another row has the token), and mask what is
    pruned in `step`. A batch without groups (dynamic sampling found none) has no trees."""
    if batch.tree is None:
        return batch.replace(advantage_BT=torch.zeros_like(batch.mask_BT))
    found = credit(batch, config, step)
    kept_BT = _of_tokens(found.keep_N.float(), batch)
    return batch.replace(
        advantage_BT=_of_tokens(found.advantage_N.float(), batch), mask_BT=batch.mask_BT * kept_BT
    )


def with_weights(minibatch: TrainBatch, algo: AlgoConfig) -> TrainBatch:
    """Attach each token's part of the loss over the nodes of which `minibatch` trains tokens. It
    holds groups whole; a node without such tokens counts nowhere."""
    assert minibatch.tree is not None
    actions_N = _actions(minibatch)
    weight_N = algos.edge_weights(minibatch.tree, actions_N > 0, algo, actions_N)
    return minibatch.replace(weight_BT=_of_tokens(weight_N.float(), minibatch) * minibatch.mask_BT)


def _paths(groups: Sequence[Group]) -> list[list[int]]:
    """Nodes of each row, numbered as in the forest."""
    paths, nodes = [], 0
    for group in groups:
        assert group.tree is not None
        paths += [[node + nodes for node in path] for path in group.paths]
        nodes += len(group.tree)
    return paths


def _actions(batch: TrainBatch) -> torch.Tensor:
    """Tokens of each node that train in `batch`: int64 [N]."""
    assert batch.tree is not None and batch.node_BT is not None
    return torch.bincount(batch.node_BT[batch.mask_BT > 0], minlength=len(batch.tree))


def _of_tokens(value_N: torch.Tensor, batch: TrainBatch) -> torch.Tensor:
    """Each token's node's value, 0 where there is no token: [B, T]."""
    assert batch.node_BT is not None
    return torch.where(batch.node_BT < 0, 0.0, value_N[batch.node_BT.clamp(min=0)])
