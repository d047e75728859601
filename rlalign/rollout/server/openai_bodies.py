"""Requests in OpenAI's format: the part that this server does, and nothing that it does not.

A field it does not know is refused, unless it says what is the case anyway (no penalty, no tools).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlalign.rollout.server.bodies import MAX_SEQUENCES, Body, TokenId

NOTHING = {  # fields of the format with the values that ask for nothing
    "best_of": (1,), "echo": (False,), "suffix": ("",), "frequency_penalty": (0,),
    "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none",),
    "response_format": ({"type": "text"},), "store": (False,), "modalities": (["text"],),
}  # fmt: skip
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(Body):
    include_usage: bool = False


class OpenAiBody(Body):
    """What both routes share. `top_k`, `stop_token_ids` and `ignore_eos` are the engine's own, and
    `testtime` the options of the method in a model's name (methods.py)."""

    model: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: list[StopString] = Field([], max_length=16)
    stop_token_ids: list[TokenId] = Field([], max_length=1000)
    ignore_eos: bool = False
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    testtime: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        body = {name: value for name, value in body.items() if value is not None}
        asked = {n: v for n, v in body.items() if v not in NOTHING.get(n, ())}
        unknown = sorted(asked.keys() - cls.model_fields.keys())
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: this server does not do that; it takes "
                f"{', '.join(sorted(cls.model_fields))}"
            )
        return asked

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> OpenAiBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true")
        return self


class CompletionBody(OpenAiBody):
    """`prompt` as a string or token ids, or a list of such. At most 16 tokens unless told."""

    prompt: list[str | list[TokenId]]
    logprobs: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _several(cls, prompt: Any) -> Any:
        one = isinstance(prompt, str) or (
            isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
        )
        return [prompt] if one else prompt

    @model_validator(mode="after")
    def _possible(self) -> CompletionBody:
        if not self.prompt:
            raise ValueError("prompt: an empty list; give at least one prompt")
        if len(self.prompt) * self.n > MAX_SEQUENCES:
            raise ValueError(f"n: prompts times n may be {MAX_SEQUENCES} at most")
        if self.logprobs:
            raise ValueError(
                f"logprobs={self.logprobs} asks for other tokens than the chosen one; logprobs=0 "
                "gives the chosen token's"
            )
        return self

    @property
    def logp_wanted(self) -> bool:
        return self.logprobs is not None

    @property
    def longest(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatBody(OpenAiBody):
    """A conversation. The answer may be as long as there is room, unless told."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: int = 0

    @model_validator(mode="after")
    def _one_length(self) -> ChatBody:
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.top_logprobs:
            raise ValueError(
                f"top_logprobs={self.top_logprobs} asks for other tokens than the chosen one; "
                "logprobs=true alone gives the chosen token's"
            )
        return self

    @property
    def logp_wanted(self) -> bool:
        return self.logprobs

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens
