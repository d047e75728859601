"""vLLM's bookkeeping of a token, made cheap: it is where a small model on a CPU spends its time.

vLLM 0.32 does for each sequence, at each step, what is only needed now and then. Nothing here
changes a token or a log-prob:

| vLLM, for every token | here |
|---|---|
| draws a seed from the sequence's generator | draws AHEAD of them at once, the same ones |
| asks the block manager for room | asks where a block begins or ends |
| takes token and log-prob to the output processor | takes all of them there as the sequence ends |
| appends a log-prob to six lists | appends a sequence's at once |

Only sequences that have nothing told of them before they end (RequestOutputKind.FINAL_ONLY), with
the log-prob of the sampled token alone, are held back; the first and the last token of these, and
all of the others, take vLLM's own path.

And what a sequence leaves in the cache is cleared where its logits were not finite: the attention
of vLLM's CPU kernels spans the whole of a block, where 0 * NaN is NaN, so whoever has the block
next would have none either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Generator, Tensor
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import LogprobsLists
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

AHEAD = 64  # seeds drawn at a time

_sample = TopKTopPSampler.forward_cpu
_append = LogprobsProcessor._update_sample_logprobs


def install() -> type[Scheduler]:
    """Replace vLLM's sampler and log-prob lists, for every engine of this process; its scheduler is
    to be the one that is returned."""
    TopKTopPSampler.forward_cpu = sample  # type: ignore[method-assign]
    LogprobsProcessor._update_sample_logprobs = append_logprobs  # type: ignore[method-assign]
    return CpuScheduler


# --- the sampler -------------------------------------------------------------------------------

_seeds: WeakKeyDictionary[Generator, Iterator[int]] = WeakKeyDictionary()


def sample(
    self: TopKTopPSampler,
    logits: Tensor,
    generators: dict[int, Generator],
    k: Tensor | None,
    p: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """As TopKTopPSampler.forward_cpu, for generators by row: tokens, and log-probs of them all."""
    if not generators or self.use_fp64_gumbel or self.logprobs_mode != "processed_logprobs":
        return _sample(self, logits, generators, k, p)
    logits = apply_top_k_top_p(logits, k, p)
    logp = logits.log_softmax(dim=-1, dtype=torch.float32)
    seeds = torch.randint(0, 2**31, (len(logits),))
    seeds[list(generators)] = torch.tensor([next_seed(g) for g in generators.values()])
    return torch.ops._C.fused_gumbel_argmax(logits.float(), seeds), logp


def next_seed(generator: Generator) -> int:
    """What torch.randint(0, 2**31, (1,), generator=generator) gives when asked again and again."""
    seeds = _seeds.get(generator)
    seed = None if seeds is None else next(seeds, None)
    if seed is None:
        ahead = torch.randint(0, 2**31, (AHEAD,), generator=generator).tolist()
        _seeds[generator] = seeds = iter(ahead)
        seed = next(seeds)
    return seed


# --- the scheduler -----------------------------------------------------------------------------


@dataclass
class Held:
    """What was drawn of a sequence and has not been told."""

    stop_ids: frozenset[int | None]
    max_tokens: int
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)

    def tell_before(self, output: Any) -> None:
        """Put it before what vLLM tells of the sequence now."""
        if not self.ids:
            return
        last = output.new_logprobs
        ids = np.array(self.ids, last.logprob_token_ids.dtype)[:, None]
        logp = np.array(self.logp, last.logprobs.dtype)[:, None]
        ranks = np.array(self.ranks, last.sampled_token_ranks.dtype)
        output.new_token_ids = [*self.ids, *output.new_token_ids]
        output.new_logprobs = LogprobsLists(
            np.concatenate((ids, last.logprob_token_ids[:, :1])),
            np.concatenate((logp, last.logprobs[:, :1])),
            np.concatenate((ranks, last.sampled_token_ranks)),
        )
        self.ids, self.logp, self.ranks = [], [], []


class CpuScheduler(Scheduler):
    """vLLM's scheduler, with less to do for a sequence that goes on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, Held] = {}  # by request
        self._sick: set[str] = set()  # requests with logits that are not finite
        self._to_clear: list[int] = []  # blocks
        groups = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        if len(groups) == 1 and type(groups[0]) is FullAttentionSpec:
            self._block = groups[0].block_size
            self._allocate = self.kv_cache_manager.allocate_slots
            self.kv_cache_manager.allocate_slots = self._slots  # type: ignore[method-assign]

    def _slots(self, request: Any, num_new_tokens: int, *args: Any, **options: Any) -> Any:
        """allocate_slots, for a token in the middle of a block: there is room, and nothing to put
        in the prefix cache."""
        if num_new_tokens == 1 and 0 < request.num_computed_tokens % self._block < self._block - 1:
            return self.kv_cache_manager.empty_kv_cache_blocks
        return self._allocate(request, num_new_tokens, *args, **options)

    def add_request(self, request: Any) -> None:
        super().add_request(request)
        params = request.sampling_params
        if params is not None and _only_the_end_is_told(request, params):
            self._held[request.request_id] = Held(
                frozenset((params.eos_token_id, *(params.stop_token_ids or ()))),
                min(request.max_tokens, self.max_model_len - request.num_prompt_tokens),
            )

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._find_sick(model_runner_output)
        told = self._hold(scheduler_output.num_scheduled_tokens, model_runner_output)
        held = {name: self._held[name] for name in told if name in self._held}
        outputs = super().update_from_output(
            replace(scheduler_output, num_scheduled_tokens=told), model_runner_output
        )
        for output in (output for of_client in outputs.values() for output in of_client.outputs):
            if output.request_id in held:
                held[output.request_id].tell_before(output)
        return outputs

    def _hold(self, scheduled: dict[str, int], output: Any) -> dict[str, int]:
        """Take in the tokens that end nothing; the others' share of `scheduled`."""
        if output.logprobs is None:
            return scheduled
        logp, ranks = output.logprobs.logprobs[:, 0].tolist(), output.logprobs.sampled_token_ranks
        told = {}
        for name, count in scheduled.items():
            held, request = self._held.get(name), self.requests.get(name)
            row = output.req_id_to_index[name]
            ids = output.sampled_token_ids[row]
            if held is None or request is None or count != 1 or not _goes_on(request, held, ids):
                told[name] = count
                continue
            request.num_in_flight_tokens -= 1
            request.append_output_token_ids(ids[0])
            held.ids.append(ids[0])
            held.logp.append(logp[row])
            held.ranks.append(ranks[row])
        return told

    def _find_sick(self, output: Any) -> None:
        if output.logprobs is None or np.isfinite(output.logprobs.logprobs[:, 0]).all():
            return
        for name, row in output.req_id_to_index.items():
            if not np.isfinite(output.logprobs.logprobs[row, 0]):
                self.mark_sick(name)

    def mark_sick(self, name: str) -> None:
        """What this request has in the cache is cleared as it ends."""
        self._sick.add(name)

    def _free_request_blocks(self, request: Any) -> None:
        if request.request_id in self._sick:
            self._sick.discard(request.request_id)
            groups = self.kv_cache_manager.get_blocks(request.request_id).blocks
            own = [block.block_id for group in groups for block in group if block.ref_cnt == 1]
            self.kv_cache_manager.evict_blocks(set(own))
            self._to_clear += own
        super()._free_request_blocks(request)

    def _get_new_block_ids_to_zero(self) -> list[int] | None:
        own, self._to_clear = self._to_clear, []
        return [*(super()._get_new_block_ids_to_zero() or ()), *own] or None

    def untold(self, name: str) -> tuple[list[int], list[float]]:
        """Tokens and log-probs of a sequence that the output processor does not know of yet."""
        held = self._held.get(name)
        return ([], []) if held is None else (held.ids, held.logp)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._held.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)


def _only_the_end_is_told(request: Any, params: Any) -> bool:
    return (
        params.output_kind == RequestOutputKind.FINAL_ONLY
        and params.logprobs == 0
        and params.min_tokens == 0
        and params.repetition_detection is None
        and not request.resumable
        and not request.use_structured_output
        and not request.has_encoder_inputs
    )


def _goes_on(request: Any, held: Held, ids: list[int]) -> bool:
    """Whether these new tokens are one, neither the sequence's first nor its last."""
    return (
        len(ids) == 1
        and 0 < request.num_output_tokens < held.max_tokens - 1
        and ids[0] not in held.stop_ids
        and request.num_stale_output_tokens == 0
    )


# --- the output --------------------------------------------------------------------------------


def append_logprobs(self: LogprobsProcessor, lists: LogprobsLists) -> None:
    """As LogprobsProcessor._update_sample_logprobs, for the sampled tokens alone."""
    flat = self.logprobs
    if self.tokenizer is not None or self.num_logprobs != 0 or not isinstance(flat, FlatLogprobs):
        return _append(self, lists)
    first, count = len(flat.logprobs), len(lists.logprobs)
    logp = lists.logprobs[:, 0].tolist()
    flat.start_indices.extend(range(first, first + count))
    flat.end_indices.extend(range(first + 1, first + count + 1))
    flat.token_ids.extend(lists.logprob_token_ids[:, 0].tolist())
    flat.logprobs.extend(logp)
    flat.ranks.extend(lists.sampled_token_ranks.tolist())
    flat.decoded_tokens.extend([None] * count)
    self.cumulative_logprob = sum(logp, start=self.cumulative_logprob or 0.0)
