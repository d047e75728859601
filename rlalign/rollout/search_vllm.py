"""Searches on vLLM in this process: the fast engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rlalign.config.schema import VllmConfig
from rlalign.rollout.engine import EngineError, GenerateRequest
from rlalign.rollout.hf import NOT_FINITE
from rlalign.rollout.search import Ascend, Choose, Draw, Drawn, Latents, Reply, Request
from rlalign.rollout.search_answers import check_options, check_span, climb
from rlalign.rollout.vllm import FINISH_REASONS
from rlalign.rollout.vllm_requests import capturing, choosing, chosen, drawn_top, sampled_logp
from rlalign.rollout.vllm_run import run_all
from rlalign.rollout.vllm_stream import VllmStream
from rlalign.types import FINISH_ABORT


class VllmSearch:
    """`SearchEngine` over a `VllmStream`, which is this engine's alone. A `Choose` needs room for
    one token more in the context, and takes 128 options.

    >>> with VllmSearch.open(path, tokenizer, VllmConfig(), max_len=512) as e:  # doctest: +SKIP
    ...     [drawn] = e.answer([Draw((5, 9), SamplingParams(16, temperature=0.0))])
    """

    def __init__(self, stream: VllmStream, tokenizer: Any, cfg: VllmConfig, device: str) -> None:
        self.tokenizer = tokenizer
        self.eos_ids, self.limits = stream.eos_ids, stream.limits
        self._stream, self._cfg, self._device = stream, cfg, device

    @classmethod
    def open(
        cls,
        model_path: str,
        tokenizer: Any,
        cfg: VllmConfig,
        *,
        max_len: int,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> VllmSearch:
        """Start vLLM with the model in a folder; `max_len` is the longest sequence. Raises
        EngineError as `VllmStream` does."""
        stream = VllmStream(model_path, tokenizer, cfg, max_len=max_len, dtype=dtype, device=device)
        return cls(stream, tokenizer, cfg, device)

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """See `SearchEngine`. Raises EngineError when vLLM fails and after `timeout_s`."""
        self._stream.check_usable()
        replies: dict[int, Reply] = {}
        work: dict[str, tuple[Sequence[int], Any]] = {}
        for i, request in enumerate(requests):
            try:
                self._check(request)
            except EngineError as error:
                replies[i] = error
                continue
            if not isinstance(request, Ascend):
                work[str(i)] = self._ask(request)
        outputs = run_all(self._stream, "searching", work, self._cfg, self._device)
        for name, output in outputs.items():
            replies[int(name)] = self._reply(name, requests[int(name)], output)
        climbing = {i: r for i, r in enumerate(requests) if isinstance(r, Ascend)}
        if climbing:
            head, device = self._stream.head(), torch.device(self._device)
            replies.update((i, climb(request, head, device)) for i, request in climbing.items())
        return [replies[i] for i in range(len(requests))]

    def close(self) -> None:
        """Release everything vLLM holds. Closing twice is fine; other calls raise EngineError."""
        self._stream.close()

    def __enter__(self) -> VllmSearch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check(self, request: Request) -> None:
        """Raise EngineError for a request that cannot be served."""
        limits = self._stream.limits
        if isinstance(request, Draw):
            wanted = GenerateRequest("of a search", request.ids, (request.seed,))
            limits.check([wanted], request.params)
        elif isinstance(request, Choose):
            limits.check_ids(request.ids, 1, "a prompt of a search")
            check_options(request.options, limits.vocab)
        elif isinstance(request, Latents):
            limits.check_ids(request.ids, 0, "a sequence of a search")
            check_span(request)

    def _ask(self, request: Request) -> tuple[Sequence[int], Any]:
        if isinstance(request, Draw):
            return request.ids, self._stream.sampling(request.params, request.seed)
        if isinstance(request, Choose):
            return request.ids, choosing(request.options)
        assert isinstance(request, Latents)
        return request.ids[: request.stop - 1], capturing(request.start)

    def _reply(self, name: str, request: Request, output: Any) -> Reply:
        try:
            if isinstance(output, EngineError):
                return output
            if isinstance(request, Choose):
                return chosen(output, request.options)
            if isinstance(request, Latents):
                return self._stream.latents(name)
            return drawn(output.outputs[0])
        except EngineError as error:
            return error


def drawn(completion: Any) -> Drawn:
    """A completion of vLLM as the reply to a `Draw`. Raises EngineError where the logits were not
    finite."""
    logp = tuple(sampled_logp(completion.logprobs))
    if not math.isfinite(sum(logp)):
        raise EngineError(NOT_FINITE)
    finish = FINISH_REASONS.get(completion.finish_reason, FINISH_ABORT)
    return Drawn(tuple(completion.token_ids), logp, finish, drawn_top(completion))
