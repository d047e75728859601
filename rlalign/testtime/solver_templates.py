"""How a question is put to a model that is to solve it."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlalign.testtime.prompt import Prompt, make_prompt

# A system line, and what follows the question in the user's turn.
TEMPLATES = {
    "boxed": (
        "Solve the problem one step after another, and write the final answer inside \\boxed{}.",
        "",
    ),
    "json": (
        "You solve mathematical problems and make no mistakes.",
        "\n\nWork it out one step after another. Reply with a JSON object that has two keys: "
        '"thought process", your steps, and "final answer", the answer alone.',
    ),
}


def with_template(tokenizer: Any, prompt: Prompt, name: str, chat: bool | None = None) -> Prompt:
    """`prompt` with its question (`text`) put as TEMPLATES say; "none" leaves it as it is. An
    earlier system line and earlier turns are left out."""
    if name == "none":
        return prompt
    system, cue = TEMPLATES[name]
    turns = [
        {"role": "system", "content": system},
        {"role": "user", "content": prompt.text + cue},
    ]
    asked = make_prompt(tokenizer, {"messages": turns, "id": prompt.id}, chat=chat)
    return dataclasses.replace(prompt, ids=asked.ids)
