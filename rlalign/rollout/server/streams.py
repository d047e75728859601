"""Sequences as they end, for answers that are sent while others still run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from rlalign.rollout.server.engine_host import EngineHost
from rlalign.rollout.server.jobs import JobError
from rlalign.rollout.server.sequences import Sequence

ALIVE_S = 2.0  # between two lines of a stream on which nothing happens


async def as_they_end(
    host: EngineHost, sequences: list[Sequence]
) -> AsyncGenerator[list[Sequence]]:
    """Those that ended since the last look; none of them after ALIVE_S, so that a stream can say it
    is alive. A reader that goes away takes what is left along: use it under aclosing."""
    ended: asyncio.Queue[Sequence] = asyncio.Queue()
    for sequence in sequences:
        sequence.result.add_done_callback(lambda _, s=sequence: ended.put_nowait(s))
    left = len(sequences)
    try:
        while left:
            batch = []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ALIVE_S):
                    batch.append(await ended.get())
            while not ended.empty():
                batch.append(ended.get_nowait())
            left -= len(batch)
            yield batch
    finally:
        host.cancel(sequences)


def outcome(sequence: Sequence) -> dict[str, Any]:
    """The engine's message of a sequence that ended. Raises what became of it otherwise."""
    if sequence.result.cancelled():
        raise JobError("the job is over: its lease ended")
    return sequence.result.result()
