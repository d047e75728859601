"""What a vLLM engine can serve, checked by name before it is asked: vLLM itself would change some
of it silently and die of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams

LOWEST_TEMPERATURE = 0.01  # vLLM clamps what is below, without an error
HIGHEST_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Limits:
    """Of one engine. Every check raises EngineError with what is wrong and the fix."""

    vocab: int
    max_len: int  # longest sequence, tokens

    def check(self, requests: Sequence[GenerateRequest], params: SamplingParams) -> None:
        self.check_params(params)
        for request in requests:
            name, own = f"prompt {request.prompt_id!r}", request.limited(params)
            if own is not params:
                self.check_params(own)
            self.check_ids(request.token_ids, own.max_completion_length, name)
            self.check_seeds(request.seeds, name)

    def check_params(self, params: SamplingParams) -> None:
        low, high = LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE
        if params.temperature != 0 and not low <= params.temperature <= high:
            raise EngineError(
                f"temperature {params.temperature}: vLLM samples at {low} to {high}, or 0 (greedy)"
            )
        if params.max_completion_length < 1:
            raise EngineError(
                f"max_completion_length is {params.max_completion_length}; it must be at least 1"
            )
        if params.num_top < 0:
            raise EngineError(f"num_top is {params.num_top}; it must be at least 0")
        strange = [token for token in params.stop_token_ids if not 0 <= token < self.vocab]
        if strange:
            raise EngineError(
                f"stop_token_ids holds {strange[0]}, the model knows 0 to {self.vocab - 1}"
            )

    def check_seeds(self, seeds: Sequence[int], name: str) -> None:
        if any(not 0 <= seed < 2**63 for seed in seeds):
            raise EngineError(f"{name}: a seed must be in [0, 2^63), got {tuple(seeds)}")

    def check_ids(self, ids: Sequence[int], extra: int, name: str) -> None:
        """That `ids` are tokens of this model and leave room for `extra` more."""
        if not ids:
            raise EngineError(f"{name} has no tokens; the model needs at least one to start from")
        if not 0 <= min(ids) <= max(ids) < self.vocab:
            raise EngineError(
                f"{name} has token ids from {min(ids)} to {max(ids)}, the model knows 0 to "
                f"{self.vocab - 1}: model and tokenizer do not belong together"
            )
        if len(ids) + extra > self.max_len:
            raise EngineError(
                f"{name} has {len(ids)} tokens, which with {extra} of completion exceeds the "
                f"engine's longest sequence of {self.max_len}: raise rollout.vllm.max_model_len "
                "(max_len of a server), or lower task.max_prompt_length or "
                "rollout.max_completion_length"
            )
