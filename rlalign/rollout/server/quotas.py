"""How much of the server one job may have at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rlalign.errors import RlalignError


class TooMany(RlalignError):
    """A job asks for more than it may have now; the message names the server's option."""


@dataclass(frozen=True)
class Quotas:
    """`max_queued` sequences of a job may wait or run, and `max_in_flight` be in the engine; None:
    any number."""

    max_queued: int | None = None
    max_in_flight: int | None = None

    def admit(self, has: int, more: int) -> None:
        """Raises TooMany where a job that `has` so many sequences may not bring `more`."""
        if self.max_queued is not None and has + more > self.max_queued:
            raise TooMany(
                f"{more} sequences more than the {has} that the job has here would exceed this "
                f"server's max_queued={self.max_queued}: send fewer at once, or start the server "
                "with a higher max_queued"
            )

    def full(self, jobs: Iterable[str]) -> set[str]:
        """Those of which no more may go to the engine, from the job of each sequence in it."""
        if self.max_in_flight is None:
            return set()
        return {job for job, count in Counter(jobs).items() if count >= self.max_in_flight}
