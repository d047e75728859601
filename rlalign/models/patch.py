"""Log-probs of tokens straight from an HF model's `forward`, for code that has a model and no
trainer: `patch_model(model)(input_ids, labels=labels, fused_head=True)`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlalign.config.schema import KernelsConfig
from rlalign.kernels.linear_logprob import IGNORE_INDEX, LinearLogProb
from rlalign.models.head import build_head, refuse_unless_own


def patch_model(model: PreTrainedModel, kernels: KernelsConfig | None = None) -> PreTrainedModel:
    """`model` with a `forward` that takes `fused_head`, and is unchanged without it.

    With `fused_head=True` it returns ln p [B, T] (float32) of `labels` [B, T], which stand where
    the tokens do in `input_ids`, as for HF's own loss: entry t is predicted from the tokens before
    t. It is 0 at t = 0 and where the label is -100. `temperature` > 0 divides the logits. No logits
    are made; other arguments are those of the model's body.

    Parameters must be whole where the model runs: under ZeRO-3 use `trainer.policy.Policy`.
    Raises ModelError for a head or a family whose log-probs would differ from the model's own.
    """
    head, original = build_head(model, kernels or KernelsConfig()), model.forward

    @functools.wraps(original)
    def forward(
        *args: Any,
        labels: Tensor | None = None,
        fused_head: bool = False,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if not fused_head:
            return original(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        if labels is None:
            raise ValueError("fused_head=True scores labels; pass labels, shaped like input_ids")
        hidden_BTD = model.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        return _score(head, hidden_BTD, labels, temperature)

    row = (1, 0, 1, 2, 3)
    ids = torch.tensor([row], device=head.weight.device)
    with torch.no_grad():
        logp_BT = forward(input_ids=ids, labels=ids, fused_head=True)
    refuse_unless_own(model, row, logp_BT[0, 1:])
    model.forward = forward
    return model


def _score(
    head: LinearLogProb, hidden_BTD: Tensor, labels_BT: Tensor, temperature: float
) -> Tensor:
    if labels_BT.shape != hidden_BTD.shape[:2]:
        raise ValueError(
            f"labels have shape {tuple(labels_BT.shape)}, the hidden states "
            f"{tuple(hidden_BTD.shape[:2])}"
        )
    next_BT = torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    logp_BT = head(hidden_BTD, next_BT, temperature).logp
    return torch.nn.functional.pad(logp_BT[:, :-1], (1, 0))
