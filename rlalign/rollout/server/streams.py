"""Sequences as they grow and end, for answers that are sent while others still run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from rlalign.rollout.server.engine_host import EngineHost
from rlalign.rollout.server.jobs import JobError
from rlalign.rollout.server.sequences import Sequence

ALIVE_S = 2.0  # between two lines of a stream on which nothing happens


async def as_they_come(
    host: EngineHost, sequences: list[Sequence]
) -> AsyncGenerator[list[Sequence]]:
    """Those that ended since the last look, or have grown if they are told as they grow; none of
    them after ALIVE_S, so that a stream can say it is alive. However long nobody looks, there is no
    more to keep than the sequences. A reader that goes away takes what is left along: use it under
    aclosing."""
    left, fresh, some = set(sequences), dict[Sequence, None](), asyncio.Event()

    def tell(sequence: Sequence) -> None:
        if sequence in left:
            fresh[sequence] = None
            some.set()

    for sequence in sequences:
        sequence.on_growth = partial(tell, sequence)
        sequence.result.add_done_callback(lambda _, s=sequence: tell(s))
        if sequence.ids:  # it has grown before anybody looked
            tell(sequence)
    try:
        while left:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ALIVE_S):
                    await some.wait()
            batch = list(fresh)
            fresh.clear()
            some.clear()
            left.difference_update([s for s in batch if s.result.done()])
            yield batch
    finally:
        host.cancel(sequences)


def outcome(sequence: Sequence) -> dict[str, Any]:
    """The engine's message of a sequence that ended. Raises what became of it otherwise."""
    if sequence.result.cancelled():
        raise JobError("the job is over: its lease ended")
    return sequence.result.result()
