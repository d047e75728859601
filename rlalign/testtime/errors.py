"""The one exception of this package."""

from __future__ import annotations

from rlalign.errors import RlalignError


class DecodeError(RlalignError):
    """A test-time method cannot be run; the message names the cause and the fix."""


def check_at_least(least: int, **values: int) -> None:
    """Raises DecodeError for the first of the named values that is below `least`."""
    for name, value in values.items():
        if value < least:
            raise DecodeError(f"{name}={value}: at least {least} is needed")
