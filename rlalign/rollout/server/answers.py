"""What a handler gives as an answer over HTTP, and what may go wrong as a status with a reason."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from rlalign.errors import RlalignError
from rlalign.rollout.engine import EngineError, WeightsLost
from rlalign.rollout.server.doors import TooLarge, TooSlow
from rlalign.rollout.server.engine_process import EngineLost
from rlalign.rollout.server.jobs import Busy, JobError
from rlalign.rollout.server.quotas import TooMany
from rlalign.rollout.server.sequences import Refused

Handler = Callable[[Request], Awaitable[Any]]


class UnknownModel(RlalignError):
    """A request names a model that this server does not have."""


STATUS = {
    WeightsLost: 410, TooLarge: 413, TooSlow: 408, Busy: 409, JobError: 404, UnknownModel: 404,
    Refused: 400, TooMany: 429, EngineError: 400, EngineLost: 503, TimeoutError: 504, OSError: 507,
}  # fmt: skip


# What is left of a body that is too large or too slow is not worth reading.
HEADERS = {408: {"Connection": "close"}, 413: {"Connection": "close"}, 429: {"Retry-After": "1"}}


def plain(status: int, reason: str) -> dict[str, Any]:
    """The body of a refusal."""
    return {"error": reason}


def answering(
    handler: Handler, refusal: Callable[[int, str], dict[str, Any]] = plain
) -> Callable[[Request], Awaitable[Response]]:
    """`handler` as a route: a Response goes out as it is, anything else as JSON."""

    async def route(request: Request) -> Response:
        try:
            answer = await handler(request)
        except ValidationError as error:
            return JSONResponse(refusal(400, first_problem(error)), 400)
        except ClientDisconnect:
            return JSONResponse(refusal(400, "the client went away"), 400)
        except tuple(STATUS) as error:
            status = status_of(error)
            return JSONResponse(refusal(status, str(error)), status, HEADERS.get(status))
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    return route


def status_of(error: Exception) -> int:
    return next(code for kind, code in STATUS.items() if isinstance(error, kind))


def first_problem(error: ValidationError) -> str:
    """Where a body is wrong, and why."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "the body"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"
