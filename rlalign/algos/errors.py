"""What can go wrong in the choice or the use of an algorithm."""

from __future__ import annotations

from rlalign.errors import RlalignError


class AlgoError(RlalignError, ValueError):
    """A setting or an input that makes no sense; the message names the key, the reason and the
    fix."""


class AlgoWarning(UserWarning):
    """A setting that works but is known to do something else than its name suggests."""
