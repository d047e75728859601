"""A flow model from a folder, the hub, or one that is built here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rlalign.config.schema import ImageConfig
from rlalign.models.errors import ModelError
from rlalign.models.flow import CONFIG_FILE, WEIGHTS_FILE, FlowModel
from rlalign.models.load import PIPELINE_FILE, resolve_model_path

# `architecture` in config.json: where its class is. A class is made from the rest of that file.
ARCHITECTURES = {"mini_flow": "rlalign.models.mini_flow:MiniFlow"}


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
