"""The language-model head of any HF causal LM as `LinearLogProb`.

Families transform their logits in a few ways: a factor (Cohere, Falcon-H1), a divisor (Granite,
MiniCPM3), tanh with a cap (Gemma). Each is a field of the config; the tables below say which.
`trainer.policy` compares the result with the model's own logits, so a family that does anything
else is refused, not mistaken.
"""

from __future__ import annotations

import dataclasses

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlalign.config.schema import KernelsConfig
from rlalign.kernels.linear_logprob import LinearLogProb
from rlalign.models.errors import ModelError

FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)


def build_head(model: PreTrainedModel, kernels: KernelsConfig) -> LinearLogProb:
    """The head of `model`, sharing its parameters, run as `kernels` says. Raises ModelError where
    it is not linear."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"the output head of {type(model).__name__} is {type(head).__name__}, not a plain "
            "linear layer; if LoRA targets it, leave it out of model.lora.target_modules"
        )
    config = model.config.get_text_config()
    return LinearLogProb(
        head,
        logit_scale=_logit_scale(config),
        softcap=_softcap(config),
        **dataclasses.asdict(kernels),
    )


def _logit_scale(config: PreTrainedConfig) -> float:
    scale = 1.0
    for name in FACTORS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        value = getattr(config, name, None) or 1.0
        scale *= value if config.model_type in MULTIPLIES_BY_LOGITS_SCALING else 1 / value
    return scale


def _softcap(config: PreTrainedConfig) -> float | None:
    caps = (getattr(config, name, None) for name in SOFTCAPS)
    return next((float(cap) for cap in caps if cap), None)
