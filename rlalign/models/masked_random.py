"""Random miniature masked-diffusion checkpoints of every kind as complete folders: for tests and
dry runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from rlalign.models.errors import ModelError
from rlalign.models.masked_layout import FAMILIES, Layout
from rlalign.models.random import init_model, small_config
from rlalign.models.tokenizer import build_tokenizer

MASK = "<mask>"
KINDS = ("llada", "dream", "sdar", "native", "bert", "modernbert")
MODEL_TYPES = {"llada": "llada", "dream": "Dream", "sdar": "sdar"}
INIT_STD = 0.2  # ten times the usual: a model that is nearly uniform hides errors


def masked_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """That of models/tokenizer.py with a mask token, 263 tokens in all."""
    tokenizer = build_tokenizer(max_length)
    tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer


def write_random_masked(
    path: str | Path,
    kind: str = "llada",
    *,
    vocab: int | None = None,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    mlp: int = 48,
    max_positions: int = 128,
    block_size: int = 0,
    tied: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a small random model of `kind` (float32 safetensors) and a tokenizer to `path`.

    `llada`, `dream` and `sdar` have the names and config.json of those projects, `native` is a
    Qwen2 of our own, `bert` and `modernbert` are encoders. `vocab` defaults to the tokenizer's
    263 tokens; `block_size` is that of `sdar` (0: 4) and `native`; `overrides` are fields of the
    kind's config.json. The weights depend on `seed`, kind and shape only; the global generator is
    left as it was. Raises ModelError for another kind or a smaller vocabulary.
    """
    if kind not in KINDS:
        raise ModelError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    tokenizer = masked_tokenizer(max_positions)
    vocab = len(tokenizer) if vocab is None else vocab
    if vocab < len(tokenizer):
        raise ModelError(f"vocab={vocab} is smaller than the tokenizer's {len(tokenizer)} tokens")
    shape: dict[str, Any] = {
        "vocab": vocab, "hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "mlp": mlp, "max_positions": max_positions, "tied": tied,
    }  # fmt: skip
    tokens: dict[str, Any] = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.mask_token_id,
    }
    folder = Path(path)
    if kind in ("bert", "modernbert"):
        _write_encoder(folder, kind, shape, tokens | overrides, seed)
    elif kind == "native":
        fields = {"is_causal": False, "diffusion_block_size": block_size} | tokens | overrides
        config = small_config("qwen2", **shape, init_std=INIT_STD, **fields)
        _randomized(init_model(config, seed), seed).save_pretrained(folder)
    else:
        name = MODEL_TYPES[kind]
        block_size = block_size or FAMILIES[name].block_size
        config = _foreign_config(name, shape, block_size) | tokens | overrides
        layout = Layout(FAMILIES[name], config, {})
        native = layout.native_config()
        native.initializer_range = INIT_STD
        weights = _randomized(init_model(native, seed), seed).named_parameters()
        layout.save(
            ((name, value.detach()) for name, value in weights),
            folder,
            config["mask_token_id"],
            block_size,
        )
    tokenizer.save_pretrained(folder)
    return folder


def _foreign_config(name: str, shape: dict[str, Any], block_size: int) -> dict[str, Any]:
    if name == "llada":
        return {
            "model_type": "llada",
            "architectures": ["LLaDAModelLM"],
            "d_model": shape["hidden"],
            "n_layers": shape["layers"],
            "n_heads": shape["heads"],
            "n_kv_heads": shape["kv_heads"],
            "mlp_hidden_size": shape["mlp"],
            "vocab_size": shape["vocab"],
            "embedding_size": shape["vocab"],
            "max_sequence_length": shape["max_positions"],
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "weight_tying": shape["tied"],
            "block_type": "llama",
            "layer_norm_type": "rms",
            "include_bias": False,
            "activation_type": "silu",
            "rope": True,
            "torch_dtype": "float32",
        }
    config = {
        "model_type": name,
        "architectures": [{"Dream": "DreamModel", "sdar": "SDARForCausalLM"}[name]],
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "intermediate_size": shape["mlp"],
        "max_position_embeddings": shape["max_positions"],
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "tie_word_embeddings": shape["tied"],
        "torch_dtype": "float32",
    }
    if name == "sdar":
        head_dim = shape["hidden"] // shape["heads"]
        config |= {"block_size": block_size, "head_dim": head_dim, "attention_bias": False}
    return config


def _write_encoder(
    folder: Path, kind: str, shape: dict[str, Any], fields: dict[str, Any], seed: int
) -> None:
    config = AutoConfig.for_model(
        kind,
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        intermediate_size=shape["mlp"],
        max_position_embeddings=shape["max_positions"],
        tie_word_embeddings=shape["tied"],
        initializer_range=INIT_STD,
        **(dict.fromkeys(("bos_token_id", "cls_token_id", "sep_token_id")) | fields),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    _randomized(model, seed).save_pretrained(folder)


@torch.no_grad()
def _randomized(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Norms and biases, which begin as ones and zeros, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 and not isinstance(module, nn.Embedding):
                centre = 0.0 if name == "bias" else 1.0
                parameter.copy_(centre + 0.2 * torch.randn(len(parameter), generator=generator))
    return model.eval()
