"""The reference backend of `linear_logprob`: all logits at once, differentiated by autograd.

Shapes: N tokens, D hidden size, V vocabulary, R rank of the head's adapter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlalign.kernels.op import Options
from rlalign.kernels.transform import accumulator


def run(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    lora_hidden_NR: Tensor | None,
    lora_weight_VR: Tensor | None,
    target_N: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and lse, [N]: what the others are measured against."""
    if options.group:
        raise ValueError("backend 'eager' does not know a head split over processes")
    dtype, transform = accumulator(hidden_ND.dtype), options.transform
    logits_NV = hidden_ND.to(dtype) @ weight_VD.to(dtype).T
    if lora_hidden_NR is not None and lora_weight_VR is not None:
        logits_NV = logits_NV + lora_hidden_NR.to(dtype) @ lora_weight_VR.to(dtype).T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(dtype)
    logits_NV = logits_NV * transform.factor
    if transform.softcap is not None:
        logits_NV = torch.tanh(logits_NV / transform.softcap) * transform.softcap
        logits_NV = logits_NV / transform.temperature
    logits_NV = logits_NV[:, : options.vocab_size]
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    valid_N = target_N != options.ignore_index
    inside_N = (target_N >= 0) & (target_N < options.vocab_size)
    safe_N = torch.where(inside_N, target_N, 0).long()
    logp_N = torch.where(inside_N, logp_NV.gather(1, safe_N[:, None])[:, 0], math.nan)
    entropy_N = -torch.special.xlogy(logp_NV.exp(), logp_NV.exp()).sum(-1)
    zero = logp_N.new_zeros(())
    outputs = (logp_N, entropy_N, logits_NV.logsumexp(-1))
    logp_N, entropy_N, lse_N = (torch.where(valid_N, x, zero) for x in outputs)
    return logp_N, entropy_N, lse_N
