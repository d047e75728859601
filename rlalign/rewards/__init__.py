"""How good a sample is: reward functions, verifiers, sandboxed code, reward models, judges.

Names load on first use, because the worker processes import this package and must start fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.rewards.preflight import check
    from rlalign.rewards.registry import BUILTINS
    from rlalign.rewards.scorer import Scorer, build_scorer
    from rlalign.rewards.verdict import RewardError, Verdict, VerdictKind

_HOME = {
    "BUILTINS": "registry",
    "RewardError": "verdict",
    "Scorer": "scorer",
    "Verdict": "verdict",
    "VerdictKind": "verdict",
    "build_scorer": "scorer",
    "check": "preflight",
}

__all__ = [
    "BUILTINS",
    "RewardError",
    "Scorer",
    "Verdict",
    "VerdictKind",
    "build_scorer",
    "check",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
