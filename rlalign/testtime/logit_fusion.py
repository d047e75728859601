"""Dynamic logit fusion: a large model is moved at every token as far as a small expert moved from
its own base (Fan et al., https://arxiv.org/abs/2406.15480, algorithm 1).

    read the prompt in the large model M, the small base S and the experts S_t
    at every token
        for strengths a of the grid (one expert at a time):
            P_a = softmax(M + a (S_t - S));  L(a) = by how much it and the expert moved differently
        draw the token from P_a at the first minimiser of L, and append it in every model

The search is kernels/alpha_search.py; strengths are compared anew at every token (the listing sets
its running minimum once before the loop, which would freeze the strength). It looks at the
distributions at temperature 1; temperature and top-p come after the fusion.

With `speculate` the first expert writes tokens ahead, which the others read in one pass each:
fusion_draw.py. What a row is, and how tokens are added to it: fusion_rows.py. Where the large model
runs in vLLM, that is what steps: fusion_vllm.py.

Shapes: B rows, K = D + 1 places: D drafted tokens and the one after them, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlalign.config.testtime import FusionConfig
from rlalign.errors import RlalignError
from rlalign.rollout.decoding import PREFILL_TOKENS, REFILL_SHARE, survivors
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.sampling import sample
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.fusion_models import FusedModel, LockStep
from rlalign.testtime.fusion_rows import Row, advance, enter, grid, make_row_result, new_row
from rlalign.testtime.fusion_vllm import FusedVllm, decode_on_vllm
from rlalign.testtime.prompt import Given, Prompt
from rlalign.testtime.result import Result, failed_result
from rlalign.testtime.run import settings

DRAFTER = 2  # the first expert among the models


def logit_fusion(
    fused: FusedModel,
    prompts: Sequence[Given],
    config: FusionConfig | None = None,
    *,
    chat: bool | None = None,
    system: str = "",
    on_done: Callable[[int, Result], None] | None = None,
    **options: Any,
) -> list[Result]:
    """An answer to each prompt, in order; `options` are those of FusionConfig. `trace` holds the
    strength at each token and the expert that it belongs to (-1: none), `counters` how many drafts
    were kept and how many log-ratios bounded. A prompt that cannot be served, or for which a
    model's logits are not numbers, gives a result with `error`.

    Raises DecodeError for options that these models cannot follow.

    >>> logit_fusion(fused, ["84-9+8=?"], speculate=4)                         # doctest: +SKIP
    """
    cfg = settings(FusionConfig, config, options)
    check(cfg, num_experts=fused.num_experts, backend=fused.backend)
    results: dict[int, Result] = {}

    def finish(index: int, result: Result) -> None:
        results[index] = result
        if on_done is not None:
            on_done(index, result)

    waiting: list[Row] = []
    for index, given in enumerate(prompts):
        try:
            waiting.append(new_row(fused, given, index, cfg, chat, system))
        except RlalignError as error:
            finish(index, failed_result(Prompt(str(index), (), ""), error))
    on_vllm = isinstance(fused, FusedVllm)
    for row in decode_on_vllm(fused, waiting, cfg) if on_vllm else decode(fused, waiting, cfg):
        finish(row.index, make_row_result(fused, row))
    return [results[index] for index in range(len(prompts))]


def decode(fused: FusedModel, waiting: Sequence[Row], cfg: FusionConfig) -> Iterator[Row]:
    """Rows as they end. Those that wait enter as others leave, the longest prompt first."""
    if not waiting:
        return
    queue = deque(sorted(waiting, key=lambda row: -row.length))
    longest = max(row.length + min(row.limit + cfg.speculate, row.room) for row in queue)
    strengths = grid(cfg)
    rows: list[Row] = []
    with fused.decoding(longest) as step:
        _check_rewinds(cfg, step)
        while queue or rows:
            entering = _entering(queue, len(rows), fused.max_batch_size, step.refills)
            if entering:
                ids = [[prompt.ids for prompt in row.prompts] for row in entering]
                logits = torch.stack(step.admit(ids))
                for row in entering:
                    enter(row, cfg)
                rows += entering
                advance(entering, logits, [[] for _ in entering], cfg, strengths, fused)
            else:
                logits, drafts = _read(step, rows, cfg, len(fused.members))
                kept = advance(rows, logits, drafts, cfg, strengths, fused)
                step.rewind([len(draft) - n for draft, n in zip(drafts, kept, strict=True)])
            if any(row.finish_reason for row in rows):
                yield from [row for row in rows if row.finish_reason]
                index = survivors(rows)
                step.keep(index)
                rows = [rows[i] for i in index]


def _read(
    step: LockStep, rows: Sequence[Row], cfg: FusionConfig, num_models: int
) -> tuple[Tensor, list[list[int]]]:
    """Append the last token of every row, and what the first expert goes on with, in every model:
    logits [models, B, K, V] and the drafts."""
    last = [[row.tokens[-1]] for row in rows]
    drafts: list[list[int]] = [[] for _ in rows]
    ahead = min(
        cfg.speculate,
        min(row.room - len(row.tokens) for row in rows),
        max(row.limit - len(row.tokens) for row in rows) - 1,
    )
    params = SamplingParams(1, cfg.temperature, cfg.top_p)
    own: list[Tensor] = []
    tokens = last
    for place in range(ahead + 1 if ahead else 0):
        own.append(step.read(tokens, [DRAFTER])[DRAFTER])
        if place < ahead:
            seed_B = own[-1].new_tensor([row.seeds[1] for row in rows], dtype=torch.long)
            step_B = seed_B.new_tensor([len(row.tokens) + place for row in rows])
            drawn_B, _ = sample(own[-1][:, 0], seed_B, step_B, params)
            tokens = [[token] for token in drawn_B.tolist()]
            for draft, new in zip(drafts, tokens, strict=True):
                draft += new
    whole = [[*token, *draft] for token, draft in zip(last, drafts, strict=True)]
    others = [model for model in range(num_models) if model != DRAFTER or not own]
    found = step.read(whole, others)
    if own:
        found[DRAFTER] = torch.cat(own, 1)
    return torch.stack([found[model] for model in range(num_models)]), drafts


def _entering(queue: deque[Row], active: int, max_batch_size: int, refills: bool) -> list[Row]:
    """Remove from the queue what can enter now beside `active` rows: a few at a time, since prompts
    that are read together cost less."""
    free = max_batch_size - active
    if active and (not refills or free * REFILL_SHARE < max_batch_size):
        return []
    entering: list[Row] = []
    while queue and len(entering) < free:
        if entering and (len(entering) + 1) * entering[0].length > PREFILL_TOKENS:
            break
        entering.append(queue.popleft())
    return entering


def check(cfg: FusionConfig, *, num_experts: int, backend: str) -> None:
    """Raises DecodeError for options that do not go together, or not with these models."""
    if cfg.alpha_min > cfg.alpha_max:
        raise DecodeError(
            f"alpha_min={cfg.alpha_min} is above alpha_max={cfg.alpha_max}: no strength is left"
        )
    if cfg.joint and num_experts != 2:
        raise DecodeError(f"joint=true is for two experts, there are {num_experts}")
    if cfg.speculate and backend == "vllm":
        raise DecodeError("speculate is for backend=hf: vLLM takes one token of a step")
    if cfg.speculate and not num_experts:
        raise DecodeError("speculate needs an expert, which writes ahead; there is none")


def _check_rewinds(cfg: FusionConfig, step: LockStep) -> None:
    if cfg.speculate and not step.rewinds:
        raise DecodeError(
            "speculate needs models that can take tokens back; one of these has a window, a "
            "recurrent state, or shares its weights with another by adapters: leave it out"
        )
