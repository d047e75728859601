"""A model, ready for searches."""

from __future__ import annotations

from rlalign.config.schema import ModelConfig
from rlalign.models.load import load_causal_lm, load_tokenizer
from rlalign.rollout.search import SearchEngine
from rlalign.rollout.search_hf import HFSearch
from rlalign.testtime.errors import DecodeError

BACKENDS = ("hf", "vllm")


def open_engine(
    model: str,
    *,
    backend: str = "hf",
    device: str = "cpu",
    dtype: str = "float32",
    max_batch_size: int = 256,
    seed: int = 0,
) -> SearchEngine:
    """The model in a folder, on the hub, or `mini:<task>` (whose weights `seed` keys), with its
    tokenizer: by transformers in this process (hf), the exact reference, or by vLLM, the fast one.

    Raises ModelError for a model that cannot be loaded, DecodeError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise DecodeError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    config = ModelConfig(path=model, dtype=dtype)
    tokenizer = load_tokenizer(config, seed)
    network = load_causal_lm(config, seed, device)
    return HFSearch(network, tokenizer, max_batch_size=max_batch_size)
