"""The answers of logit fusion in the making: what a row is, how tokens are added to it, and the
result that it becomes.

Shapes: B rows, K = D + 1 places: D drafted tokens and the one after them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlalign.config.testtime import FusionConfig
from rlalign.rollout.seeds import sample_seed
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.fusion_draw import Places, fuse_and_draw
from rlalign.testtime.fusion_models import FusedModel
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Given, Prompt, plain_text
from rlalign.testtime.result import Result, failed_result, make_result
from rlalign.testtime.run import new_ledger
from rlalign.types import FINISH_LENGTH, FINISH_STOP

REFINEMENT = 10  # strengths in place of one, with `alpha_refine`
FAILED = "failed"


@dataclass(slots=True)
class Row:
    """One answer in the making. `room`: how many tokens the contexts leave; `limit`: how many may
    be written. `seeds`: of its tokens, of drafts, of whether drafts are kept."""

    index: int
    prompts: list[Prompt]
    room: int
    limit: int
    seeds: list[int]
    ledger: Ledger
    tokens: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: str = ""
    error: str = ""

    @property
    def length(self) -> int:
        """Of the longest of its prompts."""
        return max(len(prompt.ids) for prompt in self.prompts)


def new_row(
    fused: FusedModel,
    given: Given,
    index: int,
    cfg: FusionConfig,
    chat: bool | None,
    system: str,
) -> Row:
    """A row that waits. Raises DecodeError or EngineError for a prompt that cannot be served."""
    prompts = fused.prompts(given, index, chat=chat, system=system)
    room = fused.room(prompts)
    seeds = [sample_seed(cfg.seed, prompts[0].id, i, 0) for i in range(3)]
    ledger = new_ledger(cfg)
    limit = ledger.left(min(cfg.max_new_tokens, room))
    return Row(index, prompts, room, limit, seeds, ledger)


def enter(row: Row, cfg: FusionConfig) -> None:
    """Its prompts are read from now on: time and tokens begin to count."""
    row.ledger = new_ledger(cfg)
    row.ledger.num_prefill_tokens = sum(len(prompt.ids) for prompt in row.prompts)


def grid(cfg: FusionConfig) -> list[float]:
    """The strengths that are tried, ascending."""
    step = cfg.alpha_step / (REFINEMENT if cfg.alpha_refine else 1)
    count = int((cfg.alpha_max - cfg.alpha_min) / step + 1e-6)
    return [round(cfg.alpha_min + i * step, 10) for i in range(count + 1)]


def advance(
    rows: Sequence[Row],
    logits: Tensor,
    drafts: Sequence[Sequence[int]],
    cfg: FusionConfig,
    strengths: Sequence[float],
    fused: FusedModel,
) -> list[int]:
    """Append to every row the drafts that stand and the token after them; how many stood."""
    places = fuse_and_draw(
        logits,
        drafts,
        torch.tensor([row.seeds for row in rows], device=logits.device),
        torch.tensor([len(row.tokens) for row in rows], device=logits.device),
        cfg,
        strengths,
    )
    kept = []
    for i, row in enumerate(rows):
        ahead = len(drafts[i])
        row.ledger.num_engine_calls += len(logits) + ahead
        row.ledger.counters["drafted"] += ahead
        count = _extend(row, i, drafts[i], places, fused)
        row.ledger.counters["kept"] += count
        if not row.finish_reason and row.ledger.over():
            row.finish_reason, row.stop_reason = FINISH_LENGTH, row.ledger.over()
        kept.append(count)
    return kept


def _extend(row: Row, i: int, draft: Sequence[int], places: Places, fused: FusedModel) -> int:
    """Append to one row; how many drafts stood."""
    for k in range(len(draft) + 1):
        if places.odd_BK[i][k] >= 0:
            row.finish_reason = FAILED
            row.error = (
                f"the logits of {fused.names[places.odd_BK[i][k]]} are not finite after "
                f"{len(row.tokens)} tokens of the answer: its weights are damaged or overflow; "
                "load it in float32, or take another checkpoint"
            )
            return k
        stands = k < len(draft) and places.stands_BD[i][k]
        row.tokens.append(draft[k] if stands else places.token_BK[i][k])
        row.alphas.append(round(places.alpha_BK[i][k], 6))
        row.experts.append(places.expert_BK[i][k])
        row.ledger.num_generated_tokens += 1
        row.ledger.counters["bounded"] += places.bounded_BK[i][k]
        if row.tokens[-1] in fused.eos_ids:
            row.finish_reason = row.stop_reason = FINISH_STOP
        elif len(row.tokens) == row.limit:
            row.finish_reason = FINISH_LENGTH
            row.stop_reason = row.ledger.over() or FINISH_LENGTH
        if row.finish_reason or not stands:
            return k + stands
    return len(draft)


def make_row_result(fused: FusedModel, row: Row) -> Result:
    """Of a row that is over; one that failed has its account all the same."""
    if row.error:
        return failed_result(row.prompts[0], DecodeError(row.error), row.ledger)
    return make_result(
        row.prompts[0],
        row.ledger,
        text=plain_text(fused.tokenizer, row.tokens),
        token_ids=row.tokens,
        finish=row.finish_reason,
        stop_reason=row.stop_reason,
        trace={"method": "logit_fusion", "alphas": row.alphas, "experts": row.experts},
    )
