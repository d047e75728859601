"""Losses in which the rows of a prompt depend on each other's current log-probs (CoPG).

group_in_microbatch   a prompt's rows stay together: one forward pass, the loss itself
two_pass              log-probs of all rows without gradient, the slope of the loss in each of
                      them, then each row in any micro-batch with that slope: the same gradient,
                      as the weights are the same, for one more forward pass
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlalign import algos
from rlalign.algos.metrics import Metrics
from rlalign.config import Config
from rlalign.errors import RlalignError
from rlalign.trainer.packing import Row, load
from rlalign.types import TrainBatch


class SplitGroupError(RlalignError):
    """A prompt's rows do not fit into one micro-batch."""


def rows_of_groups(batch: TrainBatch) -> list[list[int]]:
    """Row indices of each group, in the order of their ids."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group_id_B.tolist()):
        members.setdefault(group, []).append(row)
    return [members[group] for group in sorted(members)]


def groups_as_rows(
    rows: Sequence[Row], groups: Sequence[Sequence[int]], max_tokens: int
) -> list[Row]:
    """Each group, indices of `rows` in ascending order, as one row of a plan of micro-batches.

    Raises SplitGroupError for one of more than `max_tokens` tokens.
    """
    whole = []
    for number, members in enumerate(groups):
        tokens = load(members, rows)
        if tokens > max_tokens:
            raise SplitGroupError(
                f"the {len(members)} completions of one prompt are {tokens} tokens, more than "
                f"trainer.micro_batch_tokens = {max_tokens}, and their loss needs all of them: "
                "raise it, or set algo.copg.microbatch_mode=two_pass"
            )
        whole.append(Row(tokens, number, 0))
    return whole


def slopes(
    logp_BT: torch.Tensor, batch: TrainBatch, config: Config
) -> tuple[torch.Tensor, Metrics]:
    """Derivative of the loss in each log-prob, [B, T], and the loss's figures."""
    leaf_BT = logp_BT.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = algos.policy_loss(leaf_BT, batch, config.algo)
        (slope_BT,) = torch.autograd.grad(output.loss, leaf_BT)
    return slope_BT, output.metrics
