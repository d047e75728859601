"""uvicorn's HTTP, with an answer in JSON to what is no HTTP, and no patience with those who connect
and say nothing: each would hold one of the connections that a process may have."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_S = 20.0  # for the head of a connection's first request; uvicorn watches over the next ones


class HttpProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    cycle: Any  # of uvicorn: the request at hand
    transport: asyncio.Transport

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._silence = asyncio.get_running_loop().call_later(HEAD_S, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._silence.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        body = json.dumps({"error": msg}).encode()
        head = "HTTP/1.1 400 Bad Request", "content-type: application/json", "connection: close"
        lines = [*head, f"content-length: {len(body)}", "", ""]
        self.transport.write("\r\n".join(lines).encode() + body)
        self.transport.close()

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()
