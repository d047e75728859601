"""The model as judge of its own replies: a lettered question, asked once in each order.

    hard    v = mean over orders of the value of the likeliest letter's option
    soft    v = mean over orders of sum_o value_o p_o / sum_o p_o

With two options worth 1 and -1, hard is s1 + s2 - 1 of RAIN (arXiv 2309.07124): 0 for a model that
always says A. Of letters that are equally likely the mean counts; `official` takes the worst.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlalign.config.testtime import RainConfig
from rlalign.rollout.search import Choose, Search, SearchEngine, run_searches
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Prompt, encode_user_turn
from rlalign.testtime.question import HARMLESS, LETTERS, QUESTIONS, Example, Question

AGGREGATES = ("hard", "soft")


class SelfEvaluation:
    """`Reward`, in [-1, 1], of the engine's own model. `question` is a name of QUESTIONS or one's
    own; `chat` as for prompts. NaN for a reply that does not fit the context, even without the
    examples; those are dropped first, the first before the others, and counted.

    Raises DecodeError for an unknown question, options and values that do not match, and a
    tokenizer in which the letters are no single tokens after the question's `answer`.

    >>> reward = SelfEvaluation(engine, "harmless", how="soft")                # doctest: +SKIP
    """

    def __init__(
        self,
        engine: SearchEngine,
        question: str | Question = HARMLESS,
        *,
        how: str = "hard",
        chat: bool | None = None,
        compat: str = "fixed",
    ) -> None:
        if isinstance(question, str):
            if question not in QUESTIONS:
                raise DecodeError(f"question={question!r}: choose one of {', '.join(QUESTIONS)}")
            question = QUESTIONS[question]
        if how not in AGGREGATES:
            raise DecodeError(f"how={how!r}: choose one of {', '.join(AGGREGATES)}")
        check_question(question)
        self._question, self._how, self._chat = question, how, chat
        self._official = compat == "official"
        self._tokenizer, self._max_len = engine.tokenizer, engine.limits.max_len
        self._answer_ids, self._letters = letter_ids(
            engine.tokenizer, question.answer, len(question.options)
        )

    def __call__(self, prompt: Prompt, response: str, ledger: Ledger) -> Search[float]:
        """See `Reward`."""
        found = yield from self.ask(prompt.text, response, ledger)
        return math.nan if found is None else self.value(found)

    def ask(
        self, question: str, reply: str, ledger: Ledger
    ) -> Search[list[tuple[float, ...]] | None]:
        """Log-probs of the options, in the question's own order, once for each order asked; None
        where nothing fits."""
        ledger.num_reward_calls += 1
        prompts = self._prompts(question, reply, ledger)
        if prompts is None:
            ledger.counters["too_long_to_judge"] += 1
            return None
        replies = yield from ledger.ask([Choose(ids, self._letters) for ids in prompts])
        orders = self._question.orders()
        return [
            tuple(logp[order.index(option)] for option in range(len(order)))
            for order, logp in zip(orders, replies, strict=True)
        ]

    def value(self, found: Sequence[Sequence[float]]) -> float:
        """v of the options' log-probs in each order."""
        of_one = self._hard if self._how == "hard" else self._soft
        return sum(of_one(logp) for logp in found) / len(found)

    def _hard(self, logp: Sequence[float]) -> float:
        largest = max(logp)
        best = [v for v, x in zip(self._question.values, logp, strict=True) if x == largest]
        return min(best) if self._official else sum(best) / len(best)

    def _soft(self, logp: Sequence[float]) -> float:
        p = [math.exp(x - max(logp)) for x in logp]
        values = self._question.values
        return sum(v * x for v, x in zip(values, p, strict=True)) / sum(p)

    def _prompts(self, question: str, reply: str, ledger: Ledger) -> list[tuple[int, ...]] | None:
        """In every order, with as many examples as fit all of them."""
        count = len(self._question.examples)
        for skip in range(count + 1):
            prompts = [
                self._encode(self._question.head(question, reply, order, skip))
                for order in self._question.orders()
            ]
            if max(map(len, prompts)) < self._max_len:
                if skip:
                    ledger.counters["examples_dropped"] += skip
                return prompts
        return None

    def _encode(self, head: str) -> tuple[int, ...]:
        return encode_user_turn(self._tokenizer, head, self._chat) + self._answer_ids


def self_judge(
    engine: SearchEngine, cfg: RainConfig, *, chat: bool | None = None
) -> SelfEvaluation:
    """As RAIN's options say."""
    judge = cfg.judge
    return SelfEvaluation(engine, judge.question, how=judge.how, chat=chat, compat=cfg.compat)


def check_question(question: Question) -> None:
    """Raise DecodeError for a question that cannot be asked."""
    count = len(question.options)
    if not 2 <= count <= len(LETTERS):
        raise DecodeError(f"a question has {count} options: give 2 to {len(LETTERS)}")
    if len(question.values) != count or not all(-1 <= value <= 1 for value in question.values):
        raise DecodeError(f"values {question.values}: give one in [-1, 1] for each option")
    if any(not 0 <= example.right < count for example in question.examples):
        raise DecodeError(f"an example's right option is none of the {count}")


def letter_ids(tokenizer: Any, answer: str, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of `answer`, and those that the first `count` letters have directly after it.

    Raises DecodeError where a letter changes the tokens before it, or has no first token of its
    own: scores of such letters would be those of something else.
    """
    ids = _plain(tokenizer, answer)
    letters = []
    for letter in LETTERS[:count]:
        longer = _plain(tokenizer, answer + letter)
        if longer[: len(ids)] != ids or len(longer) != len(ids) + 1:
            raise DecodeError(
                f"the tokenizer does not read {answer + letter!r} as {answer!r} and one token for "
                f"{letter!r}: let the question's `answer` end otherwise, e.g. with a line break"
            )
        letters.append(longer[-1])
    if len(set(letters)) < count:
        raise DecodeError(f"letters {LETTERS[:count]} have token ids {letters} after {answer!r}")
    return ids, tuple(letters)


def _plain(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def probe_accuracy(
    engine: SearchEngine, judge: SelfEvaluation, items: Sequence[Example]
) -> dict[str, float]:
    """How well the model judges replies of which the truth is known (`Example.right`): look at this
    before a search, which near chance is only slow sampling.

    `accuracy`: share of right choices over items and orders, equally likely options sharing one;
    `consistent`: share of items with one choice in all orders; `first_letter`: share of questions
    answered with A, 1 / options without a bias; `num`: items, those that fit. Values of NaN where
    none did.
    """
    ledger = Ledger()
    found = run_searches(engine, [judge.ask(item.question, item.reply, ledger) for item in items])
    right, first, consistent = [], [], []
    for item, orders in zip(items, found, strict=True):
        if not isinstance(orders, list):
            if orders is not None:
                raise orders
            continue
        choices = [_chosen(logp) for logp in orders]
        right += [(item.right in choice) / len(choice) for choice in choices]
        # In rotation `turn`, letter A stands before option `turn`.
        first += [(turn in choice) / len(choice) for turn, choice in enumerate(choices)]
        consistent.append(float(len(set(choices)) == 1))
    return {
        "num": float(len(consistent)),
        "accuracy": _mean(right),
        "consistent": _mean(consistent),
        "first_letter": _mean(first),
    }


def _chosen(logp: Sequence[float]) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(logp) if x == max(logp))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
