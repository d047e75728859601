"""The run as it happens: a live panel in a terminal, one line a step anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

SPARKS = "▁▂▃▄▅▆▇█"
STAGES = ("rollout", "reward", "logp", "backward", "step", "sync")
STAGES_AHEAD = ("wait", "logp", "backward", "step", "sync")  # rollouts run beside them
STAGES_OFFLINE = ("logp", "backward", "step")  # the data holds the completions


def stages_of(figures: Mapping[str, float]) -> tuple[str, ...]:
    """What a step's time is made of."""
    if "time/rollout_s" not in figures:
        return STAGES_OFFLINE
    return STAGES_AHEAD if "time/wait_s" in figures else STAGES


class PlainView:
    """One line a step: for logs and pipes."""

    def __init__(self, name: str, max_steps: int) -> None:
        self._console = Console(soft_wrap=True, highlight=False)
        self._max_steps = max_steps
        self._console.print(f"run {name}: {max_steps} steps")

    def stage(self, text: str) -> None:
        if text.startswith("evaluation"):
            self._console.print(text)

    def step(self, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        self._console.print(step_line(figures, self._max_steps))

    def finish(self, result: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def step_line(figures: Mapping[str, float], max_steps: int) -> str:
    """`step 12/80  reward 0.531  entropy 0.31  length 22.4  5100 tokens/s  2.1 s (...)`"""
    total = max(figures["time/total_s"], 1e-9)
    shares = ((stage, figures[f"time/{stage}_s"] / total) for stage in stages_of(figures))
    split = ", ".join(f"{stage} {100 * share:.0f}%" for stage, share in shares if share > 0.02)
    entropy = f"  entropy {figures['entropy']:.3f}" if "entropy" in figures else ""
    held_out = "".join(
        f"  {name} {value:.3f}" for name, value in figures.items() if name.endswith("pass@1")
    )
    length = ""
    if "completions/mean_length" in figures:
        length = f"length {figures['completions/mean_length']:.1f}  "
    rate = figures.get("perf/rollout_tokens_per_s", figures["perf/train_tokens_per_s"])
    return (
        f"step {int(figures['step'])}/{max_steps}  reward {figures['reward']:.3f}{entropy}  "
        f"{length}{rate:.0f} {unit(figures)}/s  {total:.2f} s ({split}){held_out}"
    )


def unit(figures: Mapping[str, float]) -> str:
    """What goes through the model: tokens, or states of a flow model."""
    return "tokens" if "completions/mean_length" in figures else "states"


class LiveView:
    """Progress, reward and entropy curves, tokens/s, time split, one sample."""

    def __init__(self, name: str, max_steps: int) -> None:
        self._name = name
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task(name, total=max_steps)
        self._rewards: list[float] = []
        self._figures: Mapping[str, float] = {}
        self._sample: Mapping[str, Any] = {}
        self._stage, self._since = "starting", time.monotonic()
        self._live = Live(get_renderable=self._render, refresh_per_second=4)
        self._live.start()

    def stage(self, text: str) -> None:
        self._stage, self._since = text, time.monotonic()

    def step(self, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        self._figures = figures
        self._rewards.append(figures["reward"])
        self._sample = rows[int(figures["step"]) % len(rows)] if rows else {}
        self._progress.update(self._task, completed=int(figures["step"]))

    def finish(self, result: Mapping[str, Any]) -> None:
        self._stage, self._since = "done", time.monotonic()

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Panel:
        waited = time.monotonic() - self._since
        parts: list[Any] = [self._progress, Text(f"{self._stage}  {waited:.0f} s", style="dim")]
        if self._figures:
            parts += [self._table(), self._example()]
        return Panel(Group(*parts), title=self._name)

    def _table(self) -> Table:
        figures = self._figures
        table = Table.grid(padding=(0, 2))
        table.add_row("reward", f"{figures['reward']:.3f}", sparkline(self._rewards))
        if "entropy" in figures:
            table.add_row("entropy", f"{figures['entropy']:.3f}", "nats a token")
        if "completions/mean_length" in figures:
            table.add_row(
                "length",
                f"{figures['completions/mean_length']:.1f}",
                f"tokens, {100 * figures['completions/clipped_ratio']:.0f}% cut off",
            )
        if "perf/rollout_tokens_per_s" in figures:
            table.add_row(
                "rollout", f"{figures['perf/rollout_tokens_per_s']:.0f}", f"{unit(figures)}/s"
            )
        table.add_row("training", f"{figures['perf/train_tokens_per_s']:.0f}", f"{unit(figures)}/s")
        total = max(figures["time/total_s"], 1e-9)
        shares = ((s, figures[f"time/{s}_s"] / total) for s in stages_of(figures))
        split = "  ".join(f"{stage} {100 * share:.0f}%" for stage, share in shares if share > 0.005)
        table.add_row("step", f"{total:.2f} s", split)
        return table

    def _example(self) -> Text:
        row = self._sample
        if not row:
            return Text()
        reward = "unscored" if row["reward"] is None else f"{row['reward']:.2f}"
        text = Text(f"\nreward {reward}, advantage {row['advantage']:+.2f}\n", style="bold")
        text.append(_shorten(str(row["prompt"])), style="cyan")
        text.append(_shorten(row["completion"]))
        return text


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last `width` values as a line of block characters; gaps where a value is not a number."""
    values = list(values)[-width:]
    known = [value for value in values if value == value]
    if not known:
        return ""
    low, spread = min(known), max(known) - min(known) or 1.0
    steps = len(SPARKS) - 1
    return "".join(
        " " if value != value else SPARKS[round((value - low) / spread * steps)] for value in values
    )


def _shorten(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."
