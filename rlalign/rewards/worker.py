"""Reward functions in processes of their own: whatever a function does, it can be stopped.

A function is named by an import path and JSON parameters, so nothing is pickled: the worker imports
and builds it itself. A worker that hangs is killed, with its whole process group, and replaced; one
that dies is replaced. Functions that judge each row on its own (`rowwise`) are shared by several
workers and lose only the row at fault; others lose the call.
"""

from __future__ import annotations

import collections
import logging
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlalign.channel import Channel
from rlalign.process import Child, how_it_ended
from rlalign.rewards.call import Call, Takes
from rlalign.rewards.encode import encode
from rlalign.rewards.verdict import RewardError, Verdict, VerdictKind, read_value

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0  # imports of a user's module included
CHUNK_ROWS = 16  # rows sent to one worker at a time: small, so that workers end together


@dataclass(frozen=True, slots=True)
class Target:
    """What a worker builds and how it is driven.

    >>> Target("math", "rlalign.rewards.mathematics:math", rowwise=True, row_timeout_s=6.0)
    """

    name: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    rowwise: bool = False
    num_workers: int = 1
    row_timeout_s: float | None = None  # of one row, when rowwise
    max_memory_bytes: int | None = None  # address space of a worker


class Worker:
    """One process. `score` never raises for what the function does; it raises RewardError when the
    process cannot be started at all."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._child: Child | None = None
        self.takes = Takes(frozenset(), (), True)

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    def start(self) -> None:
        """Spawn the process and build the function in it."""
        if self._child is not None:
            return
        self._child = Child(Path(__file__).with_name("worker_main.py"))
        self._channel = Channel(self._child.socket)
        self._handshake()

    def score(self, call: Call, deadline: float) -> list[Verdict]:
        """Verdicts of a non-empty prefix of `call`: all of it, or, when a row of a rowwise function
        took the worker down, up to and including that row."""
        self.start()
        row_s = self._target.row_timeout_s
        verdicts: list[Verdict] = []
        arguments = call.arguments(self.takes)
        body = {"arguments": arguments, "num_rows": len(call)}
        request = encode(body, f"reward {self._target.name!r}, which runs in a worker,")
        try:
            self._channel.send_bytes(request, deadline)
            while len(verdicts) < len(call):
                row_deadline = (
                    deadline if row_s is None else min(deadline, time.monotonic() + row_s)
                )
                answer = self._channel.receive(row_deadline)
                verdicts += [_read(item) for item in answer["verdicts"]]
        except TimeoutError:
            self.stop()
            failure = Verdict(VerdictKind.TIMEOUT, detail="no answer before the deadline; killed")
        except (EOFError, ConnectionError, ValueError, KeyError, TypeError) as error:
            failure = self._post_mortem(error)
        else:
            self._forward_log()
            return verdicts
        failed_rows = 1 if self._target.rowwise else len(call) - len(verdicts)
        return verdicts + [failure] * failed_rows

    def stop(self) -> int | None:
        """Kill the process with everything it started; its return code, None if there was none."""
        child, self._child = self._child, None
        return child.stop() if child is not None else None

    def _handshake(self) -> None:
        target = self._target
        setup = {
            "name": target.name,
            "target": target.path,
            "params": dict(target.params),
            "rowwise": target.rowwise,
            "max_memory_bytes": target.max_memory_bytes,
        }
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            self._channel.send(setup, deadline)
            ready = self._channel.receive(deadline)
        except TimeoutError as error:
            self.stop()
            raise RewardError(
                f"reward {target.name!r}: its worker was not ready within {START_TIMEOUT_S:.0f} s; "
                "importing its module or building it hangs or is too slow"
            ) from error
        except (EOFError, ConnectionError) as error:
            detail = self._post_mortem(error).detail
            raise RewardError(
                f"reward {target.name!r}: its worker died at start; {detail}"
            ) from error
        if "error" in ready:
            self.stop()
            raise RewardError(_named(target.name, ready["error"]))
        self.takes = Takes(frozenset(ready["named"]), tuple(ready["required"]), ready["anything"])

    def _post_mortem(self, error: Exception) -> Verdict:
        """Why the process is gone. A SIGKILL that is not ours is the kernel's out-of-memory killer
        in all likelihood."""
        child = self._child
        if child is None:
            return Verdict(VerdictKind.CRASH, detail="the reward was closed while it ran")
        child.wait()
        tail = child.log_tail()
        returncode = self.stop()
        if returncode == -signal.SIGKILL:
            return Verdict(VerdictKind.OOM, detail="killed by SIGKILL: out of memory, most likely")
        how = how_it_ended(returncode) + (f" ({error})" if returncode is None else "")
        return Verdict(VerdictKind.CRASH, detail=f"the worker {how}\n{tail}".strip())

    def _forward_log(self) -> None:
        """What the function printed goes to the log, and the file stays small."""
        if self._child is not None and (tail := self._child.log_tail()):
            logger.info("reward %s printed: %s", self._target.name, tail)
            self._child.clear_log()


class WorkerPool:
    """The runner of one function: its workers, driven together. `score` keeps the order of rows."""

    def __init__(self, target: Target) -> None:
        self.name = target.name
        self._target = target
        self._workers = [Worker(target) for _ in range(target.num_workers)]
        self._threads = ThreadPoolExecutor(target.num_workers, f"reward-{target.name}")
        self._closed = False

    def inspect(self) -> Takes:
        """What the function takes, from one worker."""
        self._workers[0].start()
        return self._workers[0].takes

    def start(self) -> Takes:
        try:
            list(self._threads.map(Worker.start, self._workers))
        except RewardError:
            self.close()
            raise
        return self._workers[0].takes

    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def score(self, call: Call, timeout_s: float) -> list[Verdict]:
        """One verdict per row, within about `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        size = CHUNK_ROWS if self._target.rowwise else max(1, len(call))
        rows = range(len(call))
        chunks = collections.deque(list(rows[i : i + size]) for i in rows[::size])
        late = Verdict(VerdictKind.TIMEOUT, detail=f"not reached within {timeout_s:g} s")
        verdicts = [late] * len(call)
        lock = threading.Lock()

        def drive(worker: Worker) -> None:
            while True:
                with lock:
                    if self._closed or not chunks or time.monotonic() > deadline:
                        return
                    pending = chunks.popleft()
                while pending and not self._closed and time.monotonic() < deadline:
                    done = worker.score(call.rows(pending), deadline)
                    for row, verdict in zip(pending, done, strict=False):  # a prefix
                        verdicts[row] = verdict
                    pending = pending[len(done) :]

        list(self._threads.map(drive, self._workers))
        return verdicts

    def close(self) -> None:
        """Stop the workers, and wait for a `score` that another thread may be in."""
        self._closed = True
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown()
        for worker in self._workers:  # one may have been replaced meanwhile
            worker.stop()


def _read(item: list[Any]) -> Verdict:
    kind, value, detail = item
    return Verdict(VerdictKind(kind), read_value(value).value, detail)


def _named(name: str, message: str) -> str:
    return message if message.startswith("reward ") else f"reward {name!r}: {message}"
