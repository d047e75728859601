"""What goes to a reward worker or service, as JSON."""

from __future__ import annotations

import json
from typing import Any

from rlalign.rewards.verdict import RewardError


def encode(message: dict[str, Any], who: str) -> bytes:
    """A message as JSON: numpy scalars and arrays as numbers and lists, dates as ISO text.
    RewardError names the value that cannot travel, and `who` takes it."""
    try:
        return json.dumps(message, default=_plain).encode()
    except TypeError as error:
        raise RewardError(
            f"{who} takes a column that cannot travel as JSON: {error}. Drop or convert the "
            "column, or pass the reward as a Python callable"
        ) from error


def _plain(value: Any) -> Any:
    for method in ("tolist", "isoformat"):
        if callable(getattr(value, method, None)):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} {str(value)[:60]!r}")
