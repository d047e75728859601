"""Low-rank adapters (PEFT) in a model of transformers or diffusers: attach, switch off, and merge
while reading.

W' = W + (alpha / rank) B A        Hu et al. 2021, arXiv 2106.09685, section 4.1
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlalign.config.schema import LoraConfig
from rlalign.models.errors import ModelError

ADAPTER = "default"


def attach_lora(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze `model` (of transformers or diffusers) and insert adapters, drawn from `seed`; at
    first they change nothing (B = 0).

    Raises ModelError when `target_modules` matches no layer.
    """
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides it by r: any number does
        lora_dropout=0.0,  # ratios compare policies, so the forward pass may not be random
        target_modules=_target_modules(model, config.target_modules),
        task_type="CAUSAL_LM" if isinstance(model, PreTrainedModel) else None,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(peft_config, ADAPTER)  # type: ignore[operator]
        except ValueError as error:
            raise ModelError(
                f"LoRA cannot be attached to {type(model).__name__}: {error} Set "
                "model.lora.target_modules to a regex of layer names, or to all-linear."
            ) from error


def _target_modules(model: nn.Module, targets: str) -> str | list[str]:
    """PEFT knows what `all-linear` is in models of transformers only."""
    if targets != "all-linear" or isinstance(model, PreTrainedModel):
        return targets
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model for a while. Only a flag moves: `requires_grad` and optimizer hooks stay."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def active_adapters(layer: LoraLayer) -> list[str]:
    """Those of the layer's adapters that PEFT applies in its forward pass."""
    return [name for name in layer.active_adapters if name in layer.r]


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of `model` under the names it had before `attach_lora`, adapters merged, one
    tensor at a time; without adapters the parameters themselves. Tied weights come once."""
    for name, parameter in model.named_parameters():
        layer_name, _, leaf = name.partition(".base_layer.")
        if leaf == "weight":
            layer = model.get_submodule(layer_name)
            assert isinstance(layer, LoraLayer)
            merged = parameter.float()
            for adapter in active_adapters(layer):
                merged = merged + layer.get_delta_weight(adapter).float()  # type: ignore[operator]
            yield f"{layer_name}.weight", merged.to(parameter.dtype)
        elif leaf:
            yield f"{layer_name}.{leaf}", parameter.detach()
        elif ".lora_" not in name:
            yield name, parameter.detach()


def adapter_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapter's own parameters, named as PEFT does in a file, without its prefix."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            yield name.replace(f".{ADAPTER}.", "."), parameter.detach()


def adapter_config(model: PreTrainedModel) -> dict[str, Any]:
    """What an engine must know of the adapter besides its weights: PEFT's adapter_config.json."""
    config: Any = model.peft_config[ADAPTER]
    modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in adapter_weights(model)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "bias": "none",
        "target_modules": sorted(modules),
    }


def save_weights(model: PreTrainedModel, path: Path) -> None:
    """Write an HF folder of `model`; with adapters, the merged model, and the adapters alone in
    `path`/adapter."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        model.save_pretrained(path)
        return
    adapters = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
    with warnings.catch_warnings():
        # PEFT would write the frozen matrix of a head that has an adapter; it is not given here.
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True`")
        model.save_pretrained(path / "adapter", state_dict=adapters)
    model._hf_peft_config_loaded = False  # else save_pretrained writes the adapters only
    try:
        model.save_pretrained(path, state_dict=dict(merged_weights(model)))
    finally:
        model._hf_peft_config_loaded = True
