"""Rewards from a service over HTTP: requests with retries, a deadline, and typed failures.

A request is tried again after a connection error or a status that may pass (408, 425, 429, 5xx),
with exponential backoff and full jitter, and at least as long as the service's Retry-After says.
What is still open at the deadline is a timeout, a service out of reach or refusing is a crash with
its cause, and an answer that cannot be read is invalid.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlalign.rewards.encode import encode
from rlalign.rewards.verdict import RewardError, Verdict, VerdictKind, read_output

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
BACKOFF_S, MAX_BACKOFF_S = 0.25, 20.0
BODY_CHARS = 300  # of a refusal, for the message

_jitter = random.Random()  # its own generator: the run's random state is not touched


class Refused(RuntimeError):
    """The service is out of reach, or said no for good."""


@dataclass(frozen=True, slots=True)
class Service:
    """Where and how to ask. `attempts` per request; `request_timeout_s` each; `concurrency`
    requests at a time; the whole batch within `deadline_s`."""

    url: str
    attempts: int = 4
    request_timeout_s: float = 30.0
    concurrency: int = 16
    deadline_s: float = 60.0
    headers: Mapping[str, str] = field(default_factory=dict)

    async def post(self, client: Any, payload: dict[str, Any]) -> Any:
        """The answer's JSON. Raises Refused, or ValueError when it is not JSON."""
        import httpx

        body, problem = encode(payload, f"the service at {self.url}"), ""
        for attempt in range(self.attempts):
            pause_s = _jitter.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2**attempt))
            try:
                response = await client.post(self.url, content=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return response.json()
                problem = f"HTTP {response.status_code}: {response.text[:BODY_CHARS]}"
                if response.status_code not in TRANSIENT:
                    raise Refused(f"{self.url} refused: {problem}")
                pause_s = max(pause_s, _retry_after(response.headers))
            if attempt + 1 < self.attempts:
                await asyncio.sleep(pause_s)
        raise Refused(f"{self.url} failed {self.attempts} times; the last: {problem}")

    async def ask_all(
        self,
        payloads: Sequence[dict[str, Any]],
        sizes: Sequence[int],
        read: Callable[[Any, int], list[Verdict]],
    ) -> list[Verdict]:
        """Send every payload and read its answer as verdicts of that many rows, in order."""
        import httpx

        slots = asyncio.Semaphore(self.concurrency)
        headers = {"Content-Type": "application/json", **self.headers}
        timeout = httpx.Timeout(self.request_timeout_s)
        async with httpx.AsyncClient(headers=headers, timeout=timeout) as client:

            async def one(payload: dict[str, Any], size: int) -> list[Verdict]:
                async with slots:
                    return await _typed(self.post(client, payload), read, size)

            pairs = zip(payloads, sizes, strict=True)
            tasks = [asyncio.create_task(one(payload, size)) for payload, size in pairs]
            _, late = await asyncio.wait(tasks, timeout=self.deadline_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        overdue = Verdict(VerdictKind.TIMEOUT, detail=f"no answer within {self.deadline_s:g} s")
        verdicts = []
        for task, size in zip(tasks, sizes, strict=True):
            verdicts += [overdue] * size if task in late else task.result()
        return verdicts


async def _typed(
    answer: Awaitable[Any], read: Callable[[Any, int], list[Verdict]], size: int
) -> list[Verdict]:
    try:
        return read(await answer, size)
    except Refused as error:
        return [Verdict(VerdictKind.CRASH, detail=str(error))] * size
    except (ValueError, LookupError, TypeError) as error:
        detail = f"the answer cannot be read: {type(error).__name__}: {error}"
        return [Verdict(VerdictKind.INVALID, detail=detail)] * size


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds the service asks to wait; dates are not read."""
    text = headers.get("Retry-After", "")
    return min(float(text), MAX_BACKOFF_S) if text.isdigit() else 0.0


def bearer(api_key_env: str | None, *, name: str) -> dict[str, str]:
    """The authorisation header from an environment variable; RewardError when it is not set."""
    if api_key_env is None:
        return {}
    if not os.environ.get(api_key_env):
        raise RewardError(
            f"reward {name!r}: the environment variable {api_key_env!r} (api_key_env) is not set; "
            "export it, or leave api_key_env out for a service without a key"
        )
    return {"Authorization": f"Bearer {os.environ[api_key_env]}"}


def check_url(url: str, *, name: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise RewardError(f"reward {name!r}: {url!r} is not an http:// or https:// address")
    return url


def http(
    url: str,
    columns: list[str] | None = None,
    batch_size: int = 64,
    api_key_env: str | None = None,
    attempts: int = 4,
    request_timeout_s: float = 30.0,
    concurrency: int = 16,
    deadline_s: float = 60.0,
) -> Callable[..., Awaitable[list[Verdict]]]:
    """Rewards computed by your own service.

    POSTs {"prompts": [..], "completions": [..], <column>: [..]} in batches (the named `columns`, or
    all of them) and reads {"rewards": [number or null, ..]} or the bare list.
    """
    headers = bearer(api_key_env, name="http")
    check_url(url, name="http")
    service = Service(url, attempts, request_timeout_s, concurrency, deadline_s, headers)

    async def reward(prompts: list[Any], completions: list[Any], **data: Any) -> list[Verdict]:
        data.pop("completion_ids", None)
        chosen = data if columns is None else {name: data[name] for name in columns}
        batch = {"prompts": prompts, "completions": completions, **chosen}
        starts = range(0, len(completions), batch_size)
        payloads = [{k: v[i : i + batch_size] for k, v in batch.items()} for i in starts]
        sizes = [len(payload["completions"]) for payload in payloads]
        return await service.ask_all(payloads, sizes, _read_rewards)

    reward.required_columns = tuple(columns or ())  # type: ignore[attr-defined]
    return reward


def _read_rewards(answer: Any, size: int) -> list[Verdict]:
    return read_output(answer["rewards"] if isinstance(answer, dict) else answer, size)
