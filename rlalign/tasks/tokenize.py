"""Prompts to token ids: through the chat template, or as bare text.

With `apply_chat_template: auto` messages always go through the template, and a plain string is one
user turn where there is a template, bare text where there is none. From here on token ids are the
truth; nothing is tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from rlalign.config.schema import TaskConfig
from rlalign.tasks.errors import TaskError
from rlalign.tasks.rows import Messages, RowProblem
from rlalign.tasks.source import TEMPLATE


@dataclass(frozen=True)
class PromptEncoder:
    """How prompts of one data set become text, and text becomes token ids."""

    tokenizer: Any
    templated: bool  # strings become a user turn; without it chat messages are an error
    chat_template: str | None = None
    system_prompt: str | None = None

    def render(self, prompt: str | Messages) -> str:
        """The text that is tokenised.

        Raises RowProblem where the template refuses the messages, TaskError where there are
        messages and no template, or one that is not valid Jinja.
        """
        if self.templated:
            return self._apply(as_messages(prompt, self.system_prompt))
        if isinstance(prompt, str):
            return prompt
        raise TaskError(
            "the data holds chat messages, but there is no chat template for them: set "
            "task.chat_template (and task.apply_chat_template=auto), use an instruction-tuned "
            "model, or give the prompts as strings"
        )

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of each text. A template writes its own special tokens; bare text gets those
        that the tokenizer adds by itself (a beginning-of-sequence token, where there is one)."""
        if not texts:
            return []
        batch = self.tokenizer(list(texts), add_special_tokens=not self.templated)
        return [tuple(ids) for ids in batch["input_ids"]]

    def _apply(self, messages: Messages) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateSyntaxError as error:
            raise TaskError(f"the chat template is not valid Jinja: {error}") from error
        except TemplateError as error:
            raise RowProblem(TEMPLATE, str(error)) from error


def make_encoder(cfg: TaskConfig, tokenizer: Any) -> PromptEncoder:
    """Raises TaskError for settings that need a chat template where there is none."""
    template = cfg.chat_template or getattr(tokenizer, "chat_template", None)
    templated = bool(template) and cfg.apply_chat_template != "never"
    needing = (
        ("task.apply_chat_template=always", cfg.apply_chat_template == "always"),
        ("task.system_prompt", bool(cfg.system_prompt)),
    )
    for setting, needs_template in needing:
        if needs_template and not templated:
            raise TaskError(
                f"{setting} needs a chat template, and "
                + ("task.apply_chat_template is never" if template else "the tokenizer has none")
                + ": set task.chat_template, use an instruction-tuned model, or drop the setting"
            )
    return PromptEncoder(tokenizer, templated, cfg.chat_template, cfg.system_prompt)


def as_messages(prompt: str | Messages, system_prompt: str | None) -> Messages:
    """The conversation: a string is one user turn; `system_prompt` goes first, in place of a system
    turn that is there."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is None:
        return turns
    rest = turns[1:] if turns[0]["role"] == "system" else turns
    return [{"role": "system", "content": system_prompt}, *rest]
