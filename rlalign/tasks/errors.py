"""The one exception of this package."""

from __future__ import annotations


class TaskError(ValueError):
    """The data cannot be used; the message names the source, the row and the fix."""
