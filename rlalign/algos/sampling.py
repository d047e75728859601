"""Dynamic sampling: roll out until enough groups carry signal (DAPO, arXiv 2503.14476).

    sampler = DynamicSampler(prompts_per_step, cfg)
    while sampler.needed:
        groups = roll_out(sampler.next_prompts)
        selection = sampler.feed([acc of each sample of the group for each group])
        batch += [groups[i] for i in selection.kept]

The sampler holds only counts, so it is checkpointed as a small JSON object, and it never waits:
after `max_num_gen_batches` rollouts it stops, with an error that says what was seen or, under
`on_exhausted=train`, with the groups found.

Filter on the unshaped correctness (`metric=acc`): after overlong shaping a group that is all
correct has a non-zero spread of rewards and nothing to teach.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlalign.algos.errors import AlgoError

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


class SamplingExhausted(AlgoError):
    """Too few groups carry signal and the rollout budget is spent."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Positions in the round just fed: `kept` join the batch; `surplus` carry signal but the batch
    is full; all others carry none."""

    kept: tuple[int, ...]
    surplus: tuple[int, ...]


@dataclass(slots=True)
class Counts:
    """Groups by outcome. `solved` and `failed`: every sample correct, none correct."""

    rounds: int = 0
    generated: int = 0
    kept: int = 0
    surplus: int = 0
    solved: int = 0
    failed: int = 0
    unscorable: int = 0
    empty: int = 0  # an allocator gave the prompt no sample
    value_sum: float = 0.0  # over groups with a usable value: the mean value of the group
    value_min: float = math.inf
    value_max: float = -math.inf


def has_signal(
    values: Iterable[float], *, tie_tol: float = 1e-8, singleton_advantage: str = "zero"
) -> bool:
    """Whether a group's values (NaN and inf left out) are not all equal.

    A group of one has none, unless `singleton_advantage` is raw, which gives it its own reward.
    """
    usable = _usable(values)
    if len(usable) < 2:
        return bool(usable) and singleton_advantage == "raw"
    low, high = min(usable), max(usable)
    return high - low > tie_tol * max(abs(low), abs(high))


class DynamicSampler:
    """Counts rollouts and groups of one training step until `target` groups carry signal."""

    def __init__(self, target: int, cfg: AlgoConfig) -> None:
        """target: groups wanted, >= 1. cfg: resolved; with `filter_groups.enable=false` every
        group is kept."""
        self.target = target
        self._cfg = cfg
        self._counts = Counts()

    @property
    def exhausted(self) -> bool:
        """The budget is spent with groups still missing."""
        spent = self._counts.rounds >= self._cfg.filter_groups.max_num_gen_batches
        return spent and self._counts.kept < self.target

    @property
    def needed(self) -> int:
        """Groups still to be found; 0 once full or out of budget."""
        return 0 if self.exhausted else self.target - self._counts.kept

    @property
    def next_prompts(self) -> int:
        """How many prompts to roll out next: at the kept share seen so far, as many as should
        fill the batch, and never more than `target`."""
        share = (self._counts.kept + self._counts.surplus + 1) / (self._counts.generated + 1)
        return min(self.target, math.ceil(self.needed / share))

    def feed(self, values_of_group: Sequence[Iterable[float]]) -> Selection:
        """Take one rollout: for each group the values of the metric, one a sample.

        Raises SamplingExhausted when the budget is spent, groups are missing and `on_exhausted` is
        error; AlgoError when nothing was needed.
        """
        if not self.needed:
            raise AlgoError("dynamic sampling: a rollout was fed after the batch was complete")
        with_signal = [i for i, values in enumerate(values_of_group) if self._judge(values)]
        kept, surplus = with_signal[: self.needed], with_signal[self.needed :]
        self._counts.rounds += 1
        self._counts.generated += len(values_of_group)
        self._counts.kept += len(kept)
        self._counts.surplus += len(surplus)
        if self.exhausted and self._cfg.filter_groups.on_exhausted == "error":
            raise SamplingExhausted(self.describe())
        return Selection(tuple(kept), tuple(surplus))

    def describe(self) -> str:
        """What was seen and what could be changed, in one message."""
        c, metric = self._counts, self._cfg.filter_groups.metric
        scored = c.generated - c.unscorable - c.empty
        seen = "no group had a usable value"
        if scored:
            seen = (
                f"mean {metric} of a group: {c.value_sum / scored:.3f} on average, "
                f"{c.value_min:.3f} to {c.value_max:.3f}"
            )
        return (
            f"dynamic sampling found {c.kept} of {self.target} groups with signal in {c.rounds} "
            f"rollouts of {c.generated} groups: {c.solved} all 1, {c.failed} all 0, "
            f"{c.unscorable} without a usable {metric}, {c.empty} without samples; {seen}. "
            f"{self._advice()}"
        )

    def metrics(self) -> dict[str, float]:
        """Generated against used groups, so that the cost of sampling again is not hidden."""
        c = self._counts
        return {
            "sampling/rounds": float(c.rounds),
            "sampling/groups_generated": float(c.generated),
            "sampling/groups_used": float(c.kept),
            "sampling/frac_groups_solved": c.solved / max(c.generated, 1),
            "sampling/frac_groups_failed": c.failed / max(c.generated, 1),
        }

    def state_dict(self) -> dict[str, float]:
        """Everything needed to go on, as finite JSON numbers."""
        state = dataclasses.asdict(self._counts)
        return {key: value for key, value in state.items() if math.isfinite(value)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict`. Raises AlgoError for keys it does not know."""
        known = {field.name: type(field.default) for field in dataclasses.fields(Counts)}
        unknown = sorted(set(state) - set(known))
        if unknown:
            raise AlgoError(f"dynamic sampling state has unknown keys: {', '.join(unknown)}")
        values = {key: known[key](value) for key, value in state.items()}
        self._counts = Counts(**values)  # type: ignore[arg-type]

    def _judge(self, values: Iterable[float]) -> bool:
        values, c = list(values), self._counts
        usable = _usable(values)
        if usable:
            mean = sum(usable) / len(usable)
            c.value_sum += mean
            c.value_min, c.value_max = min(c.value_min, mean), max(c.value_max, mean)
            c.solved += min(usable) == 1
            c.failed += max(usable) == 0
        elif values:
            c.unscorable += 1
        else:
            c.empty += 1
        if not self._cfg.filter_groups.enable:
            return True
        return has_signal(
            usable,
            tie_tol=self._cfg.reward_tie_tol,
            singleton_advantage=self._cfg.singleton_advantage,
        )

    def _advice(self) -> str:
        c = self._counts
        if c.unscorable > c.generated / 2:
            return "The reward gives no value for most samples: look at rewards/errors first."
        if c.empty > c.generated / 2:
            return (
                "The allocator gives most prompts no sample: raise algo.allocation.rate_prior or "
                "num_pilot_samples, or leave algo.filter_groups out."
            )
        common = "raise algo.num_generations or algo.filter_groups.max_num_gen_batches, or set "
        common += "algo.filter_groups.on_exhausted=train"
        if c.solved > c.failed:
            return f"The prompts are too easy for this policy: give harder ones, {common}."
        return f"The prompts are too hard for this policy: give easier ones, {common}."


def _usable(values: Iterable[float]) -> list[float]:
    return [value for value in map(float, values) if math.isfinite(value)]
