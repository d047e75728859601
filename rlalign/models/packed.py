"""Final hidden states of any HF causal LM over a `Pack`: no padding token meets a linear layer, and
attention never crosses a sequence's border.

The model runs on one row of N tokens, each with its position within its own sequence; its attention
modules call models/attention.py. Shapes: S sequences, T tokens of the longest, N tokens of all of
them, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlalign.models.attention import ATTENTION, PackedRun, packing
from rlalign.models.pack import Pack, collect, refuse_unless


def replaceable(model: PreTrainedModel) -> bool:
    """Whether the model's attention is called through transformers' attention interface."""
    return type(model)._can_set_attn_implementation()


def install(model: PreTrainedModel) -> None:
    """Switch `model` to the attention of this module. Raises PackingError where it cannot."""
    refuse_unless(
        replaceable(model),
        model,
        "its attention is not replaceable (it predates transformers' attention interface)",
    )
    model.set_attn_implementation(ATTENTION)


def packed_hidden(model: PreTrainedModel, pack: Pack) -> Tensor:
    """Final hidden states [N, D] of the pack's tokens; `model` went through `install`.

    Raises PackingError where a layer mixes tokens other than by an attention that honours the pack.
    """
    run = PackedRun(pack)
    token = packing.set(True)
    try:
        hidden = model.base_model(
            input_ids=pack.input_ids_N[None],
            position_ids=pack.position_ids_N[None],
            use_cache=False,
            packed_run=run,
        ).last_hidden_state
    finally:
        packing.reset(token)
    layers = model.config.get_text_config().num_hidden_layers
    refuse_unless(
        run.calls == layers,
        model,
        f"{run.calls} of its {layers} layers attend within sequence borders",
    )
    return hidden[0]


def padded_hidden(model: PreTrainedModel, pack: Pack) -> Tensor:
    """The same by the model's ordinary forward over a right-padded batch and its mask."""
    length_S = torch.tensor(pack.lengths)
    width = pack.lengths[0]
    real_ST = torch.arange(width) < length_S[:, None]
    cell_N = real_ST.flatten().nonzero()[:, 0].to(pack.input_ids_N.device)
    ids = pack.input_ids_N.new_zeros(real_ST.numel()).index_copy(0, cell_N, pack.input_ids_N)
    hidden = model.base_model(
        input_ids=ids.view(real_ST.shape),
        attention_mask=real_ST.to(ids.device),
        use_cache=False,
    ).last_hidden_state
    return collect(hidden.flatten(0, 1), cell_N)
