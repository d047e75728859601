"""Flow models: the contract that samplers and trainers rely on, and folders to load one from.

A rectified flow model predicts v = eps - x0 at z = (1 - sigma) x0 + sigma eps. Whatever its size,
it is used through the same methods; conditions are made once a prompt and gathered by row, so no
text is encoded per node of a tree.

Legend: N rows, P prompts, X the latent's own dimensions (`latent_shape`), CHW channels and pixels.
"""

from __future__ import annotations

import abc
import copy
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlalign.config.schema import ImageConfig, ModelConfig
from rlalign.models.errors import ModelError
from rlalign.models.load import PIPELINE_FILE, resolve_model_path
from rlalign.types import Prompt

Condition = Mapping[str, Tensor]  # rows first, in every tensor

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
# `architecture` in config.json: where its class is. A class is made from the rest of that file.
ARCHITECTURES = {"mini_flow": "rlalign.models.mini_flow:MiniFlow"}


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
        """Write config.json and model.safetensors, from which `load_flow_model` reads it back."""
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


def load_flow_model(
    path: str,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    image: ImageConfig | None = None,
) -> FlowModel:
    """The flow model in a folder, on the hub, or at `mini:<task>` (built once, keyed by `seed`), in
    evaluation mode: one that `save_pretrained` wrote, or a pipeline of diffusers, which makes
    images as `image` says.

    Raises ModelError where there is none, where config.json is not a flow model's, and where the
    weights do not fit it.
    """
    folder = Path(resolve_model_path(path, seed))
    if (folder / PIPELINE_FILE).is_file():
        from rlalign.models.flow_diffusers import load_pipeline_flow  # importing it takes seconds

        return load_pipeline_flow(folder, image, device, dtype)
    config = _read_config(folder)
    name = config.pop("architecture", None)
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{folder / CONFIG_FILE} says architecture={name!r}, which is no flow model that is "
            f"known here ({', '.join(ARCHITECTURES)}): a flow run trains image models, mini:digits "
            "for one"
        )
    module, _, attribute = ARCHITECTURES[name].partition(":")
    try:
        model = getattr(importlib.import_module(module), attribute)(**config)
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the flow model in {folder} cannot be loaded: {error}") from error
    return model.to(device, getattr(torch, dtype)).eval()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} holds no readable {CONFIG_FILE} ({error}): it is no flow model's folder. "
            "Name one that save_pretrained wrote, or mini:digits"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / CONFIG_FILE} is {type(config).__name__}, not a mapping")
    return config
