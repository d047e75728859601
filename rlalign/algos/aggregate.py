"""Aggregation: how token losses l_it become one number.

Every mode is one weight per token, computed ONCE on the global optimizer batch:

    loss = sum_it w_it l_it

The loss is linear in l with weights that no longer depend on anything, so any partition of the
rows into micro-batches, packs and processes adds up to the same loss and the same gradient. A
trainer whose backend averages over W processes and divides by K accumulation steps multiplies its
local sum by W * K, and that is all it has to know.

With m the mask, n_i = sum_t m_it and S the sequences with n_i > 0:

    token-mean                w = m / sum(m)                    DAPO, CISPO, verl's default
    seq-mean-token-mean       w = m / (n_i |S|)                 the original GRPO, GSPO
    seq-mean-token-sum        w = m / |S|                       RLOO, REINFORCE
    seq-mean-token-sum-norm   w = m / (|S| loss_scale_factor)   Dr. GRPO
    token-mean-local          token-mean of ONE micro-batch     TRL's bnpo; depends on the split

`prompt_weighting=prompt` takes the denominators within each group and gives every group with
tokens the same share: w_group / number of such groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError
from rlalign.algos.segments import compact, segment_sum

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

LOCAL_MODES = ("token-mean-local",)


def aggregation_weights(
    mask_BT: Tensor, group_id_B: Tensor, cfg: AlgoConfig, *, max_completion_length: int
) -> Tensor:
    """Each token's share of the loss, float32 (float64 for a float64 mask), [B, T].

    mask_BT: of the whole optimizer batch (all processes, all micro-batches), 0 or 1; under a mode
    for which `depends_on_split` holds, of one micro-batch instead, and the caller divides by the
    number of micro-batches. max_completion_length: tokens; the default of `loss_scale_factor`.
    Fully masked sequences get weight 0 and count nowhere; a batch without tokens gets all zeros.
    Raises AlgoError for an unknown mode.
    """
    mask64_BT = mask_BT.double()
    length_B = mask64_BT.sum(1)
    present_B = (length_B > 0).double()
    index_B, num_groups = _cells(group_id_B, cfg)
    num_sequences_B = segment_sum(present_B, index_B, num_groups)[index_B].clamp(min=1)
    if cfg.loss_agg_mode in ("token-mean", *LOCAL_MODES):
        share_B = 1 / segment_sum(length_B, index_B, num_groups)[index_B].clamp(min=1)
    elif cfg.loss_agg_mode == "seq-mean-token-mean":
        share_B = 1 / (length_B.clamp(min=1) * num_sequences_B)
    elif cfg.loss_agg_mode == "seq-mean-token-sum":
        share_B = 1 / num_sequences_B
    elif cfg.loss_agg_mode == "seq-mean-token-sum-norm":
        share_B = 1 / (num_sequences_B * (cfg.loss_scale_factor or max_completion_length))
    else:
        raise AlgoError(
            f"algo.loss_agg_mode={cfg.loss_agg_mode!r} is no aggregation; "
            "pass the config through rlalign.algos.resolve first"
        )
    present_G = segment_sum(present_B, index_B, num_groups) > 0
    weight_BT = mask64_BT * share_B[:, None] / present_G.sum().clamp(min=1)
    return weight_BT.to(torch.promote_types(mask_BT.dtype, torch.float32))


def depends_on_split(cfg: AlgoConfig) -> bool:
    """Whether weights must be taken per micro-batch, so that the gradient depends on the split."""
    return cfg.loss_agg_mode in LOCAL_MODES


def _cells(group_id_B: Tensor, cfg: AlgoConfig) -> tuple[Tensor, int]:
    """The sets of sequences that share one denominator: everything, or each prompt."""
    if cfg.prompt_weighting == "prompt":
        return compact(group_id_B)
    return torch.zeros_like(group_id_B), 1
