"""Methods that act while a frozen model writes: nothing here takes a gradient of its weights."""

from rlalign.testtime.best_of import best_of
from rlalign.testtime.decode import decode_reflect
from rlalign.testtime.drafts import GoalDrafts, SampleDrafts
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.neighbourhoods import (
    Grammar,
    ManhattanBall,
    SpanDelete,
    TopKAlternatives,
)
from rlalign.testtime.problem import Problem, UnitMap
from rlalign.testtime.reflect import Reflector, ReflectResult, Stop

__all__ = [
    "DecodeError",
    "GoalDrafts",
    "Grammar",
    "ManhattanBall",
    "Problem",
    "ReflectResult",
    "Reflector",
    "SampleDrafts",
    "SpanDelete",
    "Stop",
    "TopKAlternatives",
    "UnitMap",
    "best_of",
    "decode_reflect",
]
