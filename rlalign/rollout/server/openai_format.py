"""Answers in OpenAI's format. Each choice also says under which policy version it was drawn."""

from __future__ import annotations

import secrets
import time
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

    def choice(self, index: int, text: Text, done: dict[str, Any], logp: bool) -> dict[str, Any]:
        """A choice of a whole answer. `done` is the engine's message; with `logp`, the tokens'."""
        return {
            "index": index,
            **self._content(text),
            "logprobs": self._logprobs(text, done["logp"][: text.num_tokens]) if logp else None,
            "finish_reason": "stop" if text.stopped else done["finish"],
            "policy_version": done["spans"][-1][1] if done["spans"] else None,  # of its last token
        }

    def parts(
        self, index: int, text: Text, done: dict[str, Any], logp: bool
    ) -> list[dict[str, Any]]:
        """The same, for a stream."""
        return [self.choice(index, text, done, logp)]

    def whole(
        self, choices: list[dict[str, Any]], prompt_tokens: int, completion_tokens: int
    ) -> dict[str, Any]:
        usage = _usage(prompt_tokens, completion_tokens)
        return {**self._head, "object": self.object, "choices": choices, "usage": usage}

    def part(self, choices: list[dict[str, Any]], *tokens: int) -> dict[str, Any]:
        """One event of a stream. `tokens` of prompts and completions belong to the last."""
        usage = {"usage": _usage(*tokens)} if tokens else {}
        return {**self._head, "object": self.object_part, "choices": choices, **usage}

    def _content(self, text: Text) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, text: Text, logp: list[float]) -> dict[str, Any]:
        raise NotImplementedError


class CompletionFormat(Format):
    prefix, object, object_part = "cmpl", "text_completion", "text_completion"

    def _content(self, text: Text) -> dict[str, Any]:
        return {"text": text.text}

    def _logprobs(self, text: Text, logp: list[float]) -> dict[str, Any]:
        offsets = list(accumulate((len(piece) for piece in text.pieces), initial=0))[:-1]
        return {
            "tokens": list(text.pieces), "token_logprobs": logp, "top_logprobs": None,
            "text_offset": offsets,
        }  # fmt: skip


class ChatFormat(Format):
    prefix, object, object_part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _content(self, text: Text) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text.text, "refusal": None}}

    def _logprobs(self, text: Text, logp: list[float]) -> dict[str, Any]:
        return {
            "content": [
                {
                    "token": piece, "logprob": value, "bytes": list(piece.encode()),
                    "top_logprobs": [],
                }
                for piece, value in zip(text.pieces, logp, strict=True)
            ],
            "refusal": None,
        }  # fmt: skip

    def parts(
        self, index: int, text: Text, done: dict[str, Any], logp: bool
    ) -> list[dict[str, Any]]:
        whole = self.choice(index, text, done, logp)
        delta = {"role": "assistant", "content": text.text}
        last = {key: whole[key] for key in ("index", "finish_reason", "policy_version")}
        first = {"index": index, "delta": delta, "logprobs": whole["logprobs"]}
        return [{**first, "finish_reason": None}, {**last, "delta": {}, "logprobs": None}]


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }  # fmt: skip
