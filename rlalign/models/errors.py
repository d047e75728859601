"""The one exception of this package."""

from __future__ import annotations


class ModelError(RuntimeError):
    """A model or tokenizer cannot be used; the message names the cause and the fix."""
