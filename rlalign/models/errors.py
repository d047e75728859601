"""The one exception of this package."""

from __future__ import annotations

from rlalign.errors import RlalignError


class ModelError(RlalignError):
    """A model or tokenizer cannot be used; the message names the cause and the fix."""
