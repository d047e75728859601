"""The policy: token sequences in, log-probs of their completion tokens out.

    logp_bt = log softmax(z / temperature)[token t of completion b],  z = head(backbone(prefix))

Rows are packed without padding (models/packed.py), what several of them begin with only once
(trainer/rows.py); the head (kernels/linear_logprob.py) sees only the positions that predict
completion tokens. The temperature is the sampling temperature: otherwise ratios compare two
distributions.

Shapes: B rows, T completion columns, N packed tokens, M completion tokens, U different ones, D
hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlalign.config.schema import KernelsConfig, ModelConfig
from rlalign.models.dropout import without_dropout
from rlalign.models.errors import ModelError
from rlalign.models.head import build_head, refuse_unless_own
from rlalign.models.load import load_causal_lm
from rlalign.models.lora import adapters_off, attach_lora, merged_weights, save_weights
from rlalign.models.norm import quicken_norms
from rlalign.models.pack import Pack, collect, make_pack
from rlalign.models.packed import install, packed_hidden, padded_hidden, replaceable
from rlalign.trainer.gradient_norms import GradientNorms, gradient_norms
from rlalign.trainer.rows import plan_rows
from rlalign.types import TrainBatch


class PolicyOutput(NamedTuple):
    """float32 [B, T], 0 where a row has no token; `entropy_BT` is None unless asked for."""

    logp_BT: Tensor
    entropy_BT: Tensor | None


class Policy(nn.Module):
    """An HF causal LM, its head as log-probs, and (if asked for) a frozen reference.

    `model` is the HF model itself; a rollout engine may share it. With LoRA the reference is the
    model with its adapters off; otherwise a frozen copy, held outside the module tree so that no
    engine partitions or saves it (each process keeps it whole).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        reference: PreTrainedModel | None = None,
        packing: bool = True,
        kernels: KernelsConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.head = build_head(model, kernels or KernelsConfig())
        self.packing = packing
        self._lora = any(".lora_" in name for name, _ in model.named_parameters())
        self._reference: list[Policy] = []
        if packing or replaceable(model):  # else: the model's own attention
            install(model)
        quicken_norms(model)
        if reference is not None:
            frozen = reference.requires_grad_(False).eval()
            self._reference.append(Policy(frozen, packing=packing, kernels=kernels))

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        with_reference: bool = False,
        packing: bool = True,
        kernels: KernelsConfig | None = None,
    ) -> Policy:
        """Load the model, switch dropout off, attach adapters and checkpointing as configured.

        Raises ModelError (or PackingError) where the model cannot be loaded, or where log-probs
        computed here differ from the model's own.
        """
        model = without_dropout(load_causal_lm(config, seed, device))
        reference = None
        if with_reference and not config.lora.rank:
            reference = without_dropout(load_causal_lm(config, seed, device))
        if config.lora.rank:
            attach_lora(model, config.lora, seed)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = cls(model, reference=reference, packing=packing, kernels=kernels)
        policy.check()
        return policy.train()

    def forward(
        self,
        batch: TrainBatch,
        temperature: float = 1.0,
        entropy: bool = False,
        reference: bool = False,
        grad_params: str | None = None,
        set_id_B: Tensor | None = None,
    ) -> PolicyOutput | GradientNorms:
        """Log-probs (and entropies, nats) of the batch's completion tokens, by the current policy
        or by the reference, at `temperature` > 0. With `grad_params` instead the norms of each
        row's gradient with respect to that tensor, and of the mean gradient of each set of rows
        (trainer/gradient_norms.py): here, since an engine may hold whole parameters only here.

        A batch without completion tokens runs one idle token, and its output is connected to the
        graph of every parameter, with gradients of zero.
        Raises ValueError for a completion without a prompt token before it.
        """
        if grad_params is not None:
            return gradient_norms(self, batch, temperature, grad_params, set_id_B)
        if not reference:
            return self._score(batch, temperature, entropy)
        if self._lora:
            with adapters_off(self.model):
                return self._score(batch, temperature, entropy)
        if not self._reference:
            raise ModelError("no reference model was loaded; build the policy with_reference=True")
        (frozen,) = self._reference
        return frozen.to(self.head.weight.device)(batch, temperature, entropy)

    @torch.no_grad()
    def reference_logp(self, batch: TrainBatch, temperature: float = 1.0) -> Tensor:
        """Log-probs [B, T] by the reference. Raises ModelError where there is none."""
        return self(batch, temperature, reference=True).logp_BT

    def named_rollout_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What a rollout engine loads: HF names and whole tensors, LoRA merged one at a time.

        A tied head comes once, under the embedding's name, as `save_pretrained` writes it.
        Parameters must be whole: under ZeRO-3 iterate within the engine's `full_parameters()`.
        """
        return merged_weights(self.model)

    def save_pretrained(self, path: str | Path) -> None:
        """Write an HF folder; with LoRA the merged model, and the adapters in `path`/adapter."""
        save_weights(self.model, Path(path))

    @torch.no_grad()
    def check(self) -> None:
        """Raise ModelError unless log-probs computed here are the model's own, on three rows, two
        of them with the same prompt."""
        rows = ((1, 0, 1, 2, 3), (2, 1, 0), (1, 2, 0))
        self.eval()
        actual_BT = self(_probe(rows)).logp_BT
        for row, logp_T in zip(rows, actual_BT, strict=True):
            refuse_unless_own(self.model, row, logp_T[: len(row) - 1])

    def hidden_states(self, pack: Pack, place_M: Tensor) -> Tensor:
        """Final hidden states [M, D] at places of `pack`."""
        hidden_ND = (packed_hidden if self.packing else padded_hidden)(self.model, pack)
        return collect(hidden_ND, place_M.to(hidden_ND.device))

    def _score(self, batch: TrainBatch, temperature: float, entropy: bool) -> PolicyOutput:
        device = self.head.weight.device
        plan = plan_rows(batch, share_prefixes=self.packing)
        pack = make_pack(plan.sequences, plan.parents, device)
        place_U, target_U, index_M = plan.predictions(pack)
        hidden_UD = self.hidden_states(pack, place_U)
        scored = self.head(hidden_UD, target_U.to(device), temperature, entropy)

        def to_rows(value_U: Tensor) -> Tensor:
            value_M = collect(value_U, index_M.to(device))
            return _scatter(value_M, plan.cell_M.to(device), batch.mask_BT.shape)

        return PolicyOutput(to_rows(scored.logp), to_rows(scored.entropy) if entropy else None)


def _scatter(value_M: Tensor, cell_M: Tensor, shape: torch.Size) -> Tensor:
    """Values put at their cells of zeros; those without a cell (an idle row's) are left out."""
    empty = value_M.new_zeros(shape.numel())
    return empty.index_copy(0, cell_M, value_M[: len(cell_M)]).view(shape)


def _probe(rows: tuple[tuple[int, ...], ...]) -> TrainBatch:
    length_B = torch.tensor([len(row) - 1 for row in rows])
    zeros_BT = torch.zeros(len(rows), int(length_B.max()))
    return TrainBatch(
        sequences=rows,
        completion_len_B=length_B,
        group_id_B=torch.zeros(len(rows), dtype=torch.long),
        mask_BT=zeros_BT,
        reward_B=torch.zeros(len(rows)),
        logp_rollout_BT=zeros_BT,
    )
