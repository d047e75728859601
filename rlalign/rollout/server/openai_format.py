"""Answers in OpenAI's format. Each choice also says under which policy version it was drawn."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from rlalign.rollout.server.texts import Text

TYPES = {  # of an error, by status
    400: "invalid_request_error", 404: "invalid_request_error", 413: "invalid_request_error",
    429: "rate_limit_error", 503: "server_error", 504: "server_error",
}  # fmt: skip
CODES = {
    404: "model_not_found", 413: "request_too_large", 429: "rate_limit_exceeded",
    503: "engine_lost", 504: "timeout",
}  # fmt: skip


def refusal(status: int, reason: str) -> dict[str, Any]:
    kind, code = TYPES.get(status, "server_error"), CODES.get(status, "invalid_request")
    return {"error": {"message": reason, "type": kind, "code": code}}


@dataclass(frozen=True)
class Choice:
    """A choice, or what one event of a stream adds to it: then `offset` is how many characters went
    before, and all but the last have no `finish`. `version` is that of the last token drawn,
    `testtime` how the search for it goes or went."""

    index: int
    text: Text
    logp: list[float] | None  # of the text's tokens, where they are wanted
    finish: str | None
    version: int | None
    offset: int = 0
    testtime: dict[str, Any] | None = None


class Format:
    """One answer of a route: what its parts are called."""

    prefix = ""  # of its id
    object = ""  # what a whole answer says it is
    object_part = ""  # and a part of a stream

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()),
            "model": model,
        }  # fmt: skip

    def whole(self, choices: list[Choice], *tokens: int) -> dict[str, Any]:
        """`tokens` as `usage` takes them."""
        return {
            **self._head,
            "object": self.object,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage(*tokens),
        }

    def parts(self, choice: Choice) -> list[dict[str, Any]]:
        """The events of a stream for what is new of a choice."""
        return [self._part([added]) for added in self._added(choice)]

    def last(self, *tokens: int) -> dict[str, Any]:
        """A stream's last event, where its usage is wanted."""
        return {**self._part([]), "usage": usage(*tokens)}

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.object_part, "choices": choices}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            **self._content(choice.text),
            "logprobs": None if choice.logp is None else self._logprobs(choice, choice.logp),
            "finish_reason": choice.finish,
            "policy_version": choice.version,
            **({} if choice.testtime is None else {"testtime": choice.testtime}),
        }

    def _added(self, choice: Choice) -> list[dict[str, Any]]:
        return [self._choice(choice)]

    def _content(self, text: Text) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, choice: Choice, logp: list[float]) -> dict[str, Any]:
        raise NotImplementedError


class CompletionFormat(Format):
    prefix, object, object_part = "cmpl", "text_completion", "text_completion"

    def _content(self, text: Text) -> dict[str, Any]:
        return {"text": text.text}

    def _logprobs(self, choice: Choice, logp: list[float]) -> dict[str, Any]:
        pieces = choice.text.pieces
        offsets = list(accumulate((len(piece) for piece in pieces), initial=choice.offset))[:-1]
        return {
            "tokens": list(pieces), "token_logprobs": logp, "top_logprobs": None,
            "text_offset": offsets,
        }  # fmt: skip


class ChatFormat(Format):
    prefix, object, object_part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _content(self, text: Text) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text.text, "refusal": None}}

    def _logprobs(self, choice: Choice, logp: list[float]) -> dict[str, Any]:
        return {
            "content": [
                {
                    "token": piece, "logprob": value, "bytes": list(piece.encode()),
                    "top_logprobs": [],
                }
                for piece, value in zip(choice.text.pieces, logp, strict=True)
            ],
            "refusal": None,
        }  # fmt: skip

    def _added(self, choice: Choice) -> list[dict[str, Any]]:
        """The first one names the role; what ends the choice comes by itself."""
        plain = self._choice(choice)
        del plain["message"]
        delta = {"content": choice.text.text}
        if not choice.offset:
            delta = {"role": "assistant", **delta}
        added = []
        if choice.text.num_tokens or not choice.offset:
            added.append({**plain, "delta": delta, "finish_reason": None})
        if choice.finish is not None:
            added.append({**plain, "delta": {}, "logprobs": None})
        return added


def usage(
    prompt_tokens: int, completion_tokens: int, hidden_tokens: int | None = None
) -> dict[str, Any]:
    """`hidden_tokens` of the completion's were generated and are not in the answer: OpenAI calls
    them reasoning."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }  # fmt: skip
    if hidden_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": hidden_tokens}
    return counts
