"""The policy of a diffusion language model: masked completions in, log-probs of tokens out.

Legend: R rows, T completion columns, P prompt columns, M tokens whose log-prob is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlalign.config import Config
from rlalign.models.errors import ModelError
from rlalign.models.lora import adapters_off, merged_weights
from rlalign.models.masked_diffusion import Canvas, MaskedDiffusionLM
from rlalign.models.masked_load import load_masked_lm
from rlalign.types import TrainBatch


@dataclass(frozen=True, slots=True, eq=False)
class Passes:
    """Forward passes of some rows, each under one mask; M tokens are scored, in the order of
    `cell_M`, their places among [batch rows, passes, T].

    `canvas` has a row for each pass, padded on the right.
    """

    canvas: Canvas
    row_M: Tensor
    column_M: Tensor
    target_M: Tensor
    cell_M: Tensor

    def to(self, device: torch.device | str) -> Passes:
        """With all that the model reads on `device`; `cell_M` stays."""
        canvas = self.canvas
        real_BT = None if canvas.real_BT is None else canvas.real_BT.to(device)
        return Passes(
            Canvas(canvas.ids_BT.to(device), real_BT),
            self.row_M.to(device),
            self.column_M.to(device),
            self.target_M.to(device),
            self.cell_M,
        )


class MaskedPolicy(nn.Module):
    """A `MaskedDiffusionLM` and, if asked for, a frozen reference: with LoRA the model with its
    adapters off, otherwise a copy, held outside the module tree so that no engine saves or
    partitions it."""

    def __init__(self, lm: MaskedDiffusionLM, reference: MaskedDiffusionLM | None = None) -> None:
        super().__init__()
        self.lm = lm
        self._lora = any(".lora_" in name for name, _ in lm.named_parameters())
        self._reference = [] if reference is None else [reference.requires_grad_(False).eval()]

    @classmethod
    def from_config(
        cls, config: Config, *, device: torch.device | str = "cpu", with_reference: bool = False
    ) -> MaskedPolicy:
        """Load the model, with adapters and checkpointing as configured. Raises ModelError where it
        is no diffusion language model."""
        spec = config.model

        def load() -> MaskedDiffusionLM:
            return load_masked_lm(spec, config.seed, device, config.kernels)

        lm = load()
        reference = load() if with_reference and not spec.lora.rank else None
        if spec.lora.rank:
            lm.attach_lora(spec.lora, config.seed)
        if spec.gradient_checkpointing:
            lm.model.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(lm, reference).train()

    @property
    def model(self) -> PreTrainedModel:
        """The HF model itself, which the rollout engine shares."""
        return self.lm.model

    def forward(self, passes: Passes, temperature: float = 1.0, reference: bool = False) -> Tensor:
        """Log-probs of the scored tokens, float32 [M], by the current weights or the reference's.
        Raises ModelError for a reference that was not loaded."""
        where = passes.row_M, passes.column_M, passes.target_M, temperature
        if not reference:
            return self.lm.logp(passes.canvas, *where)
        if self._lora:
            with adapters_off(self.lm.model):
                return self.lm.logp(passes.canvas, *where)
        if not self._reference:
            raise ModelError("no reference model was loaded: the run began with algo.beta=0")
        return self._reference[0].logp(passes.canvas, *where)

    def named_rollout_weights(self) -> Iterator[tuple[str, Tensor]]:
        """HF names and tensors, adapters merged."""
        return merged_weights(self.lm.model)

    def save_pretrained(self, folder: str | Path) -> None:
        self.lm.save_pretrained(folder)


def make_passes(batch: TrainBatch, row_R: Tensor, pass_R: Tensor, mask_id: int) -> Passes:
    """The passes `pass_R` of rows `row_R` of a batch with masks. Those that score nothing are as
    good as any."""
    assert batch.masks is not None
    masks, width = batch.masks, batch.mask_BT.shape[1]
    sequences = [batch.sequences[i] for i in row_R.tolist()]
    ids_RS, real_RS = _padded(sequences)
    length_R = real_RS.sum(1)
    prompt_R = length_R - batch.completion_len_B.cpu()[row_R]
    hidden_RT = masks.hidden_BJT[row_R, pass_R]
    at_R, at_T = hidden_RT.nonzero(as_tuple=True)
    masked_RS = torch.zeros_like(real_RS)
    masked_RS[at_R, prompt_R[at_R] + at_T] = True
    if masks.prompt_hidden_BJP is not None:
        prompt_RP = masks.prompt_hidden_BJP[row_R, pass_R]
        masked_RS[prompt_RP.nonzero(as_tuple=True)] = True
    scored_R, scored_T = (masks.weight_BJT[row_R, pass_R] != 0).nonzero(as_tuple=True)
    column_M = prompt_R[scored_R] + scored_T
    num_passes = masks.weight_BJT.shape[1]
    cell_M = (row_R[scored_R] * num_passes + pass_R[scored_R]) * width + scored_T
    canvas = Canvas(
        ids_RS.masked_fill(masked_RS, mask_id), None if bool(real_RS.all()) else real_RS
    )
    return Passes(canvas, scored_R, column_M, ids_RS[scored_R, column_M], cell_M)


def _padded(sequences: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Token ids and where there are any, [R, S], padded on the right."""
    width = max(len(row) for row in sequences)
    ids_RS = torch.tensor([[*row, *[0] * (width - len(row))] for row in sequences])
    length_R1 = torch.tensor([[len(row)] for row in sequences])
    return ids_RS, torch.arange(width) < length_R1
