"""Flow models: the contract that samplers and trainers rely on (flow_load.py finds one).

A rectified flow model predicts v = eps - x0 at z = (1 - sigma) x0 + sigma eps. Whatever its size,
it is used through the same methods; conditions are made once a prompt and gathered by row, so no
text is encoded per node of a tree.

Legend: N rows, P prompts, X the latent's own dimensions (`latent_shape`), CHW channels and pixels.
"""

from __future__ import annotations

import abc
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlalign.config.schema import ModelConfig
from rlalign.models.errors import ModelError
from rlalign.types import Prompt

Condition = Mapping[str, Tensor]  # rows first, in every tensor

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class FlowModel(nn.Module, abc.ABC):
    """The velocity network with all that is around it.

    >>> cond = model.condition(prompts)                          # once a rollout
    >>> v = model(z_NX, sigma_N, take_rows(cond, row_N))         # rows of any prompts
    >>> images = model.decode(predict_x0(z_NX, v, sigma_N))
    """

    latent_shape: tuple[int, ...]

    @abc.abstractmethod
    def condition(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """What the network reads of each prompt, on the model's device: tensors [P, ...]."""

    @abc.abstractmethod
    def null_condition(self, num: int) -> dict[str, Tensor]:
        """The same for no prompt at all, `num` rows: the unconditional branch of guidance."""

    @abc.abstractmethod
    def forward(self, z_NX: Tensor, sigma_N: Tensor, cond: Condition) -> Tensor:
        """v, float32 [N, X], of states at times `sigma_N` (float32, 0 data to 1 noise); rows may
        stand at different times. `cond` has N rows. A row's v depends on that row alone."""

    @abc.abstractmethod
    def decode(self, x0_NX: Tensor) -> Tensor:
        """Images of clean latents: float32 [N, C, H, W] in [0, 1]; videos [N, frames, C, H, W]."""

    def time_grid(self, num_steps: int, shift: float | None = None) -> Tensor | None:
        """sigma_0 > ... > sigma_T, float64 [num_steps + 1], of a model that has a grid of its own
        and where no `shift` is set; else None: the sampler's."""
        return None

    def prepare(self, config: ModelConfig, seed: int) -> None:
        """Insert adapters (drawn from `seed`) and switch gradient checkpointing on, as configured.

        Raises ModelError for a model that has neither.
        """
        if config.lora.rank or config.gradient_checkpointing:
            raise ModelError(
                f"{type(self).__name__} has no adapters and no gradient checkpointing: leave out "
                "model.lora.rank and model.gradient_checkpointing"
            )

    def frozen_copy(self) -> FlowModel:
        """A copy that does not train, to compare with: what never trains is shared with it."""
        return copy.deepcopy(self).requires_grad_(False)

    def classifier(self) -> tuple[Callable[[Tensor], Tensor], Condition] | None:
        """For guidance by a classifier: logits [N, C] of clean latents [N, X], and the condition of
        each of the C classes; None where there is no such classifier."""
        return None

    @abc.abstractmethod
    def config_dict(self) -> dict[str, Any]:
        """What config.json holds: `architecture`, and the arguments that make an equal model."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which `load_flow_model` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config_dict(), indent=2) + "\n")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def take_rows(cond: Condition, row_N: Tensor) -> dict[str, Tensor]:
    """The condition of N rows, row n that of prompt `row_N[n]`."""
    return {name: value[row_N] for name, value in cond.items()}
