"""The models of logit fusion by name."""

from __future__ import annotations

from collections.abc import Sequence

from rlalign.testtime.fusion_models import FusedModel, open_member, open_small
from rlalign.testtime.fusion_vllm import open_on_vllm
from rlalign.testtime.open_engine import check_backend


def open_fusion(
    large: str,
    small: str,
    experts: Sequence[str],
    *,
    backend: str = "hf",
    device: str = "cpu",
    dtype: str = "float32",
    max_batch_size: int = 64,
    seed: int = 0,
    max_model_len: int | None = None,
) -> FusedModel:
    """The models in folders, on the hub, or `mini:<task>` (whose weights `seed` keys), with their
    tokenizers. An expert may be the folder of a LoRA adapter on the small base, whose weights it
    then shares. `backend` runs the large model: transformers (hf) or vLLM, whose longest sequence
    is `max_model_len` (None: the model's own, at most 4096). Close it in the end (`with`).

    Raises ModelError for one that cannot be loaded, EngineError where vLLM cannot start,
    DecodeError for an unknown backend and as FusedModel does.
    """
    check_backend(backend, max_model_len)
    base, members = open_small(small, experts, dtype=dtype, seed=seed, device=device)
    if backend == "vllm":
        return open_on_vllm(
            large, base, members, device=device, dtype=dtype, max_batch_size=max_batch_size,
            seed=seed, max_model_len=max_model_len,
        )  # fmt: skip
    first = open_member(large, dtype=dtype, seed=seed, device=device)
    return FusedModel(first, base, members, max_batch_size=max_batch_size)
