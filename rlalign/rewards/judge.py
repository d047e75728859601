"""A language model as judge, behind any OpenAI-compatible chat endpoint."""

from __future__ import annotations

import json
import string
from collections.abc import Awaitable, Callable
from typing import Any

from rlalign.rewards.remote import Service, bearer, check_url
from rlalign.rewards.text import compile_pattern, last_group, text_of
from rlalign.rewards.verdict import RewardError, Verdict, VerdictKind, read_value

TEMPLATE = """Rate how well the response answers the request, from 0 (useless) to 10 (perfect).

<request>
{prompt}
</request>
<response>
{completion}
</response>

Think briefly, then end with a line of the form "Score: <number>"."""
SCORE = r"(?i:score)[^\w-]{0,8}(-?\d+(?:\.\d+)?)"


def llm_judge(
    base_url: str,
    model: str,
    template: str = TEMPLATE,
    pattern: str = SCORE,
    json_key: str | None = None,
    min_score: float = 0.0,
    max_score: float = 10.0,
    system: str | None = None,
    api_key_env: str | None = None,
    request: dict[str, Any] | None = None,
    attempts: int = 4,
    request_timeout_s: float = 30.0,
    concurrency: int = 16,
    deadline_s: float = 60.0,
) -> Callable[..., Awaitable[list[Verdict]]]:
    """The judge's score, mapped from [min_score, max_score] onto [0, 1].

    `template` may name {prompt}, {completion}, {answer} and any column. The score is group 1 of the
    LAST match of `pattern`, or the value of `json_key` in a JSON answer. An answer without a score,
    or with one outside the range, is invalid. `base_url` is what precedes /chat/completions;
    `request` adds to the request's body (temperature is 0 unless it says otherwise).
    """
    if min_score >= max_score:
        raise RewardError(f"reward 'llm_judge': min_score {min_score} >= max_score {max_score}")
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    if "completion" not in fields:
        raise RewardError("reward 'llm_judge': the template does not name {completion}")
    compiled = compile_pattern(pattern, group=True)
    url = check_url(base_url, name="llm_judge").rstrip("/") + "/chat/completions"
    headers = bearer(api_key_env, name="llm_judge")
    service = Service(url, attempts, request_timeout_s, concurrency, deadline_s, headers)
    body = {"model": model, "temperature": 0, **(request or {})}
    head = [{"role": "system", "content": system}] if system else []

    async def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[Verdict]:
        payloads = []
        for i, completion in enumerate(completions):
            row = {name: values[i] for name, values in columns.items()}
            row |= {"prompt": prompt_text(prompts[i]), "completion": text_of(completion)}
            message = {"role": "user", "content": template.format(**row)}
            payloads.append({**body, "messages": [*head, message]})
        return await service.ask_all(payloads, [1] * len(payloads), read)

    def read(answer: Any, _: int) -> list[Verdict]:
        text = answer["choices"][0]["message"]["content"]
        found = _json_part(text)[json_key] if json_key else last_group(compiled, text)
        if found is None:
            detail = f"no score in the judge's answer: ...{text[-200:]!r}"
            return [Verdict(VerdictKind.INVALID, detail=detail)]
        value = float(found)
        if not min_score <= value <= max_score:
            detail = f"the judge's score {value} is outside [{min_score:g}, {max_score:g}]"
            return [Verdict(VerdictKind.INVALID, detail=detail)]
        return [read_value((value - min_score) / (max_score - min_score))]

    reward.required_columns = tuple(sorted(fields - {"prompt", "completion"}))  # type: ignore[attr-defined]
    return reward


def _json_part(text: str) -> dict[str, Any]:
    """The JSON object in an answer that may say more around it; ValueError without one."""
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


def prompt_text(prompt: Any) -> str:
    """A prompt as text: itself, or its messages, one paragraph each."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
