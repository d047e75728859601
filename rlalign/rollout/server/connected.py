"""What is done for a client ends when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse

T = TypeVar("T")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and ClientDisconnect raised, when the client of
    `request` goes away. The body must have been read."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """Lines of JSON, or what else is said. `ended` is called however it ends: an iterator that was
    never begun, because the client went at once, would not know."""

    def __init__(
        self,
        lines: AsyncIterator[bytes | str],
        ended: Callable[[], None],
        media_type: str = "application/x-ndjson",
    ) -> None:
        super().__init__(lines, media_type=media_type)
        self._ended = ended

    async def __call__(self, *channel: Any) -> None:
        try:
            await super().__call__(*channel)
        finally:
            self._ended()
