"""The model as a judge: which tokens are read, and what they add up to."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlalign.models.random import write_random_model
from rlalign.models.tokenizer import build_tokenizer
from rlalign.rollout.engine import EngineError
from rlalign.rollout.limits import Limits
from rlalign.rollout.search import Choose, run_searches
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.prompt import Prompt
from rlalign.testtime.question import HARMLESS, POSITIVE, Example, Question
from rlalign.testtime.self_evaluation import SelfEvaluation, letter_ids, probe_accuracy

TOKENIZER = build_tokenizer()
SHORT = Question("Judge.", ("nice", "nasty"), (1.0, -1.0))


class Judge:
    """An engine whose model knows which option it wants, by a rule on the prompt's text."""

    eos_ids = frozenset({1})
    tokenizer = TOKENIZER

    def __init__(self, rule, max_len: int = 10_000) -> None:
        self.rule, self.limits, self.asked = rule, Limits(262, max_len), []

    def answer(self, requests):
        assert all(isinstance(request, Choose) for request in requests)
        self.asked += requests
        return [self._choose(request) for request in requests]

    def _choose(self, request: Choose):
        text = self.tokenizer.decode(list(request.ids))
        wanted = self.rule(text)
        if wanted is None:
            return EngineError("logits are not finite")
        if isinstance(wanted, str):  # the letter before the option of that text
            last = text.rpartition("holds?")[2]
            wanted = {letter: float(f"({letter}) {wanted}\n" in last) for letter in "ABC"}
        return tuple(
            math.log(0.01 + wanted[self.tokenizer.decode([option])]) for option in request.options
        )


def score(engine: Judge, reply: str, question: Question = SHORT, **options) -> float:
    judge, ledger = SelfEvaluation(engine, question, **options), Ledger()
    [value] = run_searches(engine, [judge(Prompt("0", (5,), "Q"), reply, ledger)])
    assert ledger.num_reward_calls == 1
    assert isinstance(value, float)
    return value


def honest(text: str) -> str:
    return "nice" if "please" in text.rpartition("Reply: ")[2] else "nasty"


@pytest.mark.parametrize("how", ["hard", "soft"])
def test_a_judge_that_always_says_one_letter_says_nothing(how):
    for letter in "AB":
        biased = Judge(lambda text, own=letter: {"A": 0.0, "B": 0.0, own: 0.9})
        for reply in ("please", "x"):
            assert score(biased, reply, how=how) == pytest.approx(0, abs=1e-12)


def test_a_perfect_judge_is_worth_plus_and_minus_one():
    assert score(Judge(honest), "please") == 1
    assert score(Judge(honest), "x") == -1
    # Soft: (1.01 - 0.01) / (1.01 + 0.01) in both orders.
    assert score(Judge(honest), "please", how="soft") == pytest.approx(1 / 1.02)


def test_equal_letters_are_worth_nothing_and_officially_the_worst():
    even = Judge(lambda text: {"A": 0.5, "B": 0.5})
    assert score(even, "x") == 0
    assert score(even, "x", compat="official") == -1
    assert score(even, "x", how="soft") == 0


def test_three_options():
    colours = Question("Tone?", ("up", "down", "flat"), (1.0, -1.0, 0.0))
    for option, value in zip(colours.options, colours.values, strict=True):
        assert score(Judge(lambda text, o=option: o), "x", colours) == value
    engine = Judge(lambda text: {"A": 1.0, "B": 0.0, "C": 0.0})
    assert score(engine, "x", colours) == pytest.approx(0)
    assert len(engine.asked) == 3


def test_letters_are_read_directly_after_the_answer():
    ids, letters = letter_ids(TOKENIZER, "Answer: (", 3)
    assert TOKENIZER.decode(list(ids)) == "Answer: (" and TOKENIZER.decode(list(letters)) == "ABC"
    engine = Judge(honest)
    score(engine, "please", HARMLESS)
    assert all(request.options == letters[:2] for request in engine.asked)
    assert all(TOKENIZER.decode(list(r.ids)).endswith("harmful.\nAnswer: (") or
               TOKENIZER.decode(list(r.ids)).endswith("harmless.\nAnswer: (")
               for r in engine.asked)  # fmt: skip


def test_a_tokenizer_that_merges_the_bracket_with_a_letter_is_refused():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", *alphabet, "(A"])}
    merging = Tokenizer(models.BPE(vocab=vocab, merges=[("(", "A")]))
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merging.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<eos>")
    with pytest.raises(DecodeError, match="does not read 'Answer: \\(A'"):
        letter_ids(tokenizer, "Answer: (", 2)
    engine = SimpleNamespace(tokenizer=tokenizer, limits=Limits(300, 512), eos_ids=frozenset())
    with pytest.raises(DecodeError):
        SelfEvaluation(engine)  # type: ignore[arg-type]
    good = dataclasses.replace(HARMLESS, answer="Answer:\n")
    SelfEvaluation(engine, good)  # type: ignore[arg-type]


def test_letters_without_a_token_of_their_own_are_refused():
    def same(text, add_special_tokens):
        return {"input_ids": [9 if letter in "ABC" else ord(letter) for letter in text]}

    with pytest.raises(DecodeError, match="token ids"):
        letter_ids(same, "(", 3)


def test_examples_that_do_not_fit_are_dropped_and_counted():
    full = len(TOKENIZER(HARMLESS.head("Q", "please", (0, 1)))["input_ids"])
    for room, dropped in ((full + 30, 0), (full - 20, 1), (1200, None), (300, -1)):
        engine, ledger = Judge(honest, room), Ledger()
        judge = SelfEvaluation(engine, HARMLESS)
        [value] = run_searches(engine, [judge(Prompt("0", (5,), "Q"), "please", ledger)])
        if dropped == -1:
            assert math.isnan(value) and ledger.counters["too_long_to_judge"] == 1
            continue
        assert all(len(request.ids) < room for request in engine.asked)
        if dropped is not None:
            assert ledger.counters["examples_dropped"] == dropped
        else:
            assert 1 < ledger.counters["examples_dropped"] < 10


@pytest.mark.parametrize(
    "options",
    [
        {"question": "kind"},
        {"how": "mean"},
        {"question": Question("x", ("a",), (1.0,))},
        {"question": Question("x", ("a", "b"), (1.0, 2.0))},
        {"question": Question("x", ("a", "b"), (1.0,))},
        {"question": Question("x", ("a", "b"), (1.0, 0.0), (Example("q", "r", 2, "w"),))},
    ],
)
def test_what_cannot_be_asked_is_refused(options):
    with pytest.raises(DecodeError):
        SelfEvaluation(Judge(honest), **options)


def test_the_probe_tells_a_good_judge_from_a_biased_one():
    items = [Example("Q", reply, right, "") for reply, right in [("please", 0), ("x", 1)] * 5]
    good = Judge(honest)
    assert probe_accuracy(good, SelfEvaluation(good, SHORT), items) == {
        "num": 10, "accuracy": 1, "consistent": 1, "first_letter": 0.5,
    }  # fmt: skip
    biased = Judge(lambda text: {"A": 0.9, "B": 0.1})
    assert probe_accuracy(biased, SelfEvaluation(biased, SHORT), items) == {
        "num": 10, "accuracy": 0.5, "consistent": 0, "first_letter": 1,
    }  # fmt: skip
    blind = Judge(lambda text: {"A": 0.5, "B": 0.5})
    assert probe_accuracy(blind, SelfEvaluation(blind, SHORT), items)["accuracy"] == 0.5
    wrong = Judge(lambda text: "nasty" if honest(text) == "nice" else "nice")
    assert probe_accuracy(wrong, SelfEvaluation(wrong, SHORT), items)["accuracy"] == 0


def test_the_probe_leaves_out_what_does_not_fit_and_fails_with_the_engine():
    engine = Judge(honest, 150)
    items = [Example("Q", "please", 0, ""), Example("Q", "x" * 200, 1, "")]
    assert probe_accuracy(engine, SelfEvaluation(engine, SHORT), items)["num"] == 1
    broken = Judge(lambda text: None)
    with pytest.raises(EngineError):
        probe_accuracy(broken, SelfEvaluation(broken, SHORT), items)


def test_on_a_real_model(tmp_path):
    engine = open_engine(str(write_random_model(tmp_path, "qwen2", max_positions=512)))
    values = {
        score(engine, text, POSITIVE, how="soft")  # type: ignore[arg-type]
        for text in ("what a joy", "what a bore", "")
    }
    assert len(values) == 3 and all(-1 < value < 1 for value in values)
