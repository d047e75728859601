"""One sequence under repair: the next unit, its candidates, the anchors, what is written anew.

Legend: T columns, U units, C candidates, L columns of a unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.testtime.errors import DecodeError
from rlalign.testtime.neighbourhoods import Candidates, Neighbourhood, Place
from rlalign.testtime.rating import Judge, Rating
from rlalign.testtime.session import Search, Session

Completion = Callable[[Tensor, Tensor, int], Tensor]
WIDER = 1.5  # reach of the neighbourhood once a sequence has come back


@dataclass(frozen=True, slots=True)
class Edit:
    """One repair: what a unit held and holds now, and all tokens after it with their rating. Where
    nothing changed, no edit was worth making.

    `moved` is the candidate that was chosen, before the model wrote what surrounds it anew; None
    where there was none, or where the model writes each candidate's surroundings.
    """

    unit: int
    old: tuple[int, ...]
    new: tuple[int, ...]
    ids: tuple[int, ...]
    rating: Rating
    moved: tuple[int, ...] | None = None
    moved_rating: Rating | None = None


def check_completion(completion: str | Completion) -> None:
    """Raises DecodeError for what is neither `keep` nor `model` nor a function."""
    if completion not in ("keep", "model") and not callable(completion):
        raise DecodeError(
            f"completion={completion!r}: choose keep, model, or give a function (ids_CT, before_T, "
            "unit) -> ids_CT"
        )


class Repairs:
    """A sequence and what has been tried with it. `cycles` once it keeps coming back."""

    def __init__(
        self,
        session: Session,
        judge: Judge,
        neighbourhood: Neighbourhood,
        completion: str | Completion,
        ids_T: Tensor,
        rating: Rating,
    ) -> None:
        self.session, self.judge, self.config = session, judge, session.config
        self.neighbourhood, self.completion = neighbourhood, completion
        self.units = session.problem.units
        self.ids_T, self.rating = ids_T, rating
        self.anchors: dict[int, Tensor] = {}  # unit -> tokens [L], the oldest first
        self.tried: set[int] = set()  # units of which no edit changes this sequence
        self.reach, self.cycles = 1.0, False
        self._repeats = 0
        self._seen = {_tokens(ids_T)}

    def anchor(self, unit: int, ids_T: Tensor) -> None:
        """Fix what `ids_T` has at `unit`; it becomes the newest anchor."""
        self.anchors = self._anchors_beside(unit) | {unit: ids_T[list(self.units.columns[unit])]}

    def next_unit(self) -> int | None:
        """The violated unit that comes first and can be edited."""
        free_T = self.session.free_T
        open_units = [
            unit
            for unit in self.rating.violated
            if unit not in self.tried and bool(free_T[list(self.units.columns[unit])].any())
        ]
        if self.config.order == "worst":
            open_units.sort(key=lambda unit: self.rating.safe[unit])
        return open_units[0] if open_units else None

    def repair(self, iteration: int) -> Search[Edit]:
        """Try to mend the next unit, which must exist."""
        unit = self.next_unit()
        assert unit is not None
        columns_L = self.units.positions(unit).to(self.ids_T.device)
        place = Place(self.ids_T, columns_L, self.session.free_T[columns_L], self.reach)
        moved_T, moved_rating = None, None
        candidates = yield from self.neighbourhood.propose(self.session, place)
        if candidates is None:
            found = yield from self._rewrite(unit, None, iteration)
        elif not len(candidates):
            found = self.ids_T, self.rating
            self.tried.add(unit)
        elif self.completion == "model":
            found = yield from self._choose_written(unit, place, candidates, iteration)
        else:
            chosen_T, chosen_rating = self._choose(unit, place, candidates)
            token_L = chosen_T[columns_L]
            if torch.equal(token_L, place.current_L):
                found = self.ids_T, self.rating
                self.tried.add(unit)
            else:
                moved_T, moved_rating = chosen_T, chosen_rating
                found = yield from self._rewrite(unit, token_L, iteration)
        self._move(unit, *found, is_anchored=candidates is not None)
        old, new = _tokens(place.current_L), _tokens(self.ids_T[columns_L])
        moved = None if moved_T is None else _tokens(moved_T)
        return Edit(unit, old, new, _tokens(self.ids_T), self.rating, moved, moved_rating)

    def _choose(self, unit: int, place: Place, candidates: Candidates) -> tuple[Tensor, Rating]:
        """The best candidate, each completed cheaply: a sequence [T] and its rating."""
        ids_CT = self._complete(unit, place, candidates)
        ratings = self.judge(ids_CT)
        best = self._best(unit, ratings, candidates.cost_C)
        finer = self.neighbourhood.refine(place, candidates.ids_CL[best])
        if finer is not None:
            more_CT = self._complete(unit, place, finer)
            ids_CT, ratings = torch.cat([ids_CT, more_CT]), ratings + self.judge(more_CT)
            best = self._best(unit, ratings, torch.cat([candidates.cost_C, finer.cost_C]))
        return ids_CT[best], ratings[best]

    def _choose_written(
        self, unit: int, place: Place, candidates: Candidates, iteration: int
    ) -> Search[tuple[Tensor, Rating]]:
        """The best candidate with the rest written anew around it, and its rating."""
        ids_CT, ratings = yield from self._write(unit, candidates, iteration)
        best = self._best(unit, ratings, candidates.cost_C)
        finer = self.neighbourhood.refine(place, candidates.ids_CL[best])
        if finer is not None:
            more_CT, more = yield from self._write(unit, finer, iteration, first=len(candidates))
            ids_CT, ratings = torch.cat([ids_CT, more_CT]), ratings + more
            best = self._best(unit, ratings, torch.cat([candidates.cost_C, finer.cost_C]))
        return ids_CT[best], ratings[best]

    def _write(
        self, unit: int, candidates: Candidates, iteration: int, first: int = 0
    ) -> Search[tuple[Tensor, list[Rating]]]:
        rows_CT = self._blank(unit).repeat(len(candidates), 1)
        rows_CT[:, list(self.units.columns[unit])] = candidates.ids_CL
        filled = yield from self.session.fill(rows_CT, iteration, self.config.temperature, first)
        return filled.ids_BT, self.judge(filled.ids_BT)

    def _rewrite(
        self, unit: int, token_L: Tensor | None, iteration: int
    ) -> Search[tuple[Tensor, Rating]]:
        """What the model writes around `token_L` (None: there too), and its rating."""
        row_T = self._blank(unit)
        if token_L is not None:
            row_T[list(self.units.columns[unit])] = token_L
        filled = yield from self.session.fill(row_T[None], iteration, self.config.temperature)
        return filled.ids_BT[0], self.judge(filled.ids_BT)[0]

    def _complete(self, unit: int, place: Place, candidates: Candidates) -> Tensor:
        """Whole sequences [C, T] that hold the candidates; givens and the unit are as they were
        put there, whatever a function of the domain does."""
        rows_CT = place.ids_T.repeat(len(candidates), 1)
        rows_CT[:, place.columns_L] = candidates.ids_CL
        if not callable(self.completion):
            return rows_CT
        completed_CT = self.completion(rows_CT.clone(), place.ids_T.clone(), unit)
        if completed_CT.shape != rows_CT.shape:
            raise DecodeError(
                f"the completion gave shape {list(completed_CT.shape)} for {list(rows_CT.shape)}: "
                "it must return a sequence for each that it is given"
            )
        free_T = self.session.free_T.clone()
        free_T[place.columns_L] = False
        return torch.where(free_T, completed_CT, rows_CT)

    def _best(self, unit: int, ratings: list[Rating], cost_C: Tensor) -> int:
        """The candidate to take, by the local objective."""
        radius, plain = self.config.local_radius, self.config.objective == "plain"
        around = slice(max(0, unit - radius), unit + radius + 1)

        def value(index: int) -> tuple[float, ...]:
            rating = ratings[index]
            tie = (rating.score, -float(cost_C[index]), -index)
            return tie if plain else (min(rating.safe[around]), *tie)

        return max(range(len(ratings)), key=value)

    def _blank(self, unit: int) -> Tensor:
        """The sequence with all masked that is to be written anew, and the anchors in it."""
        row_T = self.ids_T.clone()
        row_T[self._rewritten(unit) & self.session.free_T] = self.session.mask_id
        for other, token_L in self._anchors_beside(unit).items():
            row_T[list(self.units.columns[other])] = token_L
        return row_T

    def _rewritten(self, unit: int) -> Tensor:
        """Columns of the units to be written anew, and of no unit among or after them: bool [T]."""
        num, radius, length = len(self.units), self.config.window_radius, len(self.ids_T)
        first, last = {
            "suffix": (max(0, unit - 1), num - 1),
            "window": (max(0, unit - radius), min(num - 1, unit + radius)),
            "all": (0, num - 1),
        }[self.config.regen]
        chosen = {column for u in range(first, last + 1) for column in self.units.columns[u]}
        start = 0 if self.config.regen == "all" else min(chosen)
        stop = max(chosen) + 1 if self.config.regen == "window" else length
        taken = {column for columns in self.units for column in columns}
        chosen |= set(range(start, stop)) - taken
        mask_T = torch.zeros(length, dtype=torch.bool, device=self.ids_T.device)
        mask_T[sorted(chosen)] = True
        return mask_T

    def _anchors_beside(self, unit: int) -> dict[int, Tensor]:
        """The other anchors; the newest, where one more would be too many."""
        others = [(other, tokens) for other, tokens in self.anchors.items() if other != unit]
        limit = self.config.max_anchors
        return dict(others[max(0, len(others) - limit + 1) :] if limit else others)

    def _move(self, unit: int, ids_T: Tensor, rating: Rating, is_anchored: bool) -> None:
        """Go on with `ids_T`, and notice when that leads nowhere. With a temperature a sequence may
        come back by chance: nothing is concluded from it."""
        is_greedy = self.config.temperature == 0
        if torch.equal(ids_T, self.ids_T):
            if is_greedy:
                self.tried.add(unit)
            return
        if is_anchored:
            self.anchor(unit, ids_T)
        self.tried.clear()
        self.ids_T, self.rating = ids_T, rating
        if is_greedy and _tokens(ids_T) in self._seen:
            self._break_cycle()
        self._seen.add(_tokens(ids_T))

    def _break_cycle(self) -> None:
        """Look farther once, then let the oldest anchor go, then give up."""
        self._repeats += 1
        if self._repeats == 1:
            self.reach = WIDER
        elif self._repeats == 2 and len(self.anchors) > 1:
            self.anchors.pop(next(iter(self.anchors)))
        else:
            self.cycles = True


def _tokens(ids: Tensor) -> tuple[int, ...]:
    return tuple(ids.tolist())
