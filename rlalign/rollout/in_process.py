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
    _check_params(params)
    for request in requests:
        name, own = f"prompt {request.prompt_id!r}", request.limited(params)
        _check_params(own)
        check_ids(config, request.token_ids, own.max_completion_length, name)
        if any(not -(2**63) <= seed < 2**63 for seed in request.seeds):
            raise EngineError(f"{name}: a seed must fit 64 bits, got {request.seeds}")


def _check_params(params: SamplingParams) -> None:
    for name, least in (("temperature", 0), ("max_completion_length", 1), ("num_top", 0)):
        if (value := getattr(params, name)) < least:
            raise EngineError(f"{name} is {value}; it must be at least {least}")


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
