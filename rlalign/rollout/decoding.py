"""Continuous batching: which rows are decoded together, from prompt to last token.

    queue of groups ─ admit (prompt read once, cache repeated) ─▶ rows ─ step ─ sample ─┐
                                                                   ▲                     │
                            rows that go on  ◀─ finished ones leave ┴─────────────────────┘

How logits are made is the `Decoder`'s business; what is drawn depends on a row's own seed and
prompt alone, so the order of the queue and the size of the batch change nothing but the speed.

Shapes: B rows being decoded, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from rlalign.rollout.engine import GenerateRequest, SamplingParams
from rlalign.rollout.sampling import likeliest, pick, uniform
from rlalign.types import FINISH_LENGTH, FINISH_STOP

PREFILL_TOKENS = (
    8192  # prompt tokens, padding included, in one forward pass: bounds its activations
)
FAILED = "failed"  # a row whose logits were not finite
AHEAD = 16  # random numbers of a row that are made together
REFILL_SHARE = 4  # prompts join once a quarter of the rows is free: fewer, larger prefills


class Decoder(Protocol):
    """A model with a cache of B rows."""

    refills: bool  # `admit` works while rows are being decoded; else only with none

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> torch.Tensor:
        """Read each prompt once and append `copies[i]` rows for it to the cache. Next-token logits
        of the new rows, [new rows, V]."""
        ...

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to every row; next-token logits [B, V]."""
        ...

    def keep(self, index: Sequence[int]) -> None:
        """Row i becomes what row `index[i]` was; the others are dropped."""
        ...


class RewindingDecoder(Decoder, Protocol):
    """One that reads several tokens at once and takes them back."""

    @property
    def rewinds(self) -> bool:
        """Whether `rewind` works for this model."""
        ...

    def extend(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append N tokens to every row; logits after each, [B, N, V]."""
        ...

    def rewind(self, counts: Sequence[int]) -> None:
        """Row i forgets its last `counts[i]` tokens, all of them appended since the last `rewind`
        or `keep`."""
        ...


@dataclass(slots=True)
class Row:
    """One completion in the making."""

    seed: int
    limit: int  # tokens
    params: SamplingParams  # one object for all rows that are drawn alike
    stop_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    uniforms: list[float] = field(default_factory=list)  # of its next tokens, the last one first
    finish_reason: str = ""


@dataclass(frozen=True, slots=True)
class Admission:
    """Rows of one prompt that enter together."""

    prompt: tuple[int, ...]
    rows: list[Row]


def decode(
    decoder: Decoder,
    requests: Sequence[GenerateRequest],
    params: SamplingParams,
    eos_ids: frozenset[int],
    max_batch_size: int,
    device: torch.device,
) -> list[list[Row]]:
    """One row per seed of each request, in order, all finished: those whose logits were not finite
    with the reason FAILED, and none of the tokens that this made."""
    completions: list[list[Row]] = []
    kinds: dict[SamplingParams, SamplingParams] = {}
    ways: dict[SamplingParams, tuple[SamplingParams, frozenset[int]]] = {}
    for request in requests:
        own = request.limited(params)
        if own not in ways:
            kind = _kind(own)
            stop_ids = frozenset() if own.ignore_eos else eos_ids | set(own.stop_token_ids)
            ways[own] = kinds.setdefault(kind, kind), stop_ids
        kind, stop_ids = ways[own]
        completions.append(
            [Row(seed, own.max_completion_length, kind, stop_ids) for seed in request.seeds]
        )
    queue = plan(requests, completions, max_batch_size)
    rows: list[Row] = []
    while queue or rows:
        entering = take(queue, len(rows), max_batch_size, decoder.refills)
        if entering:
            new = [row for admission in entering for row in admission.rows]
            logits_BV = decoder.admit(
                [admission.prompt for admission in entering],
                [len(admission.rows) for admission in entering],
            )
            rows += new
        else:
            new = rows
            logits_BV = decoder.step([row.tokens[-1] for row in rows])
        draw(new, logits_BV, device)
        if any(row.finish_reason for row in new):
            index = survivors(rows)
            decoder.keep(index)
            rows = [rows[i] for i in index]
    return completions


def plan(
    requests: Sequence[GenerateRequest], completions: Sequence[list[Row]], max_batch_size: int
) -> deque[Admission]:
    """The rows of each prompt, in pieces of at most `max_batch_size`, longest prompt first: prompts
    read together are then of similar length, and the last ones to enter are the quickest."""
    rows_of: dict[tuple[int, ...], list[Row]] = {}
    for request, rows in zip(requests, completions, strict=True):
        rows_of.setdefault(tuple(request.token_ids), []).extend(rows)
    queue = []
    for prompt, rows in rows_of.items():
        for start in range(0, len(rows), max_batch_size):
            queue.append(Admission(prompt, rows[start : start + max_batch_size]))
    return deque(sorted(queue, key=lambda admission: -len(admission.prompt)))


def take(
    queue: deque[Admission], active: int, max_batch_size: int, refills: bool
) -> list[Admission]:
    """Remove from the queue what can enter now, beside `active` rows."""
    free = max_batch_size - active
    waiting = bool(queue) and (refills or active == 0)
    if not waiting or (active and free * REFILL_SHARE < max_batch_size):
        return []
    entering: list[Admission] = []
    while queue and len(queue[0].rows) <= free:
        # The first prompt is the longest, so it sets the width of them all.
        if entering and (len(entering) + 1) * len(entering[0].prompt) > PREFILL_TOKENS:
            break
        entering.append(queue.popleft())
        free -= len(entering[-1].rows)
    return entering


def tensor_of(values: Sequence[int] | Sequence[float], device: torch.device) -> torch.Tensor:
    """As torch.tensor, by way of NumPy: four times as fast."""
    return torch.from_numpy(np.array(values)).to(device)


def draw(rows: Sequence[Row], logits_BV: torch.Tensor, device: torch.device) -> None:
    """Append one token to each row, and the reason where it ends there."""
    kinds: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        kinds.setdefault(id(row.params), []).append(i)
    if len(kinds) == 1:
        return _draw_alike(rows, logits_BV, device)
    for index in kinds.values():
        own_BV = logits_BV.index_select(0, tensor_of(index, device))
        _draw_alike([rows[i] for i in index], own_BV, device)


def _kind(params: SamplingParams) -> SamplingParams:
    """What is left of `params` when rows differ in nothing but their ends."""
    return replace(params, max_completion_length=1, stop_token_ids=(), ignore_eos=False)


def _draw_alike(rows: Sequence[Row], logits_BV: torch.Tensor, device: torch.device) -> None:
    params = rows[0].params
    token_B, logp_B = pick(
        logits_BV, _uniforms(rows, device) if params.temperature else None, params
    )
    if params.num_top:
        tops = likeliest(logits_BV, params)
        for row, top in zip(rows, tops, strict=True):
            row.tops.append(top)
    for row, token, logp in zip(rows, token_B.tolist(), logp_B.tolist(), strict=True):
        if math.isnan(logp):
            row.finish_reason = FAILED
            continue
        row.tokens.append(token)
        row.logps.append(logp)
        if token in row.stop_ids:
            row.finish_reason = FINISH_STOP
        elif len(row.tokens) == row.limit:
            row.finish_reason = FINISH_LENGTH


def _uniforms(rows: Sequence[Row], device: torch.device) -> torch.Tensor:
    """The random number of each row's next token. Rows hold some ahead: a number by itself costs a
    dozen small operations."""
    short = [row for row in rows if not row.uniforms]
    if short:
        count = min(AHEAD, max(row.limit - len(row.tokens) for row in short))
        seed_B, step_B = (
            tensor_of(values, device)
            for values in ([row.seed for row in short], [len(row.tokens) for row in short])
        )
        step_BN = step_B[:, None] + torch.arange(count - 1, -1, -1, device=device)
        for row, values in zip(short, uniform(seed_B[:, None], step_BN).tolist(), strict=True):
            row.uniforms = values
    return tensor_of([row.uniforms.pop() for row in rows], device)


class Ending(Protocol):
    """A row, as far as its end matters."""

    @property
    def finish_reason(self) -> str: ...


def survivors(rows: Sequence[Ending]) -> list[int]:
    """Indices of the unfinished rows, the last of them in the gaps: few rows change place."""
    alive = [i for i, row in enumerate(rows) if not row.finish_reason]
    movers = [i for i in alive if i >= len(alive)]
    return [i if not rows[i].finish_reason else movers.pop() for i in range(len(alive))]
