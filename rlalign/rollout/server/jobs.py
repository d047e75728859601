"""Jobs and their leases: who may use the server, for how long, and under which policy.

A job lives as long as its trainer says so: a lease that no heartbeat renews within its time to live
ends by itself. A job of kind `full` owns the weights and is alone; jobs of kind `lora` share the
base model, each with an adapter of its own. Who has to wait stands in a line, and only its head is
given a lease: LoRA jobs that keep coming do not pass a full job that waits for those before it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rlalign.errors import RlalignError
from rlalign.types import PolicyVersion

KINDS = ("full", "lora")
LOWEST_TTL_S, HIGHEST_TTL_S = 1.0, 3600.0


class JobError(RlalignError):
    """A lease that cannot be given or does not exist; the message says whose it is and what to
    do."""


class Busy(JobError):
    """Another job has what this one wants; it may be had later."""


@dataclass
class Job:
    """One lease. `version` is that of the weights the engine holds for it: 0 with an empty digest
    before the first update."""

    id: str
    name: str
    kind: str
    ttl_s: float
    priority: float
    expires: float  # of the table's clock
    version: PolicyVersion = field(default_factory=lambda: PolicyVersion(0, ""))
    uploading: asyncio.Lock = field(default_factory=asyncio.Lock)  # one file at a time: they add up
    folder: Path | None = None  # of that version
    replaced: list[tuple[Path, int]] = field(default_factory=list)  # and before which sequence


@dataclass(eq=False)
class Place:
    """In the line of those who wait for a lease."""

    name: str  # of the job to be


class JobTable:
    """All leases. `clock` counts seconds and never goes back; `max_loras` is how many jobs may
    have an adapter."""

    def __init__(self, max_loras: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_loras, self._clock = max_loras, clock
        self._jobs: dict[str, Job] = {}
        self.names: dict[str, str] = {}  # by id, until what a job had is free
        self._ending: dict[str, Job] = {}  # over, but what they had is not free yet
        self._line: list[Place] = []

    def __iter__(self):
        return iter(list(self._jobs.values()))

    def line_up(self, name: str) -> Place:
        """A place at the end of the line, until `leave`."""
        self._line.append(Place(name))
        return self._line[-1]

    def leave(self, place: Place) -> None:
        self._line.remove(place)

    def acquire(
        self,
        name: str,
        kind: str = "full",
        ttl_s: float = 60.0,
        priority: float = 1.0,
        place: Place | None = None,
    ) -> Job:
        """A new lease, for who stands at `place` or has just come. Raises Busy where others have
        what it wants or asked before, JobError for arguments that make no sense."""
        if not name or len(name) > 200:
            raise JobError(f"a job needs a name of 1 to 200 characters, not {len(name)}")
        if kind not in KINDS:
            raise JobError(f"unknown kind of job {kind!r}; choose one of {', '.join(KINDS)}")
        if not LOWEST_TTL_S <= ttl_s <= HIGHEST_TTL_S:
            raise JobError(
                f"ttl_s is {ttl_s:g}; it must be within {LOWEST_TTL_S:g} to {HIGHEST_TTL_S:g}"
            )
        if kind == "lora" and not self._max_loras:
            raise JobError(
                "this server has no room for adapters: start it with vllm.max_loras=N, or use a "
                "full job, which sends merged weights"
            )
        self._refuse_if_busy(kind)
        if self._line and self._line[0] is not place:
            raise Busy(
                f"job {self._line[0].name!r} asked before and waits for its lease: wait too "
                "(rollout.server.wait_s), or use another server"
            )
        job = Job(secrets.token_hex(8), name, kind, ttl_s, priority, self._clock() + ttl_s)
        self._jobs[job.id] = job
        self.names[job.id] = name
        return job

    def _refuse_if_busy(self, kind: str) -> None:
        holders = [*self, *self._ending.values()]
        others = [job for job in holders if "full" in (kind, job.kind)]
        if not others and len(holders) >= self._max_loras and kind == "lora":
            others = holders
        if others:
            job = min(others, key=lambda job: job.expires)
            what = "an adapter's place" if kind == job.kind == "lora" else "the server's weights"
            raise Busy(
                f"job {job.name!r} has {what} for another "
                f"{self.left_s(job):.0f} s unless it renews its lease: wait "
                "for it (rollout.server.wait_s), or use another server"
            )

    def get(self, job_id: str) -> Job:
        """Raises JobError for a job that is over or never was."""
        job = self._jobs.get(job_id)
        if job is None:
            raise JobError(
                f"there is no job {job_id!r}: its lease ended, because it was released or no "
                "heartbeat came within its time to live. Acquire a new one."
            )
        return job

    def renew(self, job_id: str) -> Job:
        job = self.get(job_id)
        job.expires = self._clock() + job.ttl_s
        return job

    def release(self, job_id: str) -> Job:
        """The job is over. What it had is another's after `free`."""
        return self._ended(self.get(job_id))

    def left_s(self, job: Job) -> float:
        """How long the lease lasts unless it is renewed, seconds."""
        return max(0.0, job.expires - self._clock())

    def expired(self) -> list[Job]:
        """Leases that are past their time, and now over, as after `release`."""
        return [self._ended(job) for job in self if job.expires <= self._clock()]

    def free(self, job: Job) -> None:
        """Nothing of a job that is over is left in the engine."""
        self._ending.pop(job.id, None)
        self.names.pop(job.id, None)

    def extend(self, seconds: float) -> None:
        """For a time in which no heartbeat could be heard."""
        for job in self:
            job.expires += seconds

    def _ended(self, job: Job) -> Job:
        self._ending[job.id] = self._jobs.pop(job.id)
        return job
