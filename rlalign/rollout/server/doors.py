"""Who may come in: three tokens with growing rights, checked before any route is looked at.

`generate` samples by OpenAI's routes, `job` takes leases and does what a job does, `admin` does
everything. A token of a higher scope opens the doors of the lower ones. What is not in the table of
scopes is closed to everybody, so a new route cannot be left open by mistake.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlalign.errors import RlalignError

SCOPES = ("generate", "job", "admin")  # each opens the doors of those before it
TOKEN_BYTES = 32
BODY_S = 60.0  # for a whole body to arrive

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def make_tokens() -> dict[str, str]:
    """A fresh token for each scope."""
    return {scope: secrets.token_urlsafe(TOKEN_BYTES) for scope in SCOPES}


class TooLarge(RlalignError):
    """A body without a length that went on for too long; raised where the route reads it."""


class TooSlow(RlalignError):
    """A body that did not arrive in time; raised where the route reads it."""


@dataclass(frozen=True)
class Bounds:
    """How large the body of a request may be, and how many requests may be open at once.

    `larger` maps paths (as registered) whose bodies may be large to their most bytes and the
    seconds in which one must arrive. Routes in `always` are neither counted nor refused when
    `requests` are open.
    """

    body_bytes: int
    requests: int
    larger: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    always: Collection[tuple[str, str]] = ()

    def of_body(self, path: str | None) -> tuple[int, float]:
        """Most bytes, and seconds for them to arrive."""
        return self.larger.get(path or "", (self.body_bytes, BODY_S))


class Doors:
    """ASGI middleware: authentication, scopes, the size of a request's body, and how many requests
    are open at once.

    `scopes` maps (method, path of the route as registered) to a scope or None (open to all);
    `match` finds the registered path of a request.
    """

    def __init__(
        self,
        app: Any,
        tokens: Mapping[str, str],
        scopes: Mapping[tuple[str, str], str | None],
        match: Callable[[str, str], str | None],
        bounds: Bounds,
    ) -> None:
        self._app, self._tokens, self._scopes = app, dict(tokens), dict(scopes)
        self._match, self._bounds, self._open = match, bounds, 0

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None
        refusal = self._refusal(scope)
        if refusal is not None:
            return await _answer(send, *refusal)
        path = self._match(scope["method"], scope["path"])
        receive = _limited(receive, *self._bounds.of_body(path))
        if (scope["method"], path) in self._bounds.always:
            return await self._app(scope, receive, send)
        if self._open >= self._bounds.requests:
            return await _answer(send, 503, self._too_many())
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1

    def _refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """Status and reason, or None where the request may pass."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope.get("http_version", "1.1") not in ("1.0", "1.1"):
            return 400, f"HTTP {scope['http_version']} is not spoken here; use HTTP/1.1"
        if b"content-length" in headers and b"transfer-encoding" in headers:
            return 400, "a body has Content-Length or Transfer-Encoding: where would it end?"
        method, path = scope["method"], self._match(scope["method"], scope["path"])
        if path is not None and self._scopes.get((method, path), "") is None:
            return None
        granted = self._granted(headers.get(b"authorization", b""))
        if granted is None:
            return 401, "a valid token is needed: Authorization: Bearer TOKEN"
        wanted = self._scopes.get((method, path)) if path is not None else None
        if wanted is None:
            return 404, f"there is no {method} {scope['path']}"
        if SCOPES.index(granted) < SCOPES.index(wanted):
            return (
                403,
                f"{method} {path} needs a token of scope {wanted!r}, this one is {granted!r}",
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return 400, "Content-Length is no number"
        most, _ = self._bounds.of_body(path)
        return (413, _too_large(most)) if int(length) > most else None

    def _granted(self, header: bytes) -> str | None:
        """The scope of the token in an Authorization header. All are compared, in constant time."""
        kind, _, given = header.partition(b" ")
        found = None
        for scope, token in self._tokens.items():
            if hmac.compare_digest(given.strip(), token.encode()) and kind.lower() == b"bearer":
                found = scope
        return found

    def _too_many(self) -> str:
        return (
            f"{self._open} requests are open, which is this server's max_requests: try again, ask "
            "for more in one request, or start the server with a higher max_requests"
        )


def _limited(receive: Receive, most: int, seconds: float) -> Receive:
    """Bodies without a length are counted as they come, and none may take for ever."""
    size, more, deadline = 0, True, asyncio.get_running_loop().time() + seconds

    async def counting() -> dict[str, Any]:
        nonlocal size, more
        try:
            # What comes after the body is the client's leaving: any time.
            async with asyncio.timeout_at(deadline if more else None):
                message = await receive()
        except TimeoutError:
            raise TooSlow(f"the body did not arrive within {seconds:g} s") from None
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        if size > most:
            raise TooLarge(_too_large(most))
        return message

    return counting


def _too_large(most: int) -> str:
    return f"the body has more than {most} bytes"


async def _answer(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json")]
    if status == 400:  # nobody knows where the next request begins
        headers.append((b"connection", b"close"))
    if status == 503:
        headers.append((b"retry-after", b"1"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
