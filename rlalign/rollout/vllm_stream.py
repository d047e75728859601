"""vLLM in this process, stepped by its owner: sequences go in, finished ones come out, and weights
change between two steps.

One vLLM request per sequence, because each has a seed of its own; the prefix cache shares prompts.
Weights are staged and checked before vLLM sees any of them (staging.py); vllm_weights.py loads
them, vllm_start.py starts and stops vLLM.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from rlalign.algos.latent import Head
from rlalign.config.schema import VllmConfig
from rlalign.rollout import vllm_choose, vllm_requests, vllm_start, vllm_weights
from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.hf import eos_token_ids
from rlalign.rollout.limits import Limits
from rlalign.rollout.staging import WeightStage
from rlalign.rollout.vllm_latents import LatentTap, read_head
from rlalign.types import PolicyVersion


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that vLLM holds, and which policy it makes of the base model."""

    request: Any  # vLLM's LoRARequest
    version: PolicyVersion


@runtime_checkable
class CountsSilently(Protocol):
    """A scheduler that tells of tokens late (vllm_decode_cpu.py)."""

    def untold(self, name: str) -> tuple[list[int], list[float]]: ...


@runtime_checkable
class ClearsCache(Protocol):
    """A scheduler that clears what a request without finite logits leaves (vllm_decode_cpu.py)."""

    def mark_sick(self, name: str) -> None: ...


_live: weakref.ref[VllmStream] | None = None  # vLLM's parallel state is one per process


class VllmStream:
    """vLLM on a CPU or a GPU. One can live in a process at a time.

    `dtype` is that of weights and activations, `max_len` the longest sequence. Until the first
    `update_weights` the version is 0 with an empty digest: nothing was received. With `choose` that
    gives every next token from vLLM's logits, in place of its sampler (vllm_choose.py).

    >>> stream = VllmStream(path, tokenizer, VllmConfig(), max_len=512)        # doctest: +SKIP
    >>> stream.add("a", (5, 9), stream.sampling(SamplingParams(16), seed=1))
    >>> while stream.unfinished: finished = stream.step()
    """

    def __init__(
        self,
        model_path: str,
        tokenizer: Any,
        cfg: VllmConfig,
        *,
        max_len: int,
        dtype: str = "float32",
        seed: int = 0,
        device: str = "cpu",
        choose: vllm_choose.Chooser | None = None,
    ) -> None:
        global _live
        if _live is not None and _live() is not None:
            raise EngineError(
                "a vLLM engine is alive in this process, and vLLM allows one: close it first"
            )
        model = vllm_start.empty_model(model_path)
        self.eos_ids = eos_token_ids(model, tokenizer)
        if not self.eos_ids:
            raise EngineError(
                f"neither the tokenizer nor the model in {model_path!r} names an end-of-sequence "
                "token, so no completion could end: set tokenizer.eos_token"
            )
        self.limits = Limits(model.config.get_text_config().vocab_size, max_len)
        self._model_path, self._device, self._cfg = model_path, device, cfg
        self._stage = WeightStage(model, getattr(torch, dtype))
        self._broken: str | None = None
        self._sleeping: list[str] = []
        # A new one for every version: under the old one's number vLLM would find its prefix cache.
        self._adapter_numbers = itertools.count(1)
        self._engine: Any = vllm_start.start(
            model_path, cfg, dtype=dtype, max_model_len=max_len, seed=seed, device=device,
            in_turn=choose is not None,
        )  # fmt: skip
        if choose is not None:
            scheduler = self._engine.engine_core.engine_core.scheduler
            vllm_choose.install(
                vllm_weights.runner(self._engine),
                choose,
                self._name_of,
                scheduler.mark_sick if isinstance(scheduler, ClearsCache) else None,
            )
        self._tap = LatentTap()
        self._tap.install(vllm_weights.runner(self._engine))
        self.version = PolicyVersion(0, "")
        _live = weakref.ref(self)

    # --- sequences -------------------------------------------------------------------------------

    def sampling(self, params: SamplingParams, seed: int) -> Any:
        """vLLM's parameters for one sequence drawn with `seed`."""
        return vllm_requests.drawing(params, seed, self.eos_ids, self.limits.vocab)

    def add(
        self, name: str, token_ids: Sequence[int], params: Any, adapter: Adapter | None = None
    ) -> None:
        """Take in one sequence, to be worked on from the next step on."""
        from vllm.inputs.engine import tokens_input

        self.check_usable()
        if self._sleeping:
            raise EngineError("the engine sleeps; call wake() first")
        request = None if adapter is None else adapter.request
        try:
            self._engine.add_request(
                name, tokens_input(list(token_ids)), params, lora_request=request
            )
        except Exception as error:  # vLLM's own checks; nothing has changed
            raise EngineError(f"vLLM refuses it: {type(error).__name__}: {error}") from error
        if params.extra_args:
            [internal] = self._engine.output_processor.external_req_ids[name]
            first = params.extra_args[vllm_requests.LATENTS_FROM]
            self._tap.follow(name, internal, first, len(token_ids))

    def step(self) -> list[Any]:
        """Advance every running sequence by a token; vLLM's outputs of those that are finished."""
        try:
            return self._engine.step()
        except Exception as error:  # vLLM's errors have no common base; the cause is kept
            self._broken = f"vLLM failed while running: {type(error).__name__}: {error}"
            raise EngineError(
                f"{self._broken}. Its state is lost: close this engine and start another, with a "
                "smaller rollout.vllm.max_num_seqs if memory ran out."
            ) from error

    @property
    def unfinished(self) -> int:
        """Sequences that are running or waiting."""
        return self._engine.get_num_unfinished_requests() if self._engine is not None else 0

    def abort(self, names: Sequence[str]) -> None:
        if names and self._broken is None and self._engine is not None:
            self._engine.abort_request(list(names))
        for name in names:
            self._tap.forget(name)

    def drawn(self, name: str, since: int = 0) -> tuple[list[int], list[float]]:
        """What a running sequence has from its token `since` on: token ids and log-probs."""
        processor = self._engine.output_processor
        [internal] = processor.external_req_ids[name]
        state = processor.request_states[internal]
        ids = state.detokenizer.output_token_ids
        logp = vllm_requests.sampled_logp(state.logprobs_processor.logprobs)
        scheduler = self._engine.engine_core.engine_core.scheduler
        if not isinstance(scheduler, CountsSilently):
            return ids[since:], logp[since:]
        more_ids, more_logp = scheduler.untold(internal)
        more = slice(max(0, since - len(ids)), None)
        return [*ids[since:], *more_ids[more]], [*logp[since:], *more_logp[more]]

    def _name_of(self, internal: str) -> str:
        return self._engine.output_processor.request_states[internal].external_req_id

    def latents(self, name: str) -> torch.Tensor:
        """Of a finished sequence that was added with `vllm_requests.capturing(start)`, once: what
        the head read to predict the tokens from `start` on, one more than were given; float32
        [tokens, hidden size] on the CPU. Raises EngineError where they are not finite."""
        return self._tap.take(name)

    def head(self, adapter: Adapter | None = None) -> Head:
        """The language-model head in use now, on vLLM's memory unless `adapter` acts on it."""
        self.check_usable()
        if self._sleeping:
            raise EngineError("the engine sleeps; call wake() first")
        number = 0 if adapter is None else adapter.request.lora_int_id
        return read_head(vllm_weights.runner(self._engine), number)

    # --- weights ---------------------------------------------------------------------------------

    def update_weights(
        self, parameters: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> PolicyVersion:
        """Take new weights and return `version` with the digest of what was received.

        Raises EngineError, with the old weights in use, for weights that are not this model's or
        not finite (see staging.py) and when vLLM fails to load them.
        """
        self.check_usable()
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

    def reset_weights(self) -> PolicyVersion:
        """Go back to the weights of the model folder, version 0.

        Raises EngineError when vLLM fails to load them; this engine is then of no use.
        """
        self.check_usable()
        try:
            vllm_weights.load_folder(self._engine, self._model_path)
        except Exception as error:  # as in update_weights
            self._broken = (
                f"vLLM could not load the weights of {self._model_path!r} again: "
                f"{type(error).__name__}: {error}"
            )
            raise EngineError(f"{self._broken}: close this engine and start another") from error
        self._stage.forget()
        self.version = PolicyVersion(0, "")
        return self.version

    def load_adapter(self, folder: Path, version: int) -> Adapter:
        """The LoRA adapter in `folder` (as PEFT writes it), for sequences to come.

        Raises EngineError, with nothing changed, for one that is not finite or that vLLM refuses.
        """
        from vllm.lora.request import LoRARequest

        self.check_usable()
        digest = vllm_weights.adapter_digest(folder)
        number = next(self._adapter_numbers)
        request = LoRARequest(f"adapter-{number}", number, str(folder))
        try:
            self._engine.add_lora(request)
        except Exception as error:  # vLLM's errors have no common base; the cause is kept
            raise EngineError(
                f"vLLM refuses the adapter: {type(error).__name__}: {error}. Look at its rank "
                f"(vllm.max_lora_rank={self._cfg.max_lora_rank}) and its target modules; a job "
                "without LoRA slots sends merged weights (vllm.max_loras=0)"
            ) from error
        return Adapter(request, PolicyVersion(version, digest))

    def unload_adapter(self, adapter: Adapter) -> None:
        """No sequence of it may be running."""
        self._engine.remove_lora(adapter.request.lora_int_id)

    def _roll_back(self, cause: Exception) -> None:
        try:
            vllm_weights.roll_back(self._engine, self._stage.in_use, self._model_path)
        except Exception as error:  # as in update_weights
            self._broken = (
                f"a weight update failed ({type(cause).__name__}: {cause}), and so did putting the "
                f"old weights back ({type(error).__name__}: {error})"
            )
            raise EngineError(f"{self._broken}: close this engine and start another") from error

    # --- life ------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Free GPU memory: weights to host memory, cache away. Nothing on a CPU."""
        self.check_usable()
        if self._device == "cuda" and self._cfg.sleep_mode and not self._sleeping:
            self._engine.sleep(level=1)
            self._sleeping = ["weights", "kv_cache"]

    def wake(self) -> None:
        """Undo `sleep`."""
        self.check_usable()
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

    def check_usable(self) -> None:
        if self._engine is None:
            raise EngineError("the engine was closed; create a new one")
        if self._broken is not None:
            raise EngineError(f"{self._broken}: close this engine and start another")
