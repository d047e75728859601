"""Checkpoints of other projects' masked-diffusion models as models of transformers, and back.

LLaDA is a Llama, Dream a Qwen2, SDAR a Qwen3: the same maths under other names, attending in both
directions (SDAR: causally between blocks). So their own code is not run. A switch of their configs
that would change the maths is refused.

Sources: config.json and tensor names of GSAI-ML/LLaDA-8B (arXiv 2502.09992), Dream-org/Dream-7B
(arXiv 2508.15487) and JetLM/SDAR (arXiv 2510.06303).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from rlalign.models.errors import ModelError

# LLaDA's names of modules, and Llama's: outside of layers, and within one.
LLADA_MODULES = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
}
LLADA_LAYER, NATIVE_LAYER = "model.transformer.blocks.", "model.layers."
LLADA_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
# The one value of each switch of LLaDA's config that is a Llama. Dropout is none of them: it is off
# here whatever a config says.
LLADA_SWITCHES = {
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "activation_type": "silu",
    "alibi": False,
    "rope": True,
    "clip_qkv": None,
    "scale_logits": False,
}
# What a switch is where config.json is silent, if that is no Llama.
LLADA_DEFAULTS = {
    "block_type": "sequential",
    "layer_norm_type": "default",
    "include_bias": True,
    "activation_type": "swiglu",
    "rope": False,
}
QWEN_SWITCHES = {"use_sliding_window": False}
FOREIGN_KEYS = {"model_type", "architectures", "auto_map", "transformers_version"}
COPIED = ("*.py", "generation_config.json")  # what else the checkpoint's own code needs


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """How one project's checkpoints are read."""

    native: str  # model_type in transformers
    mask_id: int
    switches: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    shift: bool = False
    block_size: int = 0
    to_native: Callable[[str], str] = str  # names of tensors; one that is unknown stays
    to_source: Callable[[str], str] = str  # and back
    fields: Callable[[dict[str, Any]], dict[str, Any]] = dict


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What a checkpoint was read from, so that it can be written so again."""

    family: Family
    config: Mapping[str, Any]
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any]) -> Layout:
        """That of a folder whose model_type is in FAMILIES."""
        paths = [path for pattern in COPIED for path in sorted(folder.glob(pattern))]
        files = {path.name: path.read_bytes() for path in paths}
        return cls(FAMILIES[config["model_type"]], config, files)

    def native_config(self) -> PreTrainedConfig:
        """For transformers. Raises ModelError for a switch that the native model has not."""
        kind = self.config["model_type"]
        for name, needed in self.family.switches.items():
            found = self.config.get(name, self.family.defaults.get(name, needed))
            if found != needed and not (needed is False and found is None):
                raise ModelError(
                    f"config.json of this {kind} model has {name}={found!r}, and it is run as "
                    f"{self.family.native}, which is {name}={needed!r}: use a checkpoint without it"
                )
        try:
            fields = self.family.fields(dict(self.config))
        except KeyError as error:
            raise ModelError(
                f"config.json of this {kind} model lacks {error}: complete it from the page that "
                "the checkpoint came from"
            ) from error
        fields = {name: value for name, value in fields.items() if name not in FOREIGN_KEYS}
        return AutoConfig.for_model(self.family.native, **fields)

    def save(
        self, weights: Iterable[tuple[str, Tensor]], folder: Path, mask_id: int, block_size: int
    ) -> None:
        """Write `weights`, under their native names here, as the checkpoint had them, and its
        config."""
        named = {  # a copy even on a CPU, where ZeRO's parameters are views of one buffer
            self.family.to_source(name): value.to("cpu", copy=True) for name, value in weights
        }
        config = {**self.config, "mask_token_id": mask_id}
        if block_size != self.family.block_size or "block_size" in config:
            config["block_size"] = block_size
        for key in {"torch_dtype", "dtype"} & set(config):
            config[key] = str(next(iter(named.values())).dtype).removeprefix("torch.")
        folder.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(named, folder)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _llada_fields(config: dict[str, Any]) -> dict[str, Any]:
    heads, width = config["n_heads"], config["d_model"]
    kv_heads = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads)
    return {
        "vocab_size": config.get("embedding_size") or config["vocab_size"],
        "hidden_size": width,
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * width,
        "max_position_embeddings": config["max_sequence_length"],
        "rope_theta": config.get("rope_theta", 10000.0),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "tie_word_embeddings": bool(config.get("weight_tying", True)),
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
        "bos_token_id": None,
    }


def _renamed(
    name: str, modules: Mapping[str, str], layers: tuple[str, str], in_layer: Mapping[str, str]
) -> str:
    module, _, leaf = name.rpartition(".")
    if module in modules:
        return f"{modules[module]}.{leaf}"
    layer, _, module = module.removeprefix(layers[0]).partition(".")
    if name.startswith(layers[0]) and module in in_layer:
        return f"{layers[1]}{layer}.{in_layer[module]}.{leaf}"
    return name


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def _llada_to_native(name: str) -> str:
    layers = (LLADA_LAYER, NATIVE_LAYER)
    return _renamed(name, LLADA_MODULES, layers, LLADA_LAYER_MODULES)


def _llada_to_source(name: str) -> str:
    layers = (NATIVE_LAYER, LLADA_LAYER)
    return _renamed(name, _inverse(LLADA_MODULES), layers, _inverse(LLADA_LAYER_MODULES))


FAMILIES = {
    "llada": Family(
        native="llama",
        mask_id=126336,
        switches=LLADA_SWITCHES,
        defaults=LLADA_DEFAULTS,
        to_native=_llada_to_native,
        to_source=_llada_to_source,
        fields=_llada_fields,
    ),
    "Dream": Family(native="qwen2", mask_id=151666, switches=QWEN_SWITCHES, shift=True),
    "sdar": Family(native="qwen3", mask_id=151669, switches=QWEN_SWITCHES, block_size=4),
}
