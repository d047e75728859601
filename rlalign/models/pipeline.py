"""Pipelines of diffusers as folders, and the time grid of their schedulers.

Nothing is unpickled and no code that ships with a model is run: safetensors, and diffusers' own
classes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from rlalign.models.errors import ModelError
from rlalign.models.load import LOAD_ERRORS, PIPELINE_FILE
from rlalign.models.lora import ADAPTER, adapter_weights, merged_weights

NETWORK = "transformer"  # the component that is trained
CONFIG_FILE = "config.json"
ADAPTER_FOLDER = "adapter"
WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
SHARD_SIZE = "5GB"


@cache
def import_diffusers() -> ModuleType:
    """diffusers with its pipelines imported, which takes seconds.

    Its remarks on torchvision, which is not used, and its progress bars are switched off. Raises
    ModelError where it is not installed.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        import diffusers

        for name in ("StableDiffusion3Pipeline", "FluxPipeline", "WanPipeline"):
            getattr(diffusers, name)
    except ImportError as error:
        raise ModelError(
            f"a pipeline needs diffusers, which is not there ({error}): pip install rlalign[flow]"
        ) from error
    finally:
        logging.set_verbosity(before)
    diffusers.utils.logging.set_verbosity_error()  # it would remark on every long prompt
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def read_index(folder: Path) -> dict[str, Any]:
    """What model_index.json says. Raises ModelError where it says nothing."""
    try:
        index = json.loads((folder / PIPELINE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / PIPELINE_FILE} cannot be read: {error}") from error
    if not isinstance(index, dict):
        raise ModelError(f"{folder / PIPELINE_FILE} is {type(index).__name__}, not a mapping")
    return index


def load_pipeline(
    folder: Path, name: str, device: torch.device | str = "cpu", dtype: str = "float32"
) -> Any:
    """The pipeline of class `name` in `folder`, in `dtype`; its VAE in float32. All weights of the
    network are in `dtype`, as in every engine, also those that diffusers would keep in float32.

    Raises ModelError where a part is missing, or has weights as pickles only, or where the network
    would start with random weights.
    """
    diffusers = import_diffusers()
    dtypes = {"default": getattr(torch, dtype), "vae": torch.float32}
    options = {"use_safetensors": True, "local_files_only": True}
    try:
        network_class = getattr(diffusers, read_index(folder)[NETWORK][1])
        network, loaded = network_class.from_pretrained(
            folder / NETWORK, torch_dtype=dtypes["default"], output_loading_info=True, **options
        )
        pipeline = getattr(diffusers, name).from_pretrained(
            folder, dtype=dtypes, **{NETWORK: network}, **options
        )
    except (*LOAD_ERRORS, AttributeError, TypeError) as error:
        raise ModelError(
            f"the {name} in {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(
            f"the weights in {folder / NETWORK} lack {len(missing)} of the network's tensors, the "
            f"first {missing[0]!r}: the files are incomplete"
        )
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtypes["default"])
    return pipeline.to(device)


def save_pipeline(pipeline: Any, network: Any, source: Path, target: Path) -> None:
    """Write `network` to `target`, and link there all other parts of the folder `source` that
    `pipeline` was loaded from: hard links, copies where the file system has none.

    With LoRA the network is the merged one, and the adapters alone are in `target`/adapter, for the
    pipeline's `load_lora_weights`.
    """
    target.mkdir(parents=True, exist_ok=True)
    if target.resolve() != source.resolve():
        shutil.copyfile(source / PIPELINE_FILE, target / PIPELINE_FILE)
        for name, what in read_index(source).items():
            if name != NETWORK and isinstance(what, list) and (source / name).is_dir():
                shutil.copytree(source / name, target / name, copy_function=_link)
        (target / NETWORK).mkdir(exist_ok=True)
        shutil.copyfile(source / NETWORK / CONFIG_FILE, target / NETWORK / CONFIG_FILE)
    weights = dict(network.state_dict())
    if adapters := dict(adapter_weights(network)):
        parameters = {name for name, _ in network.named_parameters()}
        buffers = {name: value for name, value in weights.items() if name not in parameters}
        weights = {**buffers, **dict(merged_weights(network))}
        pipeline.save_lora_weights(
            target / ADAPTER_FOLDER,
            transformer_lora_layers=adapters,
            transformer_lora_adapter_metadata=network.peft_config[ADAPTER].to_dict(),
        )
    _write_weights(weights, target / NETWORK)


def _write_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """As diffusers does, in shards. An engine may hold all tensors in one storage, which must not
    be taken for tied weights, so each is copied, a shard at a time."""
    sizes = {name: value.to("meta") for name, value in weights.items()}
    plan = split_torch_state_dict_into_shards(
        sizes, filename_pattern=WEIGHTS_PATTERN, max_shard_size=SHARD_SIZE
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: weights[name].detach().to("cpu", copy=True).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        file = WEIGHTS_PATTERN.format(suffix="") + ".index.json"
        (folder / file).write_text(json.dumps(index, indent=2) + "\n")


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)  # a file of the hub's cache is a symbolic link
    except OSError:
        shutil.copyfile(source, target)


def pipeline_grid(
    scheduler: Any, num_steps: int, *, num_tokens: int, sigmas: Sequence[float] | None = None
) -> Tensor:
    """sigma_0 > ... > sigma_T = 0 on which the pipeline of `scheduler` samples, float64 [T + 1].

    `sigmas`: the unshifted grid, where the pipeline gives its own; `num_tokens`: of an image, for
    schedulers whose shift depends on its size. A scheduler that is not the Euler one is replaced by
    that with its `flow_shift`. Raises ModelError for one that has none.
    """
    diffusers = import_diffusers()
    euler = diffusers.FlowMatchEulerDiscreteScheduler
    config = scheduler.config
    if isinstance(scheduler, euler):
        scheduler = euler.from_config(config)  # `set_timesteps` changes it
    elif config.get("flow_shift") is not None:
        scheduler = euler(config.num_train_timesteps, shift=config.flow_shift)
    else:
        raise ModelError(
            f"the pipeline's scheduler is {type(scheduler).__name__}, which is none of a flow: set "
            "rollout.flow.shift, or save the pipeline with a FlowMatchEulerDiscreteScheduler"
        )
    options: dict[str, Any] = {} if sigmas is None else {"sigmas": sigmas}
    if scheduler.config.use_dynamic_shifting:
        options["mu"] = _resolution_shift(num_tokens, scheduler.config)
    scheduler.set_timesteps(num_steps, **options)
    return scheduler.sigmas.double()


def _resolution_shift(num_tokens: int, config: Mapping[str, Any]) -> float:
    """mu, the logarithm of the shift: linear in the number of tokens (`calculate_shift` of
    diffusers)."""
    few, many = config["base_image_seq_len"], config["max_image_seq_len"]
    low, high = config["base_shift"], config["max_shift"]
    return low + (high - low) * (num_tokens - few) / (many - few)


def frozen_parts(pipeline: Any) -> list[nn.Module]:
    """Text encoders and VAE."""
    parts = pipeline.components.items()
    return [part for name, part in parts if isinstance(part, nn.Module) and name != NETWORK]


def num_tokens(latent_shape: Sequence[int], patch: int) -> int:
    """Tokens of one image or frame."""
    return math.prod(side // patch for side in latent_shape[-2:])
