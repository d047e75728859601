"""Randomly initialised small models as complete HF folders: for tests and dry runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rlalign.models.errors import ModelError
from rlalign.models.tokenizer import build_tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2")


def small_config(
    architecture: str,
    *,
    vocab: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    max_positions: int,
    tied: bool,
    init_std: float = 0.02,
    **overrides: Any,
) -> PreTrainedConfig:
    """An HF config of that shape. `hidden` must be a multiple of `heads`; `overrides` are HF config
    fields. Raises ModelError for an architecture not in ARCHITECTURES."""
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"unknown architecture {architecture!r}; choose from {', '.join(ARCHITECTURES)}"
        )
    fields = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": mlp,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "initializer_range": init_std,
        "bos_token_id": None,
    }
    return AutoConfig.for_model(architecture, **(fields | overrides))


def write_random_model(
    path: str | Path,
    architecture: str = "qwen2",
    *,
    tied: bool = True,
    vocab: int | None = None,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    mlp: int = 64,
    max_positions: int = 512,
    init_std: float = 0.2,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a small random causal LM (float32 safetensors) and its tokenizer to `path`.

    `vocab` defaults to the tokenizer's 262 tokens and may be larger. `init_std` is ten times the
    usual one: a model whose distributions are far from uniform shows errors that a flat one hides.
    The weights depend on `seed` and the shape only; the global generator is left as it was.
    Raises ModelError for an unknown architecture or a vocabulary smaller than the tokenizer's.
    """
    tokenizer = build_tokenizer(max_positions)
    if vocab is not None and vocab < len(tokenizer):
        raise ModelError(f"vocab={vocab} is smaller than the tokenizer's {len(tokenizer)} tokens")
    config = small_config(
        architecture,
        vocab=vocab or len(tokenizer),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        mlp=mlp,
        max_positions=max_positions,
        tied=tied,
        init_std=init_std,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **overrides,
    )
    model = init_model(config, seed)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def init_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A float32 causal LM with random weights keyed by `seed`; global random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
