"""The language-model head of any HF causal LM as `LinearLogProb`.

Families transform their logits in a few ways: a factor (Cohere, Falcon-H1), a divisor (Granite,
MiniCPM3), tanh with a cap (Gemma). Each is a field of the config; the tables below say which.
`refuse_unless_own` compares the result with the model's own logits, so a family that does anything
else is refused, not mistaken. An adapter on the head acts before all of them, as its matrix does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlalign.config.schema import KernelsConfig
from rlalign.kernels.linear_logprob import LinearLogProb, Lora
from rlalign.models.errors import ModelError
from rlalign.models.lora import active_adapters

FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)


def build_head(model: PreTrainedModel, kernels: KernelsConfig) -> LinearLogProb:
    """The head of `model`, sharing its parameters and those of a LoRA adapter on it, run as
    `kernels` says. Raises ModelError where it is not linear, and for an adapter that cannot be
    followed."""
    _refuse_adapter_on_tied_weight(model)
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    options: dict[str, Any] = {
        "logit_scale": _logit_scale(config),
        "softcap": _softcap(config),
        **dataclasses.asdict(kernels),
    }
    if isinstance(head, nn.Linear):
        return LinearLogProb(head, **options)
    if isinstance(head, LoraLinear) and isinstance(head.get_base_layer(), nn.Linear):
        return LoraLinearLogProb(head, **options)
    raise ModelError(
        f"the output head of {type(model).__name__} is {type(head).__name__}, not a plain linear "
        "layer or one with a LoRA adapter; if an adapter of another kind targets it, leave the "
        "head out of the adapter's target modules"
    )


@torch.no_grad()
def refuse_unless_own(model: PreTrainedModel, row: Sequence[int], logp_T: Tensor) -> None:
    """Raise ModelError unless `logp_T` [len(row) - 1] is what `model` itself says of its tokens."""
    ids = torch.tensor([row], device=logp_T.device)
    logits_TV = model(input_ids=ids, use_cache=False).logits[0, :-1].to(logp_T.dtype)
    own_T = logits_TV.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    spread = float(logits_TV.abs().max()) + 1
    error = float((logp_T - own_T).abs().max())
    if not error <= 4 * torch.finfo(model.dtype).eps ** 0.75 * spread:
        raise ModelError(
            f"log-probs of {type(model).__name__} computed from its hidden states differ from its "
            f"own by {error:.2g}: this family does something to its logits or attention that "
            "rlalign does not know. Try trainer.packing=false; if that is refused too, add the "
            "family to rlalign/models/head.py."
        )


class LoraLinearLogProb(LinearLogProb):
    """The head W + scaling B A, without making it.

    A and B are parameters of this module for the reason that W is. Scaling and whether the adapter
    is on are read from PEFT's layer at every call, so that switching adapters off reaches the head.
    """

    def __init__(self, layer: LoraLinear, **options: Any) -> None:
        """Raises ModelError unless just one adapter is active, and that is plain LoRA."""
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        super().__init__(base, **options)
        self._adapter = _only_adapter(layer)
        self._layer = (layer,)  # hidden in a tuple: it is a submodule of the model, not of this
        self.lora_A = cast(nn.Linear, layer.lora_A[self._adapter]).weight
        self.lora_B = cast(nn.Linear, layer.lora_B[self._adapter]).weight

    def low_rank(self, hidden: Tensor) -> Lora | None:
        (layer,) = self._layer
        active = active_adapters(layer)
        if layer.merged or active not in ([], [self._adapter]):
            raise ModelError(
                f"the output head was built for the LoRA adapter {self._adapter!r}; now "
                f"{active} are active and {layer.merged_adapters} merged: build the policy again"
            )
        if layer.disable_adapters or not active:
            return None
        low = F.linear(hidden.to(self.lora_A.dtype), self.lora_A)
        return Lora(low * layer.scaling[self._adapter], self.lora_B)


def _only_adapter(layer: LoraLinear) -> str:
    active = active_adapters(layer)
    if layer.merged or len(active) != 1:
        raise ModelError(
            f"the output head has {len(active)} active LoRA adapters {active} and the merged ones "
            f"{layer.merged_adapters}; it can follow one, not merged: see set_adapter of the model"
        )
    [name] = active
    problems = {
        "is of a kind that adds more than scaling B A": name in layer.lora_variant,
        "has a bias": layer.lora_bias[name],
        "has dropout, and ratios compare policies": getattr(layer.lora_dropout[name], "p", 0) > 0,
    }
    for problem in (text for text, found in problems.items() if found):
        raise ModelError(
            f"the LoRA adapter {name!r} on the output head {problem}. Use one without dropout, "
            "bias, DoRA or other variants, or leave the head out of its target modules"
        )
    return name


def _refuse_adapter_on_tied_weight(model: PreTrainedModel) -> None:
    """An adapter changes one side of a tied weight only. With the adapter merged the two sides
    differ, and the tied model that a checkpoint or an engine holds has room for one."""
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return
    sides = (model.get_input_embeddings(), model.get_output_embeddings())
    targeted = [isinstance(side, BaseTunerLayer) for side in sides]
    bases = [x.get_base_layer() if isinstance(x, BaseTunerLayer) else x for x in sides]
    embedding, head = (getattr(base, "weight", None) for base in bases)
    if any(targeted) and embedding is not None and embedding is head:
        raise ModelError(
            f"an adapter targets the embedding or the output head of {type(model).__name__}, which "
            "share one weight (tie_word_embeddings): merged, they could not share it any more. "
            "Leave both out of model.lora.target_modules"
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
