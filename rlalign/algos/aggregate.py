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

`prompt_weighting` says how prompts count beside each other. With s_i the row's own weight, the same
within a group (1, or what an allocator says; S and m above then are weighted by it):

    sample                as above: a prompt counts by its samples
    prompt                the denominators are taken within each group, and group g of the groups
                          with tokens has the share s_g / sum s
    inverse_propensity    w = s_i m / G, or s_i m / (n_i G) for the means over tokens: G groups,
                          s_i = 1 / (n p) with n samples, each accepted with probability p (Lemma 1
                          of GVM, arXiv 2505.02391)

RAFT averages over what it accepts (`allocation.normalize_over`); its KL and entropy go over all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError
from rlalign.algos.segments import compact, segment_sum
from rlalign.types import TrainBatch

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig

LOCAL_MODES = ("token-mean-local",)


def attach_weights(
    batch: TrainBatch, cfg: AlgoConfig, *, max_completion_length: int, share: float = 1.0
) -> TrainBatch:
    """`batch`, the rows of one optimizer step with their advantages, with each token's part of the
    loss (see above) times `share`: `weight_BT`, and `policy_weight_BT` where it differs."""

    def weights(mask_BT: Tensor) -> Tensor:
        weight_BT = aggregation_weights(
            mask_BT,
            batch.group_id_B,
            cfg,
            max_completion_length=max_completion_length,
            group_weight_B=batch.group_weight_B,
        )
        return share * weight_BT

    batch = batch.replace(weight_BT=weights(batch.mask_BT))
    if cfg.adv_estimator != "raft" or cfg.allocation.normalize_over != "accepted":
        return batch
    assert batch.advantage_BT is not None
    return batch.replace(policy_weight_BT=weights(batch.mask_BT * (batch.advantage_BT != 0)))


def aggregation_weights(
    mask_BT: Tensor,
    group_id_B: Tensor,
    cfg: AlgoConfig,
    *,
    max_completion_length: int,
    group_weight_B: Tensor | None = None,
) -> Tensor:
    """Each token's share of the loss: [B, T], at least float32, 0 outside the mask.

    Give every sequence of the optimizer step, of all processes. max_completion_length: divisor of
    seq-mean-token-sum-norm unless `loss_scale_factor` is set. group_weight_B: >= 0, None for 1.
    Fully masked sequences get weight 0 and count nowhere; a batch without tokens gets all zeros.
    Raises AlgoError for an unknown mode.
    """
    mask64_BT = mask_BT.double()
    length_B = mask64_BT.sum(1)
    own_B = torch.ones_like(length_B) if group_weight_B is None else group_weight_B.double()
    present_B = own_B * (length_B > 0)
    group_B, num_groups = compact(group_id_B)
    if cfg.prompt_weighting == "inverse_propensity":
        total_B = present_B.new_full(present_B.shape, num_groups)
        tokens_B = total_B * length_B
    else:
        by_prompt = cfg.prompt_weighting == "prompt"
        cell_B = group_B if by_prompt else torch.zeros_like(group_B)
        total_B = segment_sum(present_B, cell_B, num_groups)[cell_B]
        tokens_B = segment_sum(own_B * length_B, cell_B, num_groups)[cell_B]
    share_B = own_B * _share(total_B, tokens_B, length_B, cfg, max_completion_length)
    if cfg.prompt_weighting == "prompt":
        share_B = share_B * _group_share(present_B, group_B, num_groups)
    weight_BT = mask64_BT * share_B[:, None]
    return weight_BT.to(torch.promote_types(mask_BT.dtype, torch.float32))


def _share(
    total_B: Tensor, tokens_B: Tensor, length_B: Tensor, cfg: AlgoConfig, max_length: int
) -> Tensor:
    """Of one token, where `total_B` sequences and `tokens_B` tokens share one denominator."""
    if cfg.loss_agg_mode in ("token-mean", *LOCAL_MODES):
        return _inverse(tokens_B)
    if cfg.loss_agg_mode == "seq-mean-token-mean":
        return _inverse(length_B * total_B)
    if cfg.loss_agg_mode == "seq-mean-token-sum":
        return _inverse(total_B)
    if cfg.loss_agg_mode == "seq-mean-token-sum-norm":
        return _inverse(total_B * (cfg.loss_scale_factor or max_length))
    raise AlgoError(
        f"algo.loss_agg_mode={cfg.loss_agg_mode!r} is no aggregation; "
        "pass the config through rlalign.algos.resolve first"
    )


def _group_share(present_B: Tensor, group_B: Tensor, num_groups: int) -> Tensor:
    """s_g / sum s over the groups with tokens, for each row."""
    weight_G = present_B.new_zeros(num_groups).scatter_reduce(0, group_B, present_B, "amax")
    return (weight_G * _inverse(weight_G.sum()))[group_B]


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1 / torch.where(x > 0, x, 1.0), 0.0)


def depends_on_split(cfg: AlgoConfig) -> bool:
    """Whether weights must be taken per micro-batch, so that the gradient depends on the split."""
    return cfg.loss_agg_mode in LOCAL_MODES
