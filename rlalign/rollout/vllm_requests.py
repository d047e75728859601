"""What vLLM is asked for one sequence, and how its answer is read.

`FlatLogprobs` hold several log-probs for a position where several were asked for: the sampled
token's first, then the others'.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.hf import NOT_FINITE
from rlalign.rollout.search import Top

LATENTS_FROM = "latents_from"  # in extra_args: the first token whose hidden state is kept


def drawing(params: SamplingParams, seed: int, eos_ids: Collection[int], vocab: int) -> Any:
    """To draw one sequence with `seed`. `drawn_top` reads the likeliest tokens."""
    stop = set() if params.ignore_eos else {*eos_ids, *params.stop_token_ids}
    return _vllm_params(
        seed=_vllm_seed(seed),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_completion_length,
        stop_token_ids=sorted(stop),
        logprobs=min(params.num_top, vocab),  # beside the sampled token's
    )


def scoring(last_token: int) -> Any:
    """To score a sequence of which vLLM gets all but the last token. That one is scored as a
    continuation: vLLM wants room to generate one, and so a sequence of the greatest length still
    fits. `sequence_logp` reads the scores."""
    return _vllm_params(
        temperature=0.0, max_tokens=1, prompt_logprobs=0, logprob_token_ids=[last_token]
    )


def choosing(options: Sequence[int]) -> Any:
    """For the log-probs of these next tokens; `chosen` reads them."""
    return _vllm_params(temperature=0.0, max_tokens=1, logprob_token_ids=list(options))


def capturing(start: int) -> Any:
    """To keep what the head reads to predict tokens from `start` on (vllm_latents.py)."""
    return _vllm_params(
        temperature=0.0,
        max_tokens=1,
        logprobs=0,
        skip_reading_prefix_cache=True,  # the cache has no hidden states
        extra_args={LATENTS_FROM: start - 1},
    )


def following(max_tokens: int) -> Any:
    """To append tokens that are chosen elsewhere (vllm_choose.py)."""
    return _vllm_params(temperature=0.0, max_tokens=max_tokens)


def sampled_logp(logprobs: Any) -> list[float]:
    """Log-probs of the tokens that were sampled, from a completion's `logprobs`."""
    if len(logprobs.logprobs) == len(logprobs):
        return logprobs.logprobs
    return [logprobs.logprobs[first] for first in logprobs.start_indices]


def drawn_top(completion: Any) -> tuple[Top, ...]:
    """The likeliest tokens of each step with their log-probs, likeliest first, without those that
    could not be drawn; empty where none were asked for."""
    flat = completion.logprobs
    if len(flat.logprobs) == len(flat):
        return ()
    return tuple(
        _sorted_top(flat.token_ids[first + 1 : end], flat.logprobs[first + 1 : end])
        for first, end in zip(flat.start_indices, flat.end_indices, strict=True)
    )


def chosen(output: Any, options: Sequence[int]) -> tuple[float, ...]:
    """The log-probs that were asked for with `choosing`, in order. Raises EngineError where the
    logits were not finite."""
    likeliest, *logp = output.outputs[0].logprobs.logprobs
    if not math.isfinite(likeliest):
        raise EngineError(NOT_FINITE)
    return tuple(logp[: len(options)])


def sequence_logp(output: Any) -> list[float]:
    """Of the tokens from 1 on of a scored sequence: the prompt's, then the continuation's."""
    return [*output.prompt_logprobs.logprobs, output.outputs[0].logprobs.logprobs[-1]]


def _sorted_top(ids: Sequence[int], logp: Sequence[float]) -> Top:
    pairs = [pair for pair in zip(ids, logp, strict=True) if pair[1] > -math.inf]
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def _vllm_params(**options: Any) -> Any:
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    return VllmParams(
        ignore_eos=True,  # the stop tokens say it all
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
        **options,
    )


def _vllm_seed(seed: int) -> int:
    """Every bit of `seed` in the lower 32, which are all that torch's CPU generator reads
    (splitmix64: Steele, Lea and Flood, OOPSLA 2014)."""
    mask = 2**64 - 1
    mixed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & mask
    return (mixed ^ (mixed >> 31)) >> 1
