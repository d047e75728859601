"""Which job's sequence runs next: each job gets tokens in proportion to its weight.

Start-time fair queueing (Goyal, Vin and Chen, 1996): a job's virtual time grows by the tokens it
was given, divided by its weight; the one furthest behind is next. A job that comes back from being
idle starts at the time of those that are busy, so that it can neither claim what it missed nor be
starved by newcomers. One that may have no more for now counts as idle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of several jobs.

    >>> queue = FairQueue()
    >>> for job, item in (("a", 1), ("a", 2), ("b", 3)): queue.push(job, item, tokens=10)
    >>> [queue.pop() for _ in range(3)]
    [1, 3, 2]
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[tuple[T, int]]] = {}
        self._time: dict[str, float] = {}
        self._weight: dict[str, float] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return sum(len(items) for items in self._waiting.values())

    def waiting(self, job: str) -> int:
        return len(self._waiting.get(job, ()))

    def of(self, job: str) -> list[T]:
        """What of a job is waiting, first to last."""
        return [item for item, _ in self._waiting.get(job, ())]

    def set_weight(self, job: str, weight: float) -> None:
        """`weight` > 0: twice the weight, twice the tokens while both jobs wait."""
        self._weight[job] = weight

    def push(self, job: str, item: T, tokens: int, *, first: bool = False) -> None:
        """`tokens`: what the item may cost. `first`: before the job's others, as it came back."""
        if not self._waiting.get(job):
            self._waiting[job] = deque()
            self._time[job] = max(self._time.get(job, 0.0), self._now)
        items = self._waiting[job]
        (items.appendleft if first else items.append)((item, tokens))

    def next_job(self, full: Collection[str] = ()) -> str | None:
        """Whose turn it is among those that wait and are not `full`."""
        return min(
            (job for job, items in self._waiting.items() if items and job not in full),
            key=lambda job: self._time[job],
            default=None,
        )

    def pop(self, full: Collection[str] = ()) -> T:
        """An item of a job that is not `full`; IndexError where none waits."""
        job = self.next_job(full)
        if job is None:
            raise IndexError("nothing waits")
        item, tokens = self._waiting[job].popleft()
        self._now = self._time[job]
        for other in self._time.keys() & set(full):
            self._time[other] = max(self._time[other], self._now)
        self._time[job] += tokens / self._weight.get(job, 1.0)
        return item

    def discard(self, gone: set[T]) -> None:
        """Forget items, as if they had never been pushed: nobody pays for them."""
        if gone:
            for job, items in self._waiting.items():
                self._waiting[job] = deque(pair for pair in items if pair[0] not in gone)

    def drop(self, job: str) -> list[T]:
        """Forget a job; what of it was waiting."""
        items = self._waiting.pop(job, ())
        self._time.pop(job, None)
        self._weight.pop(job, None)
        return [item for item, _ in items]
