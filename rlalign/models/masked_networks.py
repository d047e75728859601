"""How a transformer of Hugging Face is run on a canvas.

`Decoder`: a causal family (Llama, Qwen2, Qwen3) that attends in both directions, or causally
between blocks. `Encoder`: any model with a masked-language head, and any other that reads a whole
canvas at once. Both give the vectors that the output matrix multiplies.

An encoder's head transforms hidden states before that matrix, each family in its own way. So the
vectors are taken where they enter it: a hook on it keeps them and passes on none of them.

Shapes: B rows, T columns, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rlalign.models.errors import ModelError
from rlalign.models.masked_attention import KV, positions, visible

DECODERS = ("llama", "qwen2", "qwen3")
PROBE_TOKENS = 5
SIDES = {"left": 0, "right": -1}  # and the column that is padding there


class Decoder:
    """`model`, of a family in DECODERS. Raises ModelError where its layers have a window."""

    def __init__(self, model: PreTrainedModel, block_size: int) -> None:
        self.model, self.block_size = model, block_size
        config: Any = model.config
        config.is_causal = False  # where no mask is given, transformers makes one by this
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise ModelError(
                f"{type(model).__name__} has layers that see a window of {config.sliding_window} "
                "tokens, which a masked-diffusion model here cannot: set use_sliding_window to "
                "false in config.json"
            )

    def states(self, ids_BT: Tensor, real_BT: Tensor | None) -> Tensor:
        """[B, T, D], in the model's dtype."""
        return self._run(ids_BT, real_BT, 0, ids_BT.shape[1], None)

    @torch.no_grad()
    def cached(self, ids_BT: Tensor, real_BT: Tensor | None, kv: KV, end: int) -> tuple[Tensor, KV]:
        """States [B, end - len(kv), D] of the columns after those that `kv` holds up to `end`,
        and keys and values of all up to `end`."""
        cache = DynamicCache()
        for i, (key, value) in enumerate(kv.layers):
            cache.update(key, value, i)
        with evaluating(self.model):
            states = self._run(ids_BT, real_BT, len(kv), end, cache)
        return states, KV(tuple((layer.keys, layer.values) for layer in cast(Any, cache).layers))

    def _run(
        self,
        ids_BT: Tensor,
        real_BT: Tensor | None,
        begin: int,
        end: int,
        cache: DynamicCache | None,
    ) -> Tensor:
        mask = None
        if real_BT is not None or self.block_size:
            real_BT = torch.ones_like(ids_BT[:1], dtype=torch.bool) if real_BT is None else real_BT
            mask = self._in_models_form(visible(real_BT, self.block_size, begin, end))
            position_BT = positions(real_BT)
        else:
            position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        output = self.model.base_model(
            input_ids=ids_BT[:, begin:end],
            attention_mask=mask,
            position_ids=position_BT[:, begin:end],
            past_key_values=cache,
            use_cache=cache is not None,
            is_causal=False,
        )
        return output.last_hidden_state

    def _in_models_form(self, visible: Tensor) -> Tensor:
        """Of a bool mask: as it is for torch's attention, and a summand of the scores for the
        others."""
        if self.model.config._attn_implementation == "sdpa":
            return visible
        lowest = torch.finfo(self.model.dtype).min
        return torch.zeros_like(visible, dtype=self.model.dtype).masked_fill_(~visible, lowest)


class Encoder:
    """`model` as it runs itself.

    `linear`: its logits are its output matrix times what enters it. Else `states` are the logits.
    `sides`: where a row may be padded and give what it gives alone. Both are found out here.
    Raises ModelError for a model without logits, and for one whose first token does not see the
    last one: that is no masked-diffusion model.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.takes = set(inspect.signature(model.forward).parameters)
        ids_1T = self._probe_ids()
        with evaluating(model):
            self.first_position = self._find_first_position(ids_1T)
            own_1TV = self._own_logits(ids_1T)
            self._refuse_causal(ids_1T, own_1TV)
            self.sides = [side for side in SIDES if self._may_pad(side, ids_1T, own_1TV)]
            self.linear = self._is_linear(ids_1T, own_1TV)

    def states(self, ids_BT: Tensor, real_BT: Tensor | None) -> Tensor:
        """[B, T, D], or [B, T, V] where the model is not `linear`. Raises ModelError for padding
        at a side that is not in `sides`."""
        for side, column in SIDES.items():
            if side not in self.sides and real_BT is not None and not real_BT[:, column].all():
                raise ModelError(
                    f"{type(self.model).__name__} reads a row that is padded on the {side} "
                    "otherwise than alone: pad on the other side, or use rows of one length"
                )
        inputs = self._inputs(ids_BT, real_BT)
        if not self.linear:
            return self.model(**inputs).logits
        entering: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            entering.append(args[0])
            return (args[0][:, :0],)

        output: Any = self.model.get_output_embeddings()
        handle = output.register_forward_pre_hook(keep)
        try:
            self.model(**inputs)
        finally:
            handle.remove()
        return entering[0]

    def _inputs(self, ids_BT: Tensor, real_BT: Tensor | None) -> dict[str, Tensor]:
        inputs = {"input_ids": ids_BT}
        if real_BT is not None and "attention_mask" in self.takes:
            inputs["attention_mask"] = real_BT.long()
        if self.first_position is not None:
            real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if real_BT is None else real_BT
            inputs["position_ids"] = positions(real_BT) + self.first_position
        return inputs

    def _probe_ids(self) -> Tensor:
        """A row of tokens none of which pads."""
        config: Any = self.model.config.get_text_config()
        padding = getattr(config, "pad_token_id", None)
        ids = [i for i in range(PROBE_TOKENS + 1) if i != padding][:PROBE_TOKENS]
        return torch.tensor([ids], device=self.model.device) % int(config.vocab_size)

    def _find_first_position(self, ids_1T: Tensor) -> int | None:
        """What the model numbers the first token of a row; None where it cannot be told."""
        if "position_ids" not in self.takes:
            return None
        own = _logits(self.model, {"input_ids": ids_1T})
        padding = getattr(self.model.config, "pad_token_id", None) or 0
        for first in (0, padding + 1):  # RoBERTa's count begins behind the padding token's id
            position_1T = torch.arange(ids_1T.shape[1], device=ids_1T.device)[None] + first
            inputs = {"input_ids": ids_1T, "position_ids": position_1T}
            if _close(_logits(self.model, inputs), own):
                return first
        return None

    def _own_logits(self, ids_BT: Tensor, real_BT: Tensor | None = None) -> Tensor:
        return _logits(self.model, self._inputs(ids_BT, real_BT))

    def _refuse_causal(self, ids_1T: Tensor, own_1TV: Tensor) -> None:
        other_1T = ids_1T.clone()
        other_1T[0, -1] = ids_1T[0, 0]
        if torch.equal(self._own_logits(other_1T)[0, 0], own_1TV[0, 0]):
            raise ModelError(
                f"{type(self.model).__name__} is causal (its first token does not see the last), "
                "so it cannot fill in masks: name a masked-diffusion model"
            )

    def _may_pad(self, side: str, ids_1T: Tensor, own_1TV: Tensor) -> bool:
        pad_1P = ids_1T[:, :2]
        order = 1 if side == "left" else -1
        ids = torch.cat([pad_1P, ids_1T][::order], 1)
        real = torch.cat([torch.zeros_like(pad_1P), torch.ones_like(ids_1T)][::order], 1).bool()
        return _close(self._own_logits(ids, real)[real][None], own_1TV)

    def _is_linear(self, ids_1T: Tensor, own_1TV: Tensor) -> bool:
        output = self.model.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            return False
        self.linear = True
        try:
            states = self.states(ids_1T, None)
        except (IndexError, RuntimeError, ValueError):  # not reached, or its output is needed
            return False
        return states.shape[:2] == ids_1T.shape and _close(output(states), own_1TV)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: layers that recompute activations keep no keys and values."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    logits = getattr(model(**inputs), "logits", None)
    if logits is None:
        raise ModelError(
            f"{type(model).__name__} gives no logits: name a folder that holds a model with a "
            "language head (AutoModelForMaskedLM in auto_map)"
        )
    return logits


def _close(actual: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max()) + 1
    tolerance = 4 * torch.finfo(expected.dtype).eps ** 0.75 * scale
    return actual.shape == expected.shape and float((actual - expected).abs().max()) <= tolerance
