"""The final answer inside a text, and whether two answers are the same.

Numbers are compared as exact fractions: 1,000 = 1000 = 1e3, 18.0 = 18, 3/4 = 0.75 = \\frac{3}{4}.
Anything else is compared as text after `rewards.text.normalise`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction

from rlalign.rewards.text import ANSWER_TAG, compile_pattern, last_group, normalise
from rlalign.testtime.errors import DecodeError

Extract = Callable[[str], str | None]

RULES = "auto, tag, boxed, json:KEY, number, line, pattern:REGEX"
JSON_KEY = "final answer"  # of auto
MAX_NUMBER = 100  # characters: longer digits are compared as text

_TAG = re.compile(ANSWER_TAG, re.DOTALL)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"(?<![\w.])[-+−]?(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*{_DIGITS})?"
)
_BOXED = re.compile(r"\\boxed\s*\{")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)(\d))")
_DECORATION = re.compile(r"\\[!,;: ]|\\left|\\right|\\displaystyle|\\?[$%]|\\[()]|\^\{?\\circ\}?")
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_MIXED = re.compile(r"([-+]?)(\d+) (\d+)/(\d+)")
_PLAIN = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,3})?")


def make_extract(rule: str) -> Extract:
    """What finds the answer in a text: None where there is none. A rule is one of

    `tag` (the last `<answer>..</answer>`), `boxed` (the last `\\boxed{..}`), `json:KEY` (the value
    of KEY in a JSON object, the last one), `number` (the last number), `line` (the last line),
    `pattern:REGEX` (group 1 of its last match), or `auto`: the first of tag, boxed, the JSON key
    "final answer", number and line that finds something.

    Raises DecodeError for an unknown rule, RewardError for a pattern that does not compile or
    captures nothing.
    """
    name, colon, argument = rule.partition(":")
    if name == "pattern" and argument:
        compiled = compile_pattern(argument, group=True)
        return lambda text: last_group(compiled, text)
    if name == "json" and argument:
        return json_value(argument)
    plain: dict[str, Extract] = {
        "tag": lambda text: last_group(_TAG, text),
        "boxed": last_boxed,
        "number": last_number,
        "line": last_line,
        "auto": _first_of(
            lambda text: last_group(_TAG, text),
            last_boxed,
            json_value(JSON_KEY),
            last_number,
            last_line,
        ),
    }
    if name not in plain or colon:
        raise DecodeError(f"extract={rule!r} is no rule for an answer: choose one of {RULES}")
    return plain[name]


def last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{..}` whose braces close."""
    for found in reversed([*_BOXED.finditer(text)]):
        depth = 1
        for end in range(found.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[found.end() : end].strip()
    return None


def json_value(key: str) -> Extract:
    """Finds the last value of `key`; the JSON around it may be broken, as models write it."""
    name = re.escape(json.dumps(key, ensure_ascii=False))
    pattern = re.compile(rf'{name}\s*:\s*(?:"((?:[^"\\]|\\.)*)"|([^\s"{{}}\[\],]+))', re.DOTALL)

    def find(text: str) -> str | None:
        found = [*pattern.finditer(text)]
        if not found:
            return None
        quoted, bare = found[-1].groups()
        if quoted is None:
            return bare
        try:
            return str(json.loads(f'"{quoted}"'))
        except json.JSONDecodeError:  # LaTeX in a string: "\sqrt{2}" is no escape
            return quoted

    return find


def last_number(text: str) -> str | None:
    """The last number as it is written, a fraction whole."""
    found = [match.group(0) for match in _NUMBER.finditer(text)]
    return found[-1] if found else None


def last_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def canonical(answer: str) -> str:
    """One spelling for all answers that are the same: equal strings mean equal answers. Signs of
    currency, percent and degrees do not count."""
    text = _DECORATION.sub("", answer.strip("*`_ \n").replace("−", "-").replace("{,}", ","))
    text = _WRAPPED.sub(r"\1", _FRACTION.sub(_fraction, text))
    text = normalise(text)
    number = as_number(text)
    return text if number is None else str(number)


def as_number(text: str) -> Fraction | None:
    """The value of a number, a fraction `a/b` or a mixed number `a b/c`; None for all else."""
    text = text.strip().lower().removeprefix("$").removesuffix(".")
    if len(text) > MAX_NUMBER:
        return None
    mixed = _MIXED.fullmatch(text)
    if mixed is not None:
        sign, whole, over, under = mixed.groups()
        if int(under) == 0:
            return None
        value = int(whole) + Fraction(int(over), int(under))
        return -value if sign == "-" else value
    over, slash, under = text.partition("/")
    top, bottom = _decimal(over), _decimal(under) if slash else Fraction(1)
    return None if top is None or not bottom else top / bottom


def same(first: str, second: str) -> bool:
    """Whether two answers are the same."""
    return canonical(first) == canonical(second)


def gold(answer: object) -> list[str]:
    """The accepted spellings in an `answer` column: a list holds alternatives; of "... #### 72", as
    GSM8K has it, the answer is what stands behind the mark."""
    alternatives = answer if isinstance(answer, (list, tuple)) else [answer]
    return [str(one).rpartition("####")[2].strip() for one in alternatives]


def is_right(text: str, answer: object, extract: Extract) -> bool:
    """Whether the answer that `text` ends in is among those of an `answer` column."""
    found = extract(text)
    return found is not None and any(same(found, one) for one in gold(answer))


def _first_of(*rules: Extract) -> Extract:
    def find(text: str) -> str | None:
        return next((found for rule in rules if (found := rule(text)) is not None), None)

    return find


def _fraction(found: re.Match[str]) -> str:
    over, under, digit, below = found.groups()
    mixed = " " if found.string[: found.start()][-1:].isdigit() else ""
    return f"{mixed}{over}/{under}" if digit is None else f"{mixed}{digit}/{below}"


def _decimal(text: str) -> Fraction | None:
    text = text.strip()
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text):
        text = text.replace(",", "")
    return Fraction(text) if _PLAIN.fullmatch(text) else None
