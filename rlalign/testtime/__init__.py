"""Methods that act while a frozen model writes: nothing here takes a gradient of its weights."""

from rlalign.testtime.best_of import best_of
from rlalign.testtime.best_of_n import best_of_n
from rlalign.testtime.decode import decode_reflect
from rlalign.testtime.decode_text import TextJob, decode_text
from rlalign.testtime.drafts import GoalDrafts, SampleDrafts
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.fusion_models import FusedModel
from rlalign.testtime.latent_seek import latent_seek
from rlalign.testtime.logit_fusion import logit_fusion
from rlalign.testtime.majority import majority
from rlalign.testtime.neighbourhoods import (
    Grammar,
    ManhattanBall,
    SpanDelete,
    TopKAlternatives,
)
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.open_fusion import open_fusion
from rlalign.testtime.problem import Problem, UnitMap
from rlalign.testtime.rain import rain
from rlalign.testtime.reflect import Reflector, ReflectResult, Stop
from rlalign.testtime.result import Result
from rlalign.testtime.rewards import FunctionReward, Reward
from rlalign.testtime.self_evaluation import SelfEvaluation, probe_accuracy
from rlalign.testtime.verifier_roles import SelfVerification

__all__ = [
    "DecodeError",
    "FunctionReward",
    "FusedModel",
    "GoalDrafts",
    "Grammar",
    "ManhattanBall",
    "Problem",
    "ReflectResult",
    "Reflector",
    "Result",
    "Reward",
    "SampleDrafts",
    "SelfEvaluation",
    "SelfVerification",
    "SpanDelete",
    "Stop",
    "TextJob",
    "TopKAlternatives",
    "UnitMap",
    "best_of",
    "best_of_n",
    "decode_reflect",
    "decode_text",
    "latent_seek",
    "logit_fusion",
    "majority",
    "open_engine",
    "open_fusion",
    "probe_accuracy",
    "rain",
]
