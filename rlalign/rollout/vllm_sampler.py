"""One batch of vLLM's in which some sequences want the log-probs of their likeliest tokens, others
those of named ones.

vLLM's first runner (0.32) then gives all of them the named columns alone, so the likeliest tokens
would be missing, without an error. Its second runner, on GPUs, has no such fault and does not use
this class.

Shapes: B sequences, K columns, the sampled token's first; V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

EVERY = -1  # vLLM's number for the log-probs of the whole vocabulary

_forward = Sampler.forward


def install() -> None:
    """Replace the sampler's forward, for every engine of this process."""
    Sampler.forward = forward  # type: ignore[method-assign]


def forward(
    self: Sampler, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any
) -> SamplerOutput:
    """As Sampler.forward, with each sequence's own columns."""
    named = sampling_metadata.logprob_token_ids
    num_top = sampling_metadata.max_num_logprobs
    if not named or not num_top or num_top == EVERY:
        return _forward(self, logits, sampling_metadata, *args, **kwargs)
    whole = replace(sampling_metadata, max_num_logprobs=EVERY, logprob_token_ids=None)
    output = _forward(self, logits, whole, *args, **kwargs)
    assert output.logprobs_tensors is not None
    logp_BV = output.logprobs_tensors.logprobs
    sampled_B = output.sampled_token_ids[:, 0].long()
    top = self.gather_logprobs(logp_BV, num_top, token_ids=sampled_B)
    own = self.gather_specific_token_logprobs(logp_BV, named, sampled_B)
    assert own is not None
    rows_B = torch.zeros(len(sampled_B), dtype=torch.bool, device=logp_BV.device)
    rows_B[list(named)] = True
    width = max(top.logprobs.shape[1], own.logprobs.shape[1])
    output.logprobs_tensors = LogprobsTensors(
        _chosen(rows_B, own.logprob_token_ids, top.logprob_token_ids, width, 0),
        _chosen(rows_B, own.logprobs, top.logprobs, width, -math.inf),
        top.selected_token_ranks,
    )
    return output


def _chosen(rows_B: Tensor, own_BK: Tensor, top_BK: Tensor, width: int, filler: float) -> Tensor:
    """[B, width]: `own_BK` in those rows, `top_BK` in the others."""
    wide = [F.pad(x_BK, (0, width - x_BK.shape[1]), value=filler) for x_BK in (own_BK, top_BK)]
    return torch.where(rows_B[:, None], *wide)
