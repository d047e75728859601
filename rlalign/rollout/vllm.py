"""The vLLM rollout engine: real vLLM in this process, token ids in and out, stepped by us.

One vLLM request per sample, because each has a seed of its own; the prefix cache shares the prompt.
Every wait has a deadline. Weights are staged and checked before the engine sees any of them
(staging.py); vllm_weights.py loads them, vllm_start.py starts and stops vLLM.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from rlalign.config.schema import RolloutConfig
from rlalign.rollout import vllm_start, vllm_weights
from rlalign.rollout.engine import Capabilities, EngineError, GenerateRequest, SamplingParams
from rlalign.rollout.hf import eos_token_ids
from rlalign.rollout.staging import WeightStage
from rlalign.types import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_STOP,
    PolicyVersion,
    Sample,
    VersionSpan,
)

LOWEST_TEMPERATURE = 0.01  # vLLM clamps what is below, without an error
HIGHEST_TEMPERATURE = 2.0
FINISH_REASONS = {"stop": FINISH_STOP, "length": FINISH_LENGTH}

_live: weakref.ref[VllmEngine] | None = None  # vLLM's parallel state is one per process


class VllmEngine:
    """`RolloutEngine` over vLLM, on a CPU or a GPU.

    `dtype` is that of the engine's weights and activations; the longest sequence is
    `cfg.vllm.max_model_len`, or `max_prompt_length + cfg.max_completion_length`. One engine can
    live in a process at a time. Until the first `update_weights` the version is 0 with an empty
    digest: nothing was received. Equal seeds give equal tokens as far as the logits are equal,
    which another batch changes in the last bits.

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
        global _live
        if _live is not None and _live() is not None:
            raise EngineError(
                "a VllmEngine is alive in this process, and vLLM allows one: close it first"
            )
        model = vllm_start.empty_model(model_path)
        self._eos_ids = eos_token_ids(model, tokenizer)
        if not self._eos_ids:
            raise EngineError(
                f"neither the tokenizer nor the model in {model_path!r} names an end-of-sequence "
                "token, so no completion could end: set tokenizer.eos_token"
            )
        self._vocab = model.config.get_text_config().vocab_size
        self._max_len = cfg.vllm.max_model_len or max_prompt_length + cfg.max_completion_length
        self._model_path, self._tokenizer = model_path, tokenizer
        self._device, self._cfg = device, cfg.vllm
        self._stage = WeightStage(model, getattr(torch, dtype))
        self._broken: str | None = None
        self._sleeping: list[str] = []
        self._engine: Any = vllm_start.start(
            model_path,
            cfg.vllm,
            dtype=dtype,
            max_model_len=self._max_len,
            seed=seed,
            device=device,
        )
        self.version = PolicyVersion(0, "")
        _live = weakref.ref(self)

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
        from vllm import SamplingParams as VllmParams
        from vllm.sampling_params import RequestOutputKind

        self._check_requests(requests, params)
        stop = set() if params.ignore_eos else self._eos_ids | set(params.stop_token_ids)
        work = [
            (
                request.token_ids,
                VllmParams(
                    seed=_vllm_seed(seed),
                    temperature=params.temperature,
                    top_p=params.top_p,
                    top_k=params.top_k,
                    max_tokens=params.max_completion_length,
                    stop_token_ids=sorted(stop),
                    ignore_eos=True,  # the stop tokens say it all
                    logprobs=0,  # of the sampled token alone
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    skip_clone=True,
                ),
            )
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
        from vllm import SamplingParams as VllmParams
        from vllm.sampling_params import RequestOutputKind

        if temperature != 1:
            raise EngineError(
                f"vLLM scores at temperature 1 only, not {temperature}: use rollout.engine=hf, or "
                "generate, whose log-probs are those of the sampling temperature"
            )
        for i, sequence in enumerate(sequences):
            self._check_ids(sequence, 0, f"sequence {i}")
        # The last token is scored as a continuation: vLLM wants room to generate one, and so a
        # sequence of the greatest length still fits.
        work = [
            (
                sequence[:-1],
                VllmParams(
                    temperature=0.0,
                    max_tokens=1,
                    ignore_eos=True,
                    prompt_logprobs=0,
                    logprob_token_ids=[sequence[-1]],
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    skip_clone=True,
                ),
            )
            for sequence in sequences
            if len(sequence) > 1
        ]
        scored = iter(self._run("scoring", work))
        return [
            _sequence_logp(next(scored)) if len(sequence) > 1 else torch.empty(0)
            for sequence in sequences
        ]

    def update_weights(
        self, parameters: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> PolicyVersion:
        """Take new weights and return `version` with the digest of what was received.

        Raises EngineError, with the old weights in use, for weights that are not this model's or
        not finite (see staging.py) and when vLLM fails to load them.
        """
        self._check_usable()
        digest = self._stage.receive(parameters)
        if "weights" in self._sleeping:
            self._engine.wake_up(["weights"])
            self._sleeping.remove("weights")
        try:
            vllm_weights.load(self._engine, self._stage.arrived)
        except Exception as error:  # anything vLLM raises leaves it with half of the weights
            self._roll_back(error)
            raise EngineError(
                f"vLLM could not load the weights of version {version}: {type(error).__name__}: "
                f"{error}. The old weights (version {self.version.version}) stay in use."
            ) from error
        self._stage.commit()
        self.version = PolicyVersion(version, digest)
        return self.version

    def sleep(self) -> None:
        """Free GPU memory: weights to host memory, cache away. Nothing on a CPU."""
        self._check_usable()
        if self._device == "cuda" and self._cfg.sleep_mode and not self._sleeping:
            self._engine.sleep(level=1)
            self._sleeping = ["weights", "kv_cache"]

    def wake(self) -> None:
        """Undo `sleep`."""
        self._check_usable()
        if self._sleeping:
            self._engine.wake_up(self._sleeping)
            self._sleeping = []

    def close(self) -> None:
        """Release everything vLLM holds. Closing twice is fine; other calls raise EngineError."""
        global _live
        if self._engine is None:
            return
        engine, self._engine = self._engine, None
        vllm_start.stop(engine)
        del engine
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()
        _live = None

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
        from vllm.inputs.engine import tokens_input

        self._check_usable()
        if self._sleeping:
            raise EngineError(f"{what}: the engine sleeps; call wake() first")
        deadline = time.monotonic() + self._cfg.timeout_s
        results: dict[int, Any] = {}
        with self._stepping(len(work), results):
            for i, (token_ids, params) in enumerate(work):
                self._engine.add_request(str(i), tokens_input(list(token_ids)), params)
            while len(results) < len(work):
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{what}: {len(results)} of {len(work)} sequences after "
                        f"{self._cfg.timeout_s:g} s, which is the deadline; raise "
                        "rollout.vllm.timeout_s or send fewer at once"
                    )
                for output in self._step(what):
                    results[int(output.request_id)] = output
                if on_progress is not None:
                    on_progress(len(results), len(work))
        return [results[i] for i in range(len(work))]

    @contextlib.contextmanager
    def _stepping(self, number: int, results: dict[int, Any]) -> Iterator[None]:
        """Leave no request behind, and torch's random state as it was."""
        with vllm_start.rng_kept(self._device), vllm_start.eager(self._device, self._cfg):
            try:
                yield
            finally:
                left = [str(i) for i in range(number) if i not in results]
                if left and self._broken is None:
                    self._engine.abort_request(left)

    def _step(self, what: str) -> list[Any]:
        try:
            return self._engine.step()
        except Exception as error:  # vLLM's errors have no common base; the cause is kept
            self._broken = f"vLLM failed while {what}: {type(error).__name__}: {error}"
            raise EngineError(
                f"{self._broken}. Its state is lost: close this engine and start another, with a "
                "smaller rollout.vllm.max_num_seqs if memory ran out."
            ) from error

    def _roll_back(self, cause: Exception) -> None:
        try:
            vllm_weights.roll_back(self._engine, self._stage.in_use, self._model_path)
        except Exception as error:  # as in update_weights
            self._broken = (
                f"a weight update failed ({type(cause).__name__}: {cause}), and so did putting the "
                f"old weights back ({type(error).__name__}: {error})"
            )
            raise EngineError(f"{self._broken}: close this engine and start another") from error

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
        logp = tuple(completion.logprobs.logprobs)
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
        )

    def _check_usable(self) -> None:
        if self._engine is None:
            raise EngineError("the engine was closed; create a new VllmEngine")
        if self._broken is not None:
            raise EngineError(f"{self._broken}: close this engine and start another")

    def _check_requests(self, requests: Sequence[GenerateRequest], params: SamplingParams) -> None:
        low, high = LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE
        if params.temperature != 0 and not low <= params.temperature <= high:
            raise EngineError(
                f"temperature {params.temperature}: vLLM samples at {low} to {high}, or 0 (greedy)"
            )
        if params.max_completion_length < 1:
            raise EngineError(
                f"max_completion_length is {params.max_completion_length}; it must be at least 1"
            )
        for request in requests:
            name = f"prompt {request.prompt_id!r}"
            self._check_ids(request.token_ids, params.max_completion_length, name)
            if any(not 0 <= seed < 2**63 for seed in request.seeds):
                raise EngineError(f"{name}: a seed must be in [0, 2^63), got {request.seeds}")

    def _check_ids(self, ids: Sequence[int], extra: int, name: str) -> None:
        if not ids:
            raise EngineError(f"{name} has no tokens; the model needs at least one to start from")
        if not 0 <= min(ids) <= max(ids) < self._vocab:
            raise EngineError(
                f"{name} has token ids from {min(ids)} to {max(ids)}, the model knows 0 to "
                f"{self._vocab - 1}: model and tokenizer do not belong together"
            )
        if len(ids) + extra > self._max_len:
            raise EngineError(
                f"{name} has {len(ids)} tokens, which with {extra} of completion exceeds the "
                f"engine's longest sequence of {self._max_len}: raise rollout.vllm.max_model_len, "
                "or lower task.max_prompt_length or rollout.max_completion_length"
            )


def _vllm_seed(seed: int) -> int:
    """Every bit of `seed` in the lower 32, which are all that torch's CPU generator reads
    (splitmix64: Steele, Lea and Flood, OOPSLA 2014)."""
    mask = 2**64 - 1
    mixed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & mask
    return (mixed ^ (mixed >> 31)) >> 1


def _sequence_logp(output: Any) -> torch.Tensor:
    """float32 [len - 1] from a vLLM output: the prompt's log-probs, then the continuation's."""
    prompt = output.prompt_logprobs.logprobs
    return torch.tensor([*prompt, output.outputs[0].logprobs.logprobs[-1]], dtype=torch.float32)
