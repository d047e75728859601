"""The policy of a flow run: a velocity network with its guidance, and a frozen reference.

Guidance is part of the policy: what is sampled is what is trained, and log-probs are those of the
guided velocity.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlalign.config import Config
from rlalign.config.schema import FlowConfig
from rlalign.models.errors import ModelError
from rlalign.models.flow import Condition, FlowModel
from rlalign.models.flow_load import load_flow_model
from rlalign.models.lora import adapters_off
from rlalign.rollout.guidance import guide
from rlalign.types import Prompt


class FlowPolicy(nn.Module):
    """`forward` is the guided velocity, by the current weights or by the reference's.

    Modules are in evaluation mode throughout: a policy that drops activations at random has no
    ratio. With LoRA the reference is the model with its adapters off; otherwise a frozen copy, held
    outside the module tree, so no engine saves or partitions it.
    """

    def __init__(self, model: FlowModel, flow: FlowConfig, *, with_reference: bool) -> None:
        super().__init__()
        self.model = model
        self._guided = [guide(model, flow.guidance)]
        self._lora = any(".lora_" in name for name, _ in model.named_parameters())
        self._reference = []
        if with_reference and not self._lora:
            self._reference.append(guide(model.frozen_copy(), flow.guidance))

    @classmethod
    def from_config(cls, config: Config, *, device: torch.device | str = "cpu") -> FlowPolicy:
        """Load `model.path`, with adapters and checkpointing as configured. Raises ModelError where
        there is no flow model, or one without them."""
        spec, flow = config.model, config.rollout.flow
        model = load_flow_model(spec.path, config.seed, device, spec.dtype, flow.image)
        model.prepare(spec, config.seed)
        return cls(model, flow, with_reference=bool(config.algo.beta))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.model.latent_shape

    def time_grid(self, flow: FlowConfig) -> Tensor | None:
        """The model's own grid of `num_steps`, where it has one."""
        return self.model.time_grid(flow.num_steps, flow.shift)

    def condition(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return self.model.condition(prompts)

    def decode(self, x0_NX: Tensor) -> Tensor:
        return self.model.decode(x0_NX)

    def forward(
        self, z_NX: Tensor, sigma_N: Tensor, cond: Condition, reference: bool = False
    ) -> Tensor:
        """v, float32 [N, X]. Raises ModelError for a reference that was not loaded."""
        if not reference:
            return self._guided[0](z_NX, sigma_N, cond)
        if self._lora:
            with adapters_off(self.model):
                return self._guided[0](z_NX, sigma_N, cond)
        if not self._reference:
            raise ModelError("no reference model was loaded: the run began with algo.beta=0")
        return self._reference[0](z_NX, sigma_N, cond)

    def save_pretrained(self, folder: str | Path) -> None:
        self.model.save_pretrained(folder)
