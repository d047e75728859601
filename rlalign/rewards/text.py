"""Rewards that only read text: exact match, format, length and repetition.

Each public function is a factory: it takes the parameters and returns the reward. Completions are
strings or `[{"role": "assistant", "content": text}]`; `text_of` reads both.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from rlalign.rewards.verdict import RewardError

Reward = Callable[..., list[float | None]]

ANSWER_TAG = r"<answer>(.*?)</answer>"
_INSIDE = r"(?:(?!</?(?:think|answer)>).)*"  # each tag exactly once: no second answer to hedge with
THINK_THEN_ANSWER = rf"\s*<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>\s*"


def exact_match(
    pattern: str | None = ANSWER_TAG, ignore_case: bool = True, numbers: bool = True
) -> Reward:
    """1 where the completion's answer equals the `answer` column, else 0.

    The answer is group 1 of the LAST match of `pattern` (the whole completion when `pattern` is
    None); without a match the score is 0. Both sides are normalised (see `normalise`). A list in
    the `answer` column holds alternatives; a row whose answer is None does not apply.
    """
    compiled = compile_pattern(pattern, group=True) if pattern is not None else None

    def score(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
        return [one(text_of(c), a) for c, a in zip(completions, answer, strict=True)]

    def one(text: str, answer: Any) -> float | None:
        if answer is None:
            return None
        found = text if compiled is None else last_group(compiled, text)
        if found is None:
            return 0.0
        accepted = answer if isinstance(answer, (list, tuple)) else [answer]
        given = normalise(found, ignore_case, numbers)
        return float(any(given == normalise(str(a), ignore_case, numbers) for a in accepted))

    return score


def regex(pattern: str, full: bool = True, score: float = 1.0, otherwise: float = 0.0) -> Reward:
    """`score` where the pattern matches the whole completion (anywhere in it when `full` is false),
    else `otherwise`. `.` matches line breaks."""
    compiled = compile_pattern(pattern)
    match = compiled.fullmatch if full else compiled.search

    def reward(completions: list[Any], **_: Any) -> list[float | None]:
        return [score if match(text_of(c)) else otherwise for c in completions]

    return reward


def format(pattern: str = THINK_THEN_ANSWER) -> Reward:
    """1 where the whole completion has the form `<think>..</think><answer>..</answer>` (or
    `pattern`), else 0."""
    return regex(pattern)


def length(min_tokens: int = 0, max_tokens: int | None = None, buffer_tokens: int = 64) -> Reward:
    """0 inside [min_tokens, max_tokens]; outside, falls linearly to -1 over `buffer_tokens`.

    Lengths are completion tokens, the end-of-sequence token included.
    """
    if buffer_tokens < 1:
        raise RewardError(f"reward 'length': buffer_tokens = {buffer_tokens}; allowed: >= 1")
    if max_tokens is not None and max_tokens < min_tokens:
        raise RewardError(f"reward 'length': max_tokens {max_tokens} < min_tokens {min_tokens}")

    def score(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [one(len(ids)) for ids in completion_ids]

    def one(tokens: int) -> float:
        over = 0 if max_tokens is None else tokens - max_tokens
        outside = max(0, min_tokens - tokens, over)
        return -min(1.0, outside / buffer_tokens)

    return score


def repetition(ngram_size: int = 3, max_penalty: float = 1.0) -> Reward:
    """-max_penalty * (1 - distinct n-grams / n-grams), over whitespace-separated lower-case words.

    0 for a completion shorter than one n-gram. In [-max_penalty, 0]. Formula: Demystifying Long
    Chain-of-Thought Reasoning in LLMs (arXiv 2502.03373), appendix on the repetition penalty.
    """
    if ngram_size < 1:
        raise RewardError(f"reward 'repetition': ngram_size = {ngram_size}; allowed: >= 1")

    def score(completions: list[Any], **_: Any) -> list[float | None]:
        return [one(text_of(c).lower().split()) for c in completions]

    def one(words: list[str]) -> float:
        ngrams = list(zip(*(words[i:] for i in range(ngram_size)), strict=False))
        return -max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0

    return score


def text_of(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion, whichever of its two forms it has."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def normalise(text: str, ignore_case: bool = True, numbers: bool = True) -> str:
    """Unicode NFKC, outer space cut, inner space collapsed; case folded; and a number written as
    1,000 / $1000 / 1000. / 1000.0 becomes one spelling."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    if ignore_case:
        text = text.casefold()
    return _canonical_number(text) if numbers else text


def _canonical_number(text: str) -> str:
    plain = text.removeprefix("$").removesuffix(".")
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", plain):
        plain = plain.replace(",", "")
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", plain):
        return text
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return text
    return "0" if value == 0 else f"{value:f}".lstrip("+") if "." not in plain else _trim(value)


def _trim(value: Decimal) -> str:
    return f"{value:f}".rstrip("0").rstrip(".")


def last_group(compiled: re.Pattern[str], text: str) -> str | None:
    found = None
    for match in compiled.finditer(text):
        found = match.group(1)
    return found


def compile_pattern(pattern: str, group: bool = False) -> re.Pattern[str]:
    """RewardError for a pattern that does not compile, or lacks the group that captures."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RewardError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    if group and compiled.groups < 1:
        raise RewardError(f"pattern {pattern!r} captures nothing; put (...) around the answer")
    return compiled
