"""VRPO: preferences between a prompt's completions, by estimates of the bound (LLaDA 1.5).

    g_i = ell_i - ell_i_ref, under the same masks
    loss = 1/G sum_g mean over pairs of g with R_i > R_j of -log sigmoid(beta (g_i - g_j))

This is DPO with estimates in the place of log-probs. -log sigmoid is convex, so noise of the
estimates biases it: many passes, each with a mask of its own, and the same masks for policy and
reference keep it small. Here every pair of a group counts; a prompt without a pair adds nothing.
Zhu et al. 2025, arXiv 2505.19223 (pairs from preference data); beta is not given there.

Legend: B rows, P pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from rlalign.algos.base import Algorithm
from rlalign.algos.elbo import reference_gap
from rlalign.algos.errors import AlgoError
from rlalign.algos.loss import Figures, LossOutput
from rlalign.algos.segments import compact, is_tied, same_group_pairs, segment_sum
from rlalign.types import TrainBatch

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


def estimate_loss(
    logp_BJT: Tensor, batch: TrainBatch, cfg: AlgoConfig, max_completion_length: int
) -> LossOutput:
    """The loss of whole groups (algos/base.py). Raises AlgoError without a reference or beta."""
    if not cfg.beta or batch.logp_ref_BT is None or batch.weight_BT is None:
        raise AlgoError("vrpo needs algo.beta > 0, logp_ref_BT and weight_BT in the batch")
    gap_B = reference_gap(logp_BJT, batch)
    better_P, worse_P = preferences(batch, cfg.reward_tie_tol)
    margin_P = cfg.beta * (gap_B[better_P] - gap_B[worse_P])
    index_B, num_groups = compact(batch.group_id_B)
    group_P = index_B[better_P]
    pairs_G = segment_sum(torch.ones_like(margin_P), group_P, num_groups)
    share_B = batch.weight_BT.amax(1) if batch.weight_BT.shape[1] else batch.weight_BT.sum(1)
    share_G = segment_sum(share_B, index_B, num_groups).to(margin_P.dtype)
    weight_P = (share_G / pairs_G.clamp(min=1))[group_P]
    # The sum over rows keeps a graph where there is no pair.
    loss = -(weight_P * F.logsigmoid(margin_P)).sum() + 0.0 * gap_B.sum()
    count = torch.tensor(float(len(margin_P)))
    won_P = margin_P.detach() > 0
    rows = (batch.mask_BT.sum(1) > 0).sum().to(gap_B.dtype)
    metrics: Figures = {
        "vrpo/accuracy": (won_P.sum().float(), count),
        "vrpo/margin": (margin_P.detach().sum(), count),
        "vrpo/gap": (gap_B.detach().sum(), rows),
    }
    return LossOutput(loss, metrics)


def preferences(batch: TrainBatch, tie_tol: float) -> tuple[Tensor, Tensor]:
    """Rows (better, worse) of every pair of a group whose rewards differ, of those that train:
    two int64 tensors [P]."""
    index_B, _ = compact(batch.group_id_B)
    one_P, other_P = same_group_pairs(index_B)
    usable_B = batch.mask_BT.bool().any(1) & batch.reward_B.isfinite()
    first_P, second_P = batch.reward_B[one_P], batch.reward_B[other_P]
    low_P, high_P = torch.minimum(first_P, second_P), torch.maximum(first_P, second_P)
    differ_P = usable_B[one_P] & usable_B[other_P] & ~is_tied(low_P, high_P, tie_tol)
    better_P = torch.where(first_P > second_P, one_P, other_P)
    worse_P = torch.where(first_P > second_P, other_P, one_P)
    return better_P[differ_P], worse_P[differ_P]


ALGORITHM = Algorithm(
    name="vrpo",
    summary="Diffusion language models: DPO on the bound, over the pairs of a group.",
    source="Zhu et al. 2025, arXiv 2505.19223",
    defaults={
        "adv_estimator": "rloo",  # what the sample table shows; the loss has its own
        "scale_rewards": "none",
        "importance_sampling_level": "sequence",
        "policy_loss": "reinforce",
        "loss_agg_mode": "seq-mean-token-sum",
        "prompt_weighting": "prompt",
        "beta": 0.1,
        "kl_in": "loss",
        "kl_estimator": "k2",
    },
    fixed=(
        "adv_estimator",
        "scale_rewards",
        "importance_sampling_level",
        "policy_loss",
        "loss_agg_mode",
        "prompt_weighting",
        "kl_estimator",
    ),
    likelihood={"estimator": "count_strat", "num_mc_samples": 8},
    estimate_loss=estimate_loss,
    couples_rows=True,
)
