"""Methods that act while a frozen model writes: nothing here takes a gradient of its weights."""

from rlalign.testtime.best_of import best_of
from rlalign.testtime.best_of_n import best_of_n
from rlalign.testtime.decode import decode_reflect
from rlalign.testtime.decode_text import TextJob, decode_text
from rlalign.testtime.drafts import GoalDrafts, SampleDrafts
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.majority import majority
from rlalign.testtime.neighbourhoods import (
    Grammar,
    ManhattanBall,
    SpanDelete,
    TopKAlternatives,
)
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.problem import Problem, UnitMap
from rlalign.testtime.reflect import Reflector, ReflectResult, Stop
from rlalign.testtime.result import Result
from rlalign.testtime.rewards import FunctionReward, Reward

__all__ = [
    "DecodeError",
    "FunctionReward",
    "GoalDrafts",
    "Grammar",
    "ManhattanBall",
    "Problem",
    "ReflectResult",
    "Reflector",
    "Result",
    "Reward",
    "SampleDrafts",
    "SpanDelete",
    "Stop",
    "TextJob",
    "TopKAlternatives",
    "UnitMap",
    "best_of",
    "best_of_n",
    "decode_reflect",
    "decode_text",
    "majority",
    "open_engine",
]
