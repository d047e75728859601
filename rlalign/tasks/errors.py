"""The one exception of this package."""

from __future__ import annotations

from rlalign.errors import RlalignError


class TaskError(RlalignError):
    """The data cannot be used; the message names the source, the row and the fix."""
