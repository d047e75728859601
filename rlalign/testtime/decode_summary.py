"""What came out of a run of `decode_text`, in figures."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field

from rlalign.testtime.decode_rows import Record, slim
from rlalign.testtime.result import BUDGETS
from rlalign.trainer.evaluate import half_width


@dataclass
class Summary:
    """`records` are those of the whole output without their texts; the first `num_held` were there
    before. `wall_s` counts from the start to the newest record."""

    records: list[Record] = field(default_factory=list)
    wall_s: float = 0.0
    num_held: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_held = len(self.records)
        self._began = time.monotonic()

    def add(self, record: Record) -> None:
        self.records.append(slim(record))
        self.wall_s = time.monotonic() - self._began

    @property
    def accuracy(self) -> float | None:
        """The share of right answers; what failed is wrong. None where no row has an answer."""
        right = self._right()
        return sum(right) / len(right) if right else None

    @property
    def nothing_came_of_it(self) -> bool:
        """Whether every row failed, or every text that a reward should have scored."""
        return bool(self.records) and all(
            record["error"] or 0 < record["num_reward_calls"] <= _failed_rewards(record)
            for record in self.records
        )

    def rows(self) -> list[tuple[str, str]]:
        """Names and figures of a run, for a table."""
        rows = self.figures()
        num_new = len(self.records) - self.num_held
        if num_new:
            each = self.wall_s / num_new
            rows.append(("time", f"{self.wall_s:.1f} s, {each:.3f} s a problem"))
        if self.num_held:
            rows.append(("made before", f"{self.num_held}"))
        return rows

    def figures(self) -> list[tuple[str, str]]:
        """Names and figures of the records."""
        records = [record for record in self.records if not record["error"]]
        rows = [("problems", f"{len(self.records)}")]
        rows.append(("errors", f"{len(self.records) - len(records)}"))
        errors = [record["error"] for record in self.records if record["error"]]
        if errors:
            # Those that differ in a name or a number are one.
            kinds = Counter(map(_kind, errors))
            [(kind, times)] = kinds.most_common(1)
            first = next(error for error in errors if _kind(error) == kind)
            rows.append(("commonest error", f"{times} times, first: {first}"))
        right = self._right()
        if right:
            knows = any(record["counters"].get("oracle") for record in records)
            name = "accuracy, by a reward that knows the answer" if knows else "accuracy"
            rows.append((name, f"{sum(right) / len(right):.3f} ± {half_width(right):.3f}"))
        rewards = [record["reward"] for record in records if record["reward"] is not None]
        if rewards:
            rows.append(("reward, mean", f"{sum(rewards) / len(rewards):.3f}"))
        failed = sum(_failed_rewards(record) for record in records)
        if failed:
            first = next(r["reward_error"] for r in records if r.get("reward_error"))
            asked = sum(record["num_reward_calls"] for record in records)
            last = first.strip().splitlines()[-1]  # of a traceback; the record has all of it
            rows.append(("rewards that failed", f"{failed} of {asked}, first: {last}"))
        for name, label in (
            ("num_generated_tokens", "tokens generated"),
            ("num_prefill_tokens", "tokens read"),
            ("num_engine_calls", "requests to the model"),
            ("num_reward_calls", "texts scored"),
        ):
            if records:
                total = sum(record[name] for record in records)
                rows.append((f"{label}, a problem", f"{total / len(records):.1f}"))
        stops = Counter(record["stop_reason"] for record in records)
        rows.append(("stopped", ", ".join(f"{name} {n}" for name, n in stops.most_common()) or "-"))
        over = sum(stops[name] for name in BUDGETS)
        if over:
            rows.append(("best so far, over a budget", f"{over}"))
        return rows

    def _right(self) -> list[float]:
        known = (record.get("right") for record in self.records)
        return [float(right) for right in known if right is not None]


def _failed_rewards(record: Record) -> int:
    return record["counters"].get("failed_rewards", 0)


def _kind(error: str) -> str:
    return re.sub(r"'[^']*'|\d+", "", error)
