"""What a test-time method is asked: a text, a conversation or token ids, and what rewards need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2.exceptions import TemplateError

from rlalign.testtime.errors import DecodeError

PROMPT_KEYS = ("prompt", "messages", "question")  # of a row, the first that is there


@dataclass(frozen=True, slots=True)
class Prompt:
    """`ids` are what the model reads, special tokens included; `text` is the question as people
    read it; `row` are the other columns (an `answer`), for rewards. `id` keys all that is drawn."""

    id: str
    ids: tuple[int, ...]
    text: str
    row: Mapping[str, Any] = field(default_factory=dict)


Given = str | Sequence[int] | Mapping[str, Any] | Prompt


def make_prompt(
    tokenizer: Any, given: Given, index: int = 0, *, chat: bool | None = None, system: str = ""
) -> Prompt:
    """A prompt from what a user has: a text, token ids, or a row with one of PROMPT_KEYS (a text,
    or messages with `role` and `content`) and any other columns. Its id is the row's `id`, else
    `index`.

    A text becomes the user's turn of the chat template (`chat` True, or None and the tokenizer has
    one), behind `system` if it is given, or stands as it is (False). Raises DecodeError for what is
    no prompt, names no text, or has no tokens, and where the template is missing or refuses it.
    """
    if isinstance(given, Prompt):
        return given
    row: dict[str, Any] = {}
    content: Any = given
    if isinstance(given, Mapping):
        key = next((key for key in PROMPT_KEYS if key in given), None)
        if key is None:
            raise DecodeError(
                f"prompt {index} has none of {', '.join(PROMPT_KEYS)}, only {sorted(given)}"
            )
        row = {name: value for name, value in given.items() if name not in (key, "id")}
        content = given[key]
    name = prompt_id(given, index)
    if not isinstance(content, str) and _is_ids(content):
        if min(content, default=0) < 0:
            raise DecodeError(f"prompt {name!r}: token ids begin at 0, this is {min(content)}")
        ids, text = tuple(content), tokenizer.decode(list(content), skip_special_tokens=True)
    else:
        messages = _messages(content, system, name)
        text = _as_read(messages)
        ids = _encode(tokenizer, messages, chat, name)
    if not ids:
        raise DecodeError(f"prompt {name!r} has no tokens: the model needs something to go on from")
    return Prompt(name, ids, text, row)


def prompt_id(given: Given, index: int) -> str:
    """The id of a prompt, also of what is none."""
    if isinstance(given, Prompt):
        return given.id
    return str(given.get("id", index)) if isinstance(given, Mapping) else str(index)


def encode_user_turn(tokenizer: Any, text: str, chat: bool | None = None) -> tuple[int, ...]:
    """Token ids of `text` as a user's turn, up to where the assistant speaks: what a question to
    the model about something else is made of (a verifier's, a judge's)."""
    return _encode(tokenizer, [{"role": "user", "content": text}], chat, "of a judge")


def plain_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _is_ids(content: Any) -> bool:
    return isinstance(content, Sequence) and all(
        isinstance(token, int) and not isinstance(token, bool) for token in content
    )


def _as_read(messages: Sequence[Mapping[str, str]]) -> str:
    """The question, or all turns of a dialogue with who speaks, but for the system's."""
    turns = [turn for turn in messages if turn["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns or messages)


def _messages(content: Any, system: str, name: str) -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    if isinstance(content, str):
        return [*head, {"role": "user", "content": content}]
    good = isinstance(content, Sequence) and all(
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in content
    )
    if not good or not content:
        raise DecodeError(
            f"prompt {name!r} is neither a text, nor messages with role and content, nor token ids"
        )
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in content]
    return turns if turns[0]["role"] == "system" else [*head, *turns]


def _encode(
    tokenizer: Any, messages: list[dict[str, str]], chat: bool | None, name: str
) -> tuple[int, ...]:
    templated = bool(tokenizer.chat_template) if chat is None else chat
    if not templated:
        texts = [turn["content"] for turn in messages]
        return tuple(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])
    if not tokenizer.chat_template:
        raise DecodeError("chat=true, but the model's tokenizer has no chat template: leave it out")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DecodeError(f"prompt {name!r}: the chat template refuses it: {error}") from error
    # The template has written the special tokens already: no second BOS.
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
