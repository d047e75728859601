"""Masked-diffusion models from a folder, the hub, or `mini:<task>`; every failure says how to mend
it.

config.json tells the kind: another project's (models/masked_layout.py), a Llama, Qwen2 or Qwen3
with `"is_causal": false` (what we write), an encoder of transformers with a masked-language head,
or a model whose code ships with it and is trusted. Weights are read from safetensors only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rlalign.config.schema import KernelsConfig, ModelConfig
from rlalign.models.dropout import without_dropout
from rlalign.models.errors import ModelError
from rlalign.models.load import (
    LOAD_ERRORS,
    load_error,
    model_folder,
    no_weights,
    refuse_incomplete,
)
from rlalign.models.masked_diffusion import MaskedDiffusionLM
from rlalign.models.masked_layout import FAMILIES, Layout
from rlalign.models.masked_networks import DECODERS

INDEX_FILE = "model.safetensors.index.json"
AUTO_CLASSES = {
    "AutoModelForMaskedLM": AutoModelForMaskedLM,
    "AutoModelForCausalLM": AutoModelForCausalLM,
    "AutoModel": AutoModel,
}
UNSUPPORTED = {
    "llada2_moe": "is a mixture of experts that no model of transformers matches",
    "sdar_moe": "is a mixture of experts that no model of transformers matches",
    "diffusion_gemma": "has no mask token: it replaces tokens by random ones",
}


def load_masked_lm(
    cfg: ModelConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    kernels: KernelsConfig | None = None,
    block_size: int | None = None,
) -> MaskedDiffusionLM:
    """The masked-diffusion model at `cfg.path`, in `cfg.dtype`, in evaluation mode, without
    dropout, on `device`. `block_size` overrides the checkpoint's own. Adapters and checkpointing
    are the caller's to add.

    Raises ModelError where the folder holds no such model, or its weights do not fill it or are not
    all used, where no mask token can be told, and where it needs code that is not trusted.
    """
    folder = model_folder(cfg.path, seed)
    config = _read_config(folder)
    kind = config.get("model_type")
    if kind in UNSUPPORTED:
        raise ModelError(
            f"{folder} holds a {kind} model, which {UNSUPPORTED[kind]}: rlalign cannot run it. Use "
            "a LLaDA, Dream or SDAR checkpoint, or a masked-language model of transformers"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(no_weights(folder))
    if kind in FAMILIES:
        layout = Layout.of(folder, config)
        model, family = _load_layout(folder, layout, cfg), layout.family
        facts = (family.mask_id, family.shift, config.get("block_size", family.block_size))
    else:
        layout = None
        model = _load_own(folder, config, cfg)
        facts = (None, config.get("diffusion_shift"), config.get("diffusion_block_size"))
    known_mask, shift, own_block_size = facts
    without_dropout(model).to(device)  # type: ignore[arg-type]
    return MaskedDiffusionLM(
        model,
        _mask_id(folder, config, known_mask, cfg),
        shift=bool(shift),
        block_size=int(own_block_size or 0) if block_size is None else block_size,
        kernels=kernels,
        layout=layout,
    ).eval()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ModelError(
            f"{folder / 'config.json'} is not JSON ({error}): fetch or save the model again"
        ) from error


def _load_layout(folder: Path, layout: Layout, cfg: ModelConfig) -> PreTrainedModel:
    try:
        weights = {layout.family.to_native(x): value for x, value in _tensors(folder).items()}
        config = layout.native_config()
        native: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, loaded = native.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=getattr(torch, cfg.dtype),
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise load_error("model", folder, error) from error
    to_source = layout.family.to_source
    refuse_incomplete(folder, [to_source(name) for name in loaded["missing_keys"]])
    _refuse_unused(folder, [to_source(name) for name in loaded["unexpected_keys"]])
    return model


def _load_own(folder: Path, config: dict[str, Any], cfg: ModelConfig) -> PreTrainedModel:
    auto, decoder = _auto_class(folder, config), config["model_type"] in DECODERS
    try:
        model, loaded = auto.from_pretrained(
            folder,
            dtype=getattr(torch, cfg.dtype),
            trust_remote_code=cfg.trust_remote_code,
            attn_implementation="sdpa" if decoder else None,  # the best that there is
            use_safetensors=True,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise load_error("model", folder, error) from error
    refuse_incomplete(folder, loaded["missing_keys"])
    if decoder:  # an encoder's file often holds other tasks' heads too
        _refuse_unused(folder, loaded["unexpected_keys"])
    return model


def _auto_class(folder: Path, config: dict[str, Any]) -> Any:
    """The class of transformers that loads the folder's model. Raises ModelError for one that is
    causal, or that none loads."""
    kind, remote = config.get("model_type"), config.get("auto_map") or {}
    if kind in DECODERS:
        if config.get("is_causal", True):
            raise ModelError(
                f"{folder} holds a causal {kind} model, which cannot fill in masks. If it was "
                'trained to, set "is_causal": false in its config.json'
            )
        return AutoModelForCausalLM
    whole = not (config.get("is_encoder_decoder") or config.get("is_decoder"))
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and whole:
        return AutoModelForMaskedLM
    for name, auto in AUTO_CLASSES.items():
        if name in remote:
            return auto
    raise ModelError(
        f"{folder} holds a {kind} model, and rlalign knows no way to fill in masks with it. Use "
        f'one of {", ".join([*FAMILIES, *DECODERS])} (the last ones with "is_causal": false), or '
        "an encoder of transformers' AutoModelForMaskedLM"
    )


def _mask_id(folder: Path, config: dict[str, Any], known: int | None, cfg: ModelConfig) -> int:
    """The mask token: the config's, the tokenizer's, or the one that the family is known for."""
    if config.get("mask_token_id") is not None:
        return int(config["mask_token_id"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
        empty = len(tokenizer) <= len(tokenizer.all_special_tokens)  # what no files come to
        found = None if empty else tokenizer.mask_token_id
    except LOAD_ERRORS:
        found = None  # there is none, or it needs code that is not trusted
    found = known if found is None else found
    if found is None:
        raise ModelError(
            f"neither config.json nor the tokenizer in {folder} names a mask token: set "
            "mask_token_id in config.json"
        )
    return int(found)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, mapped into memory and not read yet."""
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    return {key: value for name in names for key, value in load_file(folder / name).items()}


def _refuse_unused(folder: Path, unused: list[str]) -> None:
    if unused:
        raise ModelError(
            f"the weights in {folder} hold {len(unused)} tensors that the model has no place for, "
            f"the first {min(unused)!r}: config.json is another model's"
        )
