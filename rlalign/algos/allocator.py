"""Who gets how many samples, step by step: the state of GVM and CurES over one shard of prompts.

    allocator = make_allocator(cfg)
    allocator.begin(stats)                      # after the pilot of a shard
    shares = allocator.plan(num_prompts, seed)  # for each step
    allocator.observe(shares, right)            # after its rollouts

Pure: it holds small tensors, is a JSON object in a checkpoint (`state_dict`), and the same state
and seed give the same shares.

Legend: m prompts of the shard, k prompts of a step; float64.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlalign.algos import cures, gvm
from rlalign.algos.allocate import allocate, variance_ratio
from rlalign.algos.errors import AlgoError
from rlalign.algos.pilot import PilotStats

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


@dataclass(frozen=True, slots=True)
class Shares:
    """One step: positions in the shard, samples of each, and how much each prompt counts."""

    index_k: list[int]
    count_k: list[int]
    weight_k: list[float]


class Allocator(ABC):
    """What GVM and CurES have in common: a shard, its pilot, and a budget."""

    def __init__(self, cfg: AlgoConfig) -> None:
        """cfg: resolved."""
        self.cfg, self.section = cfg, cfg.allocation
        self.stats: PilotStats | None = None
        self.fallbacks = 0

    def begin(self, stats: PilotStats) -> None:
        self.stats = stats

    @abstractmethod
    def plan(self, num_prompts: int, seed: int) -> Shares:
        """What the next `num_prompts` prompts get."""

    @abstractmethod
    def observe(self, shares: Shares, right_k: Sequence[int]) -> None:
        """`right_k`: accepted samples of each prompt of the step."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Figures of the shard, docs/metrics.md."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as JSON."""
        stats = self.stats
        tensors = {} if stats is None else dataclasses.asdict(stats)
        stats_as_lists = {name: x.tolist() for name, x in tensors.items()}
        return {"stats": stats_as_lists, "fallbacks": self.fallbacks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.fallbacks = state["fallbacks"]
        if state["stats"]:
            tensors = {name: _tensor(x) for name, x in state["stats"].items()}
            self.stats = PilotStats(**tensors)

    def budget(self, num_prompts: int) -> int:
        return round(self.section.budget_per_prompt * num_prompts)

    def _shared(self, weight_m: Tensor, rate_m: Tensor, budget: int) -> Tensor:
        """Whole numbers of samples; where all weights are 0, what `on_empty` says. What
        `max_samples` leaves no prompt to spend on is not spent."""
        section, unit = self.section, self.section.group_size or 1
        if not bool((weight_m > 0).any()):
            self.fallbacks += 1
            if section.on_empty == "skip":
                return torch.zeros(len(weight_m), dtype=torch.long)
            weight_m = torch.ones_like(weight_m)
        if section.max_samples is not None:
            taking = int((weight_m > 0).sum())
            room = taking * (section.max_samples // unit)
            room += (len(weight_m) - taking) * math.ceil(section.min_samples / unit)
            budget = min(budget, room * unit)
        return allocate(
            weight_m,
            budget,
            section.rounding,
            low=section.min_samples,
            high=section.max_samples,
            unit=unit,
            accept_rate_m=rate_m,
        )


class GvmAllocator(Allocator):
    """All of a shard's samples are given out after its pilot; steps take prompts in order."""

    def __init__(self, cfg: AlgoConfig) -> None:
        super().__init__(cfg)
        self._weight_m = self._count_m = torch.zeros(0)
        self._taken = 0

    def begin(self, stats: PilotStats) -> None:
        stats = stats.shrunk(self.section.rate_prior)
        super().begin(stats)
        budget, rate_m = self.budget(len(stats.right_m)), stats.rate_m
        self._weight_m = gvm.filtered(
            gvm.weights(stats, self.section), rate_m, budget, self.section
        )
        self._count_m = self._shared(self._weight_m, rate_m, budget)
        self._taken = 0

    def plan(self, num_prompts: int, seed: int) -> Shares:
        assert self.stats is not None
        index_k = list(range(self._taken, min(self._taken + num_prompts, len(self._count_m))))
        self._taken += len(index_k)
        count_k = [int(self._count_m[i]) for i in index_k]
        if self.cfg.prompt_weighting != "inverse_propensity":
            return Shares(index_k, count_k, [1.0] * len(index_k))
        rate_m = self.stats.rate_m.clamp(min=1 / float(self.stats.num_samples_m.max()))
        weight_k = [1 / max(n, 1) / float(rate_m[i]) for i, n in zip(index_k, count_k, strict=True)]
        return Shares(index_k, count_k, weight_k)

    def observe(self, shares: Shares, right_k: Sequence[int]) -> None:
        """The shares of a shard are its pilot's; what its steps find changes none."""

    def metrics(self) -> dict[str, float]:
        assert self.stats is not None
        count_m = self._count_m.double()
        return {
            "allocation/accept_rate": float(self.stats.rate_m.mean()),
            "allocation/predicted_variance_ratio": variance_ratio(self._weight_m),
            "allocation/frac_without_samples": float((count_m == 0).double().mean()),
            "allocation/max_samples": float(count_m.max()),
            "allocation/fallbacks": float(self.fallbacks),
        }

    def state_dict(self) -> dict[str, Any]:
        own = {"weight": self._weight_m.tolist(), "count": self._count_m.tolist()}
        return super().state_dict() | own | {"taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._weight_m, self._count_m = _tensor(state["weight"]), _tensor(state["count"]).long()
        self._taken = state["taken"]


class CuresAllocator(Allocator):
    """Every step draws prompts of the shard by what is known now, and shares its own samples."""

    def __init__(self, cfg: AlgoConfig) -> None:
        super().__init__(cfg)
        self._right_m = self._wrong_m = torch.zeros(0, dtype=torch.float64)
        self._effective = float("nan")

    def begin(self, stats: PilotStats) -> None:
        super().begin(stats)
        self._right_m = stats.right_m.double()
        self._wrong_m = stats.num_samples_m.double() - self._right_m

    def plan(self, num_prompts: int, seed: int) -> Shares:
        assert self.stats is not None
        rate_m = cures.posterior_mean(self._right_m, self._wrong_m)
        rho_m = cures.sampling_probs(rate_m, self.section.tau)
        self._effective = 1 / float((rho_m**2).sum()) / len(rho_m)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(rho_m, num_prompts, replacement=True, generator=generator)
        times = Counter(drawn.tolist())
        index_k = sorted(times)
        sigma_k = cures.weights(self.stats, rate_m, self.section)[index_k]
        times_k = torch.tensor([float(times[i]) for i in index_k])
        count_k = self._shared(times_k * sigma_k, rate_m[index_k], self.budget(num_prompts))
        by_prompt = self.cfg.prompt_weighting == "prompt"
        weight_k = times_k if by_prompt else torch.ones_like(times_k)
        if self.section.importance:
            weight_k = weight_k / (len(rho_m) * rho_m[index_k])
        return Shares(index_k, count_k.tolist(), weight_k.tolist())

    def observe(self, shares: Shares, right_k: Sequence[int]) -> None:
        at = torch.tensor(shares.index_k, dtype=torch.long)
        count_k, right = _tensor(shares.count_k), _tensor(right_k)
        self._right_m = self._right_m.index_add(0, at, right)
        self._wrong_m = self._wrong_m.index_add(0, at, count_k - right)

    def metrics(self) -> dict[str, float]:
        rate_m = cures.posterior_mean(self._right_m, self._wrong_m)
        return {
            "allocation/accept_rate": float(rate_m.mean()),
            "allocation/effective_share_of_prompts": self._effective,
            "allocation/fallbacks": float(self.fallbacks),
        }

    def state_dict(self) -> dict[str, Any]:
        own = {"right": self._right_m.tolist(), "wrong": self._wrong_m.tolist()}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._right_m, self._wrong_m = _tensor(state["right"]), _tensor(state["wrong"])


def pilot_weight(cfg: AlgoConfig) -> float:
    """How much a pilot group counts beside its prompt's own group: `pilot_weight` N'/b where
    prompts are weighed; where samples are, a group counts by their number."""
    section = cfg.allocation
    by_prompt = cfg.prompt_weighting == "prompt"
    share = section.num_pilot_samples / section.budget_per_prompt if by_prompt else 1.0
    return section.pilot_weight * share


def needs_mean_gradients(cfg: AlgoConfig) -> bool:
    """Whether norms of mean gradients are needed besides those of single samples."""
    section = cfg.allocation
    if section.allocator == "cures":
        return section.compat == "paper"
    return section.grad_stat == "exact"


ALLOCATORS = {"gvm": GvmAllocator, "cures": CuresAllocator}


def make_allocator(cfg: AlgoConfig) -> Allocator:
    """The allocator of a resolved config. Raises AlgoError for uniform, which is none."""
    chosen = ALLOCATORS.get(cfg.allocation.allocator or "")
    if chosen is None:
        raise AlgoError(
            f"algo.allocation.allocator={cfg.allocation.allocator!r} is none of "
            f"{', '.join(ALLOCATORS)}; pass the config through rlalign.algos.resolve first"
        )
    return chosen(cfg)


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
