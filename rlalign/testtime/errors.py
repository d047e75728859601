"""The one exception of this package."""

from __future__ import annotations

from rlalign.errors import RlalignError


class DecodeError(RlalignError):
    """A test-time method cannot be run; the message names the cause and the fix."""
