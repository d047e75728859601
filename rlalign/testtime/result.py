"""What every method on a language model returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Prompt

BUDGETS = ("max_tokens", "max_wall_s", "max_total_searches")  # reasons to stop before the end


@dataclass(frozen=True, slots=True)
class Result:
    """One answer and what it cost.

    `finish` is that of the text ("stop", or "length": cut off), `stop_reason` why the search ended:
    the name of a budget, or what the method calls it. `reward` is what the search thinks of the
    answer; None where nothing was scored. `trace` holds what a page draws, as JSON; `counters` what
    else is worth knowing, by name. `reward_error` is the first of `counters["failed_rewards"]`
    failures of the reward. `error` is set, and all else empty, where the prompt could not be
    served.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish: str
    stop_reason: str
    reward: float | None
    num_generated_tokens: int
    num_prefill_tokens: int
    num_engine_calls: int
    num_reward_calls: int
    wall_s: float
    counters: dict[str, float] = field(default_factory=dict)
    trace: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    reward_error: str = ""

    @property
    def over_budget(self) -> bool:
        """Whether a budget ended the search: the answer is the best so far."""
        return self.stop_reason in BUDGETS

    def to_json(self) -> dict[str, Any]:
        """The record as JSON; a reward that is no finite number is null."""
        reward = self.reward
        finite = reward is not None and math.isfinite(reward)
        record = {**dataclasses.asdict(self), "reward": reward if finite else None}
        return {**record, "token_ids": list(self.token_ids)}


def make_result(
    prompt: Prompt,
    ledger: Ledger,
    *,
    text: str,
    token_ids: Sequence[int],
    finish: str,
    stop_reason: str,
    reward: float | None = None,
    trace: dict[str, Any] | None = None,
) -> Result:
    """The result of a search, with its account."""
    return Result(
        id=prompt.id,
        text=text,
        token_ids=tuple(token_ids),
        finish=finish,
        stop_reason=stop_reason,
        reward=None if reward is None or math.isnan(reward) else reward,
        num_generated_tokens=ledger.num_generated_tokens,
        num_prefill_tokens=ledger.num_prefill_tokens,
        num_engine_calls=ledger.num_engine_calls,
        num_reward_calls=ledger.num_reward_calls,
        wall_s=ledger.wall_s,
        counters=dict(ledger.counters),
        trace=trace or {},
        reward_error=ledger.reward_error,
    )


def failed_result(prompt: Prompt, error: Exception, ledger: Ledger | None = None) -> Result:
    """The result for a prompt that could not be served, with what was spent on it."""
    result = make_result(
        prompt, ledger or Ledger(), text="", token_ids=(), finish="error", stop_reason="error"
    )
    return dataclasses.replace(result, error=f"{type(error).__name__}: {error}")
