"""The vLLM rollout engine: real vLLM in this process (vllm_stream.py), a batch at a time. Every
wait has a deadline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from rlalign.config.schema import RolloutConfig
from rlalign.rollout.engine import Capabilities, EngineError, GenerateRequest, SamplingParams
from rlalign.rollout.vllm_requests import drawn_top, sampled_logp, scoring, sequence_logp
from rlalign.rollout.vllm_run import run_all
from rlalign.rollout.vllm_stream import VllmStream
from rlalign.types import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_STOP,
    PolicyVersion,
    Sample,
    VersionSpan,
)

FINISH_REASONS = {"stop": FINISH_STOP, "length": FINISH_LENGTH}


class VllmEngine:
    """`RolloutEngine` over vLLM, on a CPU or a GPU.

    `dtype` is that of the engine's weights and activations; the longest sequence is
    `cfg.vllm.max_model_len`, or `max_prompt_length + cfg.max_completion_length`. One engine can
    live in a process at a time. Equal seeds give equal tokens as far as the logits are equal, which
    another batch changes in the last bits.

    >>> with VllmEngine(path, tokenizer, cfg, max_prompt_length=512) as engine:  # doctest: +SKIP
    ...     [[sample]] = engine.generate([GenerateRequest("p", (5, 9), seeds=(1,))], params)
    """

    capabilities = Capabilities(
        shares_parameters=False, hidden_states=False, score_temperature=False
    )

    def __init__(
        self,
        model_path: str,
        tokenizer: Any,
        cfg: RolloutConfig,
        *,
        dtype: str = "float32",
        max_prompt_length: int,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self._tokenizer, self._device, self._cfg = tokenizer, device, cfg.vllm
        self._stream = VllmStream(
            model_path,
            tokenizer,
            cfg.vllm,
            max_len=cfg.vllm.max_model_len or max_prompt_length + cfg.max_completion_length,
            dtype=dtype,
            seed=seed,
            device=device,
        )

    @property
    def version(self) -> PolicyVersion:
        return self._stream.version

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        params: SamplingParams,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Sample]]:
        """One list of samples per request, one sample per seed, in order. `on_progress` is told
        (samples done, samples in all) after every step of the engine.

        Raises EngineError for requests that cannot be served, logits that are not finite, a failure
        inside vLLM, and when `rollout.vllm.timeout_s` have passed.
        """
        stream = self._stream
        stream.check_usable()
        stream.limits.check(requests, params)
        work = [
            (request.token_ids, stream.sampling(request.limited(params), seed))
            for request in requests
            for seed in request.seeds
        ]
        outputs = self._run("generating", work, on_progress)
        return self._samples(requests, [output.outputs[0] for output in outputs])

    def score(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[torch.Tensor]:
        """Log-prob of every token given its prefix: float32 [len - 1] per sequence, on the CPU.

        Raises EngineError for another temperature than 1 (vLLM scores prompts before temperature)
        and for sequences that are empty or too long.
        """
        if temperature != 1:
            raise EngineError(
                f"vLLM scores at temperature 1 only, not {temperature}: use rollout.engine=hf, or "
                "generate, whose log-probs are those of the sampling temperature"
            )
        self._stream.check_usable()
        for i, sequence in enumerate(sequences):
            self._stream.limits.check_ids(sequence, 0, f"sequence {i}")
        work = [
            (sequence[:-1], scoring(sequence[-1])) for sequence in sequences if len(sequence) > 1
        ]
        scored = iter(self._run("scoring", work))
        return [
            torch.tensor(
                sequence_logp(next(scored)) if len(sequence) > 1 else [], dtype=torch.float32
            )
            for sequence in sequences
        ]

    def update_weights(
        self, parameters: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> PolicyVersion:
        """Take new weights and return `version` with the digest of what was received.

        Raises EngineError, with the old weights in use, for weights that are not this model's or
        not finite (see staging.py) and when vLLM fails to load them.
        """
        return self._stream.update_weights(parameters, version)

    def sleep(self) -> None:
        """Free GPU memory: weights to host memory, cache away. Nothing on a CPU."""
        self._stream.sleep()

    def wake(self) -> None:
        """Undo `sleep`."""
        self._stream.wake()

    def close(self) -> None:
        """Release everything vLLM holds. Closing twice is fine; other calls raise EngineError."""
        self._stream.close()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(
        self,
        what: str,
        work: Sequence[tuple[Sequence[int], Any]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Any]:
        """Final output of every (token ids, vLLM sampling parameters), in order."""
        named = {str(i): item for i, item in enumerate(work)}
        results = run_all(self._stream, what, named, self._cfg, self._device, on_progress)
        for result in results.values():
            if isinstance(result, EngineError):
                raise result
        return [results[name] for name in named]

    def _samples(
        self, requests: Sequence[GenerateRequest], completions: Sequence[Any]
    ) -> list[list[Sample]]:
        texts = iter(
            self._tokenizer.batch_decode(
                [list(completion.token_ids) for completion in completions],
                skip_special_tokens=True,
            )
        )
        remaining = iter(completions)
        return [
            [
                self._sample(request, i, next(remaining), next(texts))
                for i in range(len(request.seeds))
            ]
            for request in requests
        ]

    def _sample(self, request: GenerateRequest, i: int, completion: Any, text: str) -> Sample:
        logp = tuple(sampled_logp(completion.logprobs))
        if not math.isfinite(sum(logp)):
            raise EngineError(
                f"prompt {request.prompt_id!r}: the model's logits are not finite, so nothing can "
                "be sampled from it: the weights diverged. Go back to an earlier checkpoint and "
                "lower the learning rate."
            )
        return Sample(
            prompt_id=request.prompt_id,
            index=request.first_index + i,
            token_ids=tuple(completion.token_ids),
            logp=logp,
            finish_reason=FINISH_REASONS.get(completion.finish_reason, FINISH_ABORT),
            spans=(VersionSpan(len(logp), self.version.version),),
            text=text,
            top=drawn_top(completion),
        )
