"""Which edits of a violated unit are tried.

    ManhattanBall       tokens that are points of a scale: all within a distance, or a coarse
                        lattice and then the surroundings of its best point
    TopKAlternatives    what the model holds likeliest there, the unit masked
    Grammar             an enumerated set: digits, operators
    SpanDelete          none: the unit is only masked and written anew

Candidates never change a given token of the unit. Each has a cost, by which ties are decided.

Legend: C candidates, L columns of the unit, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlalign.models.masked_diffusion import MaskedModel
from rlalign.testtime.beam import beam
from rlalign.testtime.errors import DecodeError, check_at_least
from rlalign.testtime.session import Search, Session

REFINED = 2  # radius around the best point of a lattice


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """The unit to be edited, in its sequence `ids_T`."""

    ids_T: Tensor
    columns_L: Tensor
    free_L: Tensor  # bool: False where the token is given
    reach: float = 1.0  # how much farther than usual to look

    @property
    def current_L(self) -> Tensor:
        return self.ids_T[self.columns_L]


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Tokens for a unit, each row once."""

    ids_CL: Tensor  # int64
    cost_C: Tensor  # the lower is preferred where nothing else decides

    def __len__(self) -> int:
        return len(self.ids_CL)


class Neighbourhood(Protocol):
    def propose(self, session: Session, place: Place) -> Search[Candidates | None]:
        """Candidates, or None where the unit is to be masked and written anew."""
        ...

    def refine(self, place: Place, best_L: Tensor) -> Candidates | None:
        """More candidates, once the best of the first is known."""
        ...


@dataclass(frozen=True, slots=True)
class ManhattanBall:
    """All units with sum_i |token_i - current_i| <= delta; of 2 columns 2 delta^2 + 2 delta + 1.

    Tokens are `first_id` to `first_id` + `num_values` - 1; what lies beyond is clipped. `stride`
    > 0 tries only multiples of it and even steps along the axes, then the ball of radius 2 around
    the best: of 2 columns with delta 10 and stride 3, 41 + 13 instead of 221. Raises DecodeError
    for a value out of range.
    """

    num_values: int
    delta: int = 10
    first_id: int = 0
    stride: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, num_values=self.num_values)
        check_at_least(0, delta=self.delta, first_id=self.first_id, stride=self.stride)

    def propose(self, session: Session, place: Place) -> Search[Candidates | None]:
        yield from ()
        offsets = _ball(len(place.columns_L), int(self.delta * place.reach), self.stride)
        return self._around(place, place.current_L, offsets)

    def refine(self, place: Place, best_L: Tensor) -> Candidates | None:
        if not self.stride:
            return None
        return self._around(place, best_L, _ball(len(best_L), REFINED, 0))

    def _around(self, place: Place, centre_L: Tensor, offsets: Tensor) -> Candidates:
        last = self.first_id + self.num_values - 1
        ids_CL = (centre_L + offsets.to(centre_L.device)).clamp(self.first_id, last)
        ids_CL = torch.where(place.free_L, ids_CL, place.current_L)
        return _distinct(ids_CL, (ids_CL - place.current_L).abs().sum(1))


@dataclass(frozen=True, slots=True)
class TopKAlternatives:
    """The `k` likeliest fillings of the masked unit; of several columns by a beam of width `k`,
    which costs a forward pass a column. Likelier ones cost less. Raises DecodeError for k < 1."""

    k: int = 8

    def __post_init__(self) -> None:
        check_at_least(1, k=self.k)

    def propose(self, session: Session, place: Place) -> Search[Candidates | None]:
        columns = place.columns_L[place.free_L].tolist()
        k = int(self.k * place.reach)
        found_CL, _ = yield from beam(session, place.ids_T, columns, width=k, keep=k)
        ids_CL = place.current_L.repeat(len(found_CL), 1)
        ids_CL[:, place.free_L] = found_CL
        return Candidates(ids_CL, torch.arange(len(ids_CL), device=ids_CL.device))

    def refine(self, place: Place, best_L: Tensor) -> Candidates | None:
        return None


@dataclass(frozen=True, slots=True)
class Grammar:
    """Enumerated fillings of a unit, each as many tokens as the unit has columns; those that
    contradict a given are left out. The current one costs least, the others as they come. Raises
    DecodeError for no alternatives."""

    alternatives: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if not len(self.alternatives):
            raise DecodeError("a grammar without alternatives tries nothing: give one at least")

    def propose(self, session: Session, place: Place) -> Search[Candidates | None]:
        yield from ()
        current_L, size = place.current_L, len(place.columns_L)
        if any(len(row) != size for row in self.alternatives):
            raise DecodeError(
                f"a unit of {size} columns needs alternatives of {size} tokens: split the unit, or "
                "give a neighbourhood for each length"
            )
        rows = torch.tensor(self.alternatives, device=current_L.device).view(-1, size)
        fits_C = ((rows == current_L) | place.free_L).all(1)
        rank_C = torch.arange(1, len(rows) + 1, device=rows.device)
        cost_C = rank_C.masked_fill((rows == current_L).all(1), 0)
        return _distinct(rows[fits_C], cost_C[fits_C])

    def refine(self, place: Place, best_L: Tensor) -> Candidates | None:
        return None


@dataclass(frozen=True, slots=True)
class SpanDelete:
    """No candidates: reject and write anew, the baseline. Needs a temperature, or a sequence that
    is not what the model holds likeliest; else the same tokens come back."""

    def propose(self, session: Session, place: Place) -> Search[Candidates | None]:
        yield from ()
        return None

    def refine(self, place: Place, best_L: Tensor) -> Candidates | None:
        return None


def check_tokens(neighbourhood: Neighbourhood, model: MaskedModel) -> None:
    """Raises DecodeError where candidates would hold the mask, or what is no token of the model."""
    if isinstance(neighbourhood, Grammar):
        tokens = {token for row in neighbourhood.alternatives for token in row}
    elif isinstance(neighbourhood, ManhattanBall):
        first = neighbourhood.first_id
        tokens = set(range(first, first + neighbourhood.num_values))
    else:
        return
    for token in sorted(tokens):
        if token == model.mask_id or not 0 <= token < model.vocab_size:
            raise DecodeError(
                f"the {type(neighbourhood).__name__} tries token {token}; the model's are 0 to "
                f"{model.vocab_size - 1} without its mask, {model.mask_id}: leave it out"
            )


@functools.cache
def _ball(size: int, radius: int, stride: int) -> Tensor:
    """Offsets [C, size] of Manhattan norm <= radius; with a stride multiples of it, and even steps
    along the axes."""
    step = stride or 1
    axis = range(-(radius // step) * step, radius + 1, step)
    points = {p for p in itertools.product(axis, repeat=size) if sum(map(abs, p)) <= radius}
    if stride:
        for i, distance in itertools.product(range(size), range(2, radius + 1, 2)):
            points |= {tuple(sign * distance * (j == i) for j in range(size)) for sign in (-1, 1)}
    return torch.tensor(sorted(points, key=lambda point: (sum(map(abs, point)), point)))


def _distinct(ids_CL: Tensor, cost_C: Tensor) -> Candidates:
    """Each row once, where it comes first, the cheapest rows first."""
    rows: dict[tuple[int, ...], int] = {}
    for index, row in enumerate(ids_CL.tolist()):
        rows.setdefault(tuple(row), index)
    kept = torch.tensor(list(rows.values()), dtype=torch.int64, device=ids_CL.device)
    kept = kept[cost_C[kept].argsort(stable=True)]
    return Candidates(ids_CL[kept], cost_C[kept])
