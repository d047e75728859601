"""A model, ready for searches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlalign.config.schema import ModelConfig, VllmConfig
from rlalign.models.load import context_of, load_causal_lm, load_tokenizer, resolve_model_path
from rlalign.rollout.search_hf import HFSearch
from rlalign.testtime.errors import DecodeError

if TYPE_CHECKING:
    from rlalign.rollout.search_vllm import VllmSearch

BACKENDS = ("hf", "vllm")
CONTEXT = 4096  # of vLLM, whose cache must hold it, unless the model's is shorter
GPU_SHARE = 0.8  # of its memory, for vLLM; the rest is for reward models


def open_engine(
    model: str,
    *,
    backend: str = "hf",
    device: str = "cpu",
    dtype: str = "float32",
    max_batch_size: int = 256,
    seed: int = 0,
    max_model_len: int | None = None,
) -> HFSearch | VllmSearch:
    """The model in a folder, on the hub, or `mini:<task>` (whose weights `seed` keys), with its
    tokenizer: by transformers in this process (hf), the exact reference, or by vLLM, the fast one.
    Close it in the end (`with`): one vLLM can live in a process. `max_model_len` is vLLM's longest
    sequence; None: the model's own, at most 4096.

    Raises ModelError for a model that cannot be loaded, EngineError where vLLM cannot start,
    DecodeError for an unknown backend.
    """
    check_backend(backend, max_model_len)
    config = ModelConfig(path=model, dtype=dtype)
    tokenizer = load_tokenizer(config, seed)
    if backend == "hf":
        network = load_causal_lm(config, seed, device)
        return HFSearch(network, tokenizer, max_batch_size=max_batch_size)
    from rlalign.rollout.search_vllm import VllmSearch

    folder = resolve_model_path(model, seed)
    return VllmSearch.open(
        folder,
        tokenizer,
        VllmConfig(max_num_seqs=max_batch_size, gpu_memory_utilization=GPU_SHARE, sleep_mode=False),
        max_len=context_of(folder, CONTEXT) if max_model_len is None else max_model_len,
        dtype=dtype,
        device=device,
    )


def check_backend(backend: str, max_model_len: int | None) -> None:
    """Raise DecodeError for an unknown one, and for a context without a token."""
    if backend not in BACKENDS:
        raise DecodeError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if max_model_len is not None and max_model_len < 1:
        raise DecodeError(f"max_model_len={max_model_len}: give the longest sequence in tokens")
