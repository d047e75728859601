"""First sequences, of which the best is repaired.

    SampleDrafts    n samples, or the greedy one
    GoalDrafts      goal-conditioned generation (arXiv 2509.20109, equations 2 and 3): the likeliest
                    values of one unit that lie apart from each other, and the rest given each

Legend: K drafts, T columns, L columns of the goal unit, C candidates for the goal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlalign.testtime.beam import beam
from rlalign.testtime.errors import DecodeError, check_at_least
from rlalign.testtime.session import Search, Session

STEP = 0  # of the random numbers; repairs count from 1


@dataclass(frozen=True, slots=True, eq=False)
class Drafted:
    """Complete sequences. `alone` is the row the model writes greedily by itself, if it is there;
    `goal` the unit of any other row that stays fixed in repairs, if any."""

    ids_KT: Tensor  # int64
    logp_K: Tensor  # float32: the sum over the tokens that were filled
    goal: int | None = None
    alone: int | None = None


class Drafts(Protocol):
    def draft(self, session: Session) -> Search[Drafted]: ...


@dataclass(frozen=True, slots=True)
class SampleDrafts:
    """`num` samples at `temperature`; the default is the greedy sequence alone. Raises DecodeError
    for num < 1."""

    num: int = 1
    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(1, drafts=self.num)

    def draft(self, session: Session) -> Search[Drafted]:
        rows_KT = session.problem.canvas.ids_BT.repeat(self.num, 1)
        filled = yield from session.fill(rows_KT, STEP, self.temperature)
        alone = 0 if self.temperature == 0 else None
        return Drafted(filled.ids_BT, filled.logp_BT.sum(1), alone=alone)


@dataclass(frozen=True, slots=True)
class GoalDrafts:
    """At most `num` greedy sequences, each around another goal, which is a value of unit `unit`;
    `with_greedy` the one without a goal too, so that the best is never below it.

    Of the `num_pairs` likeliest values those are taken, in order of probability, that are at least
    `min_distance` from all taken before (0: all). A distance is `spacing` times the Euclidean one
    of the token ids, for a vocabulary whose neighbours are `spacing` apart. `joint` says how the
    unit's columns are combined: `chain`, with `width` values of each kept on the way, or
    `independent`. `keep_goal` makes the goal the first anchor of repairs.

    Raises DecodeError for num, num_pairs or width < 1, and for a joint that is neither.
    """

    num: int = 3
    unit: int = -1
    spacing: float = 1.0
    min_distance: float = 0.9
    num_pairs: int = 40
    width: int = 12
    joint: str = "chain"
    keep_goal: bool = False
    with_greedy: bool = True

    def __post_init__(self) -> None:
        check_at_least(1, drafts=self.num, num_pairs=self.num_pairs, width=self.width)
        if self.joint not in ("chain", "independent"):
            raise DecodeError(f"joint={self.joint!r}: choose chain or independent")

    def draft(self, session: Session) -> Search[Drafted]:
        """Raises DecodeError where the problem has no unit `unit`."""
        units, blank_T = session.problem.units, session.problem.canvas.ids_BT[0]
        if not -len(units) <= self.unit < len(units):
            raise DecodeError(
                f"unit={self.unit}: choose a goal unit of {-len(units)} to {len(units) - 1}"
            )
        unit = self.unit % len(units)
        columns = [column for column in units.columns[unit] if session.free_T[column]]
        if not columns:
            return (yield from SampleDrafts().draft(session))
        goal_CL, logp_C = yield from beam(
            session, blank_T, columns, width=self.width, keep=self.num_pairs, joint=self.joint
        )
        kept = suppress(goal_CL.double() * self.spacing, self.min_distance, self.num)
        num_alone = int(self.with_greedy)
        rows_KT = blank_T.repeat(num_alone + len(kept), 1)
        rows_KT[num_alone:, columns] = goal_CL[kept]
        filled = yield from session.fill(rows_KT, STEP)
        logp_K = filled.logp_BT.sum(1)
        logp_K[num_alone:] += logp_C[kept]
        goal, alone = unit if self.keep_goal else None, 0 if self.with_greedy else None
        return Drafted(filled.ids_BT, logp_K, goal, alone)


def suppress(point_CL: Tensor, min_distance: float, num: int) -> Tensor:
    """Greedy non-maximum suppression: indices, int64, of at most `num` points, each the first that
    is at least `min_distance` (Euclidean, to within 1e-9) from all taken before it."""
    kept: list[int] = []
    for index in range(len(point_CL)):
        if len(kept) == num:
            break
        gap = torch.linalg.vector_norm(point_CL[kept] - point_CL[index], dim=1)
        if bool((gap >= min_distance - 1e-9).all()):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64, device=point_CL.device)
