"""What engines that run a model in this process share: requests that the model can serve, and its
modes for the length of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every submodule gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_requests(
    config: Any, requests: Sequence[GenerateRequest], params: SamplingParams
) -> None:
    """Raise EngineError unless a model of HF config `config` can serve the requests."""
    if params.temperature < 0:
        raise EngineError(f"temperature is {params.temperature}; it must be at least 0")
    lengths = [request.limited(params).max_completion_length for request in requests]
    if (shortest := min([params.max_completion_length, *lengths])) < 1:
        raise EngineError(f"max_completion_length is {shortest}; it must be at least 1")
    for request, length in zip(requests, lengths, strict=True):
        name = f"prompt {request.prompt_id!r}"
        check_ids(config, request.token_ids, length, name)
        if any(not -(2**63) <= seed < 2**63 for seed in request.seeds):
            raise EngineError(f"{name}: a seed must fit 64 bits, got {request.seeds}")


def check_ids(config: Any, ids: Sequence[int], extra: int, name: str) -> None:
    """Raise EngineError unless a model of HF config `config` can read `ids` and `extra` more."""
    if not ids:
        raise EngineError(f"{name} has no tokens; the model needs at least one to start from")
    vocab = config.vocab_size
    if not 0 <= min(ids) <= max(ids) < vocab:
        raise EngineError(
            f"{name} has token ids from {min(ids)} to {max(ids)}, the model knows 0 to "
            f"{vocab - 1}: model and tokenizer do not belong together"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and len(ids) + extra > limit:
        raise EngineError(
            f"{name} has {len(ids)} tokens, which with {extra} of completion exceeds the "
            f"model's context of {limit}: lower task.max_prompt_length or "
            "rollout.max_completion_length"
        )
