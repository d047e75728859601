"""Which token a masked position would take, how sure that is, and how many are committed at a step.

    token       inversion of p = softmax(logits / temperature), filtered; its uniform number is
                keyed by (seed of the row, step, position)                        sampling.py
    confidence  low_confidence   softmax(logits) of the token                     LLaDA
                random           a uniform number of the position
                maskgit_plus     p of the token                                   Dream
                topk_margin      p of the likeliest token minus that of the second
                entropy          sum_v p_v log p_v
                origin           a uniform number u of the position: its time to go
                and with alg_temp, Dream's: confidence / alg_temp - log(-log u), so that positions
                are drawn by softmax(confidence / alg_temp) without replacement
    quota       step k of T, m masked at the first one, r masked now
                LLaDA            floor(m / T), and one more at the first m mod T steps
                Dream            floor(r (1 - t[k+1] / t[k])), at least 1; at the last step r
                origin           those with t[k] > u >= t[k+1] for the first k that has some
                t[k] = 1 - (1 - 1e-3) k / T

Sources: LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487), Fast-dLLM (arXiv 2505.22618). Dream's
floor may give nothing to a step, which would cost a forward pass for no token: hence at least 1.

Legend: B rows, N places, V vocabulary, W columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.sampling import keep_likeliest, sample, uniform

ORDERS = ("low_confidence", "random", "maskgit_plus", "topk_margin", "entropy", "origin")
PROBABILITIES = ("low_confidence", "maskgit_plus", "topk_margin")  # confidences between 0 and 1
SCHEDULED = ("maskgit_plus", "topk_margin", "entropy")  # quotas by Dream's times
TIME_END = 1e-3
STEP_BITS = 24  # positions below 2^24: a row's step and position are one counter


class Proposal(NamedTuple):
    """What N places would take."""

    token_N: Tensor  # int64
    logp_N: Tensor  # float32: of the token, in the distribution that it was drawn from
    prob_N: Tensor  # float32: of the token, at temperature 1 and without filters
    confidence_N: Tensor  # float32: the larger, the sooner


def propose(
    logits_NV: Tensor,
    seed_N: Tensor,
    step_N: Tensor,
    position_N: Tensor,
    params: SamplingParams,
    order: str,
    alg_temp: float = 0.0,
) -> Proposal:
    """Draw a token for each place. `seed_N`, `step_N` (of the row) and `position_N` (in it) are
    int64. Logits that are not finite show as NaN log-probs."""
    counter_N = (step_N << STEP_BITS) | position_N
    token_N, logp_N = sample(logits_NV, seed_N, counter_N, params)
    prob_N = _at(logits_NV, token_N) - logits_NV.logsumexp(-1)
    prob_N = prob_N.exp()
    if order == "low_confidence":
        confidence_N = prob_N
    elif order in ("random", "origin"):
        # Negative counters: a stream of its own, the same at every step.
        confidence_N = uniform(seed_N, -1 - position_N).float()
    else:
        confidence_N = _filtered_confidence(logits_NV, token_N, params, order)
    if alg_temp:
        noise_N = -(-uniform(seed_N, -1 - counter_N).log()).log()
        confidence_N = confidence_N / alg_temp + noise_N.float()
    return Proposal(token_N, logp_N, prob_N, confidence_N)


def _filtered_confidence(
    logits_NV: Tensor, token_N: Tensor, params: SamplingParams, order: str
) -> Tensor:
    scaled_NV = logits_NV / (params.temperature or 1.0)
    logp_NV = keep_likeliest(scaled_NV, params.top_k, params.top_p).log_softmax(-1)
    if order == "maskgit_plus":
        return _at(logp_NV, token_N).exp()
    if order == "topk_margin":
        top_N2 = logp_NV.topk(2, dim=-1).values.exp()
        return top_N2[:, 0] - top_N2[:, 1]
    return torch.special.entr(logp_NV.exp()).sum(-1).neg()


def quota(order: str, step_B: Tensor, steps: int, size_B: Tensor, left_B: Tensor) -> Tensor:
    """How many positions of a block are committed at its step `step_B` at least: int64 [B], of the
    `left_B` >= 1 that are masked now; `size_B` were when it began."""
    steps_B = size_B.clamp(max=steps)
    if order in SCHEDULED:
        share_B = 1 - _time(step_B + 1, steps_B) / _time(step_B, steps_B)
        quota_B = (left_B * share_B).long().clamp(min=1)
        quota_B = torch.where(step_B + 1 >= steps_B, left_B, quota_B)
    else:
        quota_B = size_B // steps_B + (step_B < size_B % steps_B).long()
    return torch.minimum(quota_B, left_B)


def due(confidence_BW: Tensor, wanted_BW: Tensor, steps: int) -> Tensor:
    """Order `origin`: how many of the wanted positions have the earliest time to go of all."""
    step_BW = ((1 - confidence_BW.double()) / (1 - TIME_END) * steps).long()
    step_BW = step_BW.clamp(max=steps - 1).masked_fill(~wanted_BW, steps)
    return (step_BW == step_BW.amin(1, keepdim=True)).sum(1)


def _time(step_B: Tensor, steps_B: Tensor) -> Tensor:
    return 1 - (1 - TIME_END) * step_B.double() / steps_B


def surest(
    confidence_BW: Tensor,
    wanted_BW: Tensor,
    quota_B: Tensor,
    threshold: float | None,
    factor: float | None,
) -> Tensor:
    """Which wanted positions are committed: bool [B, W]. The `quota_B` surest at least (ties: from
    the left), and whatever `threshold` or `factor` let through beside them."""
    ranked_BW = confidence_BW.masked_fill(~wanted_BW, -torch.inf)
    ranked_BW, order_BW = ranked_BW.sort(dim=1, descending=True, stable=True)
    if threshold is not None:
        quota_B = torch.maximum(quota_B, (ranked_BW >= threshold).sum(1))
    if factor is not None:
        rank_W = torch.arange(1, ranked_BW.shape[1] + 1, device=ranked_BW.device)
        quota_B = torch.maximum(quota_B, (ranked_BW >= 1 - factor / (rank_W + 1)).sum(1))
    rank_BW = order_BW.argsort(dim=1)
    return wanted_BW & (rank_BW < quota_B[:, None])


def _at(values_NV: Tensor, index_N: Tensor) -> Tensor:
    return values_NV.gather(-1, index_N[:, None])[:, 0]
