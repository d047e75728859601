"""Four roles of the model judge an answer: what they read, how they are read, what it makes."""

from __future__ import annotations

import itertools
import math

import pytest

from rlalign.config.load import parse
from rlalign.config.testtime import VerifierConfig
from rlalign.rollout.search import Draw, run_searches
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Prompt
from rlalign.testtime.verifier_roles import (
    GAP,
    PHRASE,
    ROLES,
    SelfVerification,
    official_verdict,
    parse_verdict,
    verdict_tokens,
)
from tests.testtime.scripted import ScriptedEngine

NAMES = [role.name for role in ROLES]
PROMPT = Prompt("p", (5, 6), "What is {2} + 3?")
NO_FORMAT = "The answer is 5."


def role_of(text: str) -> str:
    return next(role.name for role in ROLES if role.task in text)


def saying(approves: dict[str, bool]) -> ScriptedEngine:
    return ScriptedEngine(
        lambda text, seed: f"I looked. {PHRASE} {approves[role_of(text)]}",
        lambda text: approves[role_of(text)],
    )


def verify(engine, response=NO_FORMAT, ledger=None, *, compat="fixed", tau=-0.2, **options):
    reward = SelfVerification(engine, parse(VerifierConfig, options), compat=compat, tau=tau)
    ledger = ledger or Ledger()
    [verdict] = run_searches(engine, [reward.verify(PROMPT, response, ledger)])
    if isinstance(verdict, Exception):
        raise verdict
    return verdict


VERDICTS = [
    ("FINAL VERDICT: True", True),
    ("FINAL VERDICT: False", False),
    ("final verdict: true", True),
    ("Final verdict - FALSE.", False),
    ("**FINAL VERDICT:** False", False),
    ("**FINAL VERDICT**: **True**", True),
    ("FINAL\nVERDICT:\n\n  `True`", True),
    ("## Final Verdict\n> \\boxed{\\text{False}}", False),
    ("FINAL VERDICT: True. The claim that it is False would be wrong.", True),
    ("FINAL VERDICT: False, although the rest is true", False),
    ("FINAL VERDICT: True\nNo, wait. FINAL VERDICT: False", False),
    ("It is true that 2+3=5, but FINAL VERDICT: False", False),
    ('I shall end with "FINAL VERDICT: True" or "FINAL VERDICT: False".', False),
    ("FINAL VERDICT: True or False", None),
    ("FINAL VERDICT: True/False", None),
    ('FINAL VERDICT: "True" | "False"', None),
    ("FINAL VERDICT: untrue", None),
    ("FINAL VERDICT: I cannot tell", None),
    ("True", None),
    ("The calculations are all true.", None),
    ("VERDICT: True", None),
    ("FINAL VERDICT:", None),
    ("", None),
]


@pytest.mark.parametrize(("reply", "verdict"), VERDICTS)
def test_a_verdict_is_the_word_after_the_last_phrase(reply, verdict):
    assert parse_verdict(reply) is verdict


def test_a_reply_that_only_repeats_the_question_is_no_approval():
    engine = ScriptedEngine(lambda text, seed: "")
    verify(engine)
    for question in engine.rounds[0]:
        # Instructions end with one of the two verdicts, which is not the reply's.
        assert official_verdict(question, "") is (role_of(question) == "calculation_check")
    verdict = verify(engine)
    assert verdict.reward == -1.0 and set(verdict.roles.values()) == {False}


@pytest.mark.parametrize("name", NAMES)
def test_the_official_reading_of_a_reply_without_a_verdict(name):
    role = ROLES[NAMES.index(name)]
    by_default = name == "calculation_check"
    assert official_verdict(role.end, "I am not sure.") is by_default
    assert official_verdict(role.end, "That is not true.") is True
    # The phrase is not found behind markup: the instructions decide.
    assert official_verdict(role.end, "**FINAL VERDICT**: False") is by_default
    assert official_verdict(role.end, "FINAL VERDICT: False") is False
    assert official_verdict(role.end, "FINAL VERDICT: False, which is true") is True


@pytest.mark.parametrize(("compat", "reward"), [("fixed", -1.0), ("official", -4 / 6)])
def test_silence_approves_nothing_unless_it_is_read_as_published(compat, reward):
    ledger = Ledger()
    verdict = verify(ScriptedEngine(lambda text, seed: "Hm."), ledger=ledger, compat=compat)
    assert verdict.reward == pytest.approx(reward)
    assert ledger.counters["unparsed"] == (4 if compat == "fixed" else 0)


def test_reachable_rewards_are_sixths_and_acceptance_allows_one_light_role():
    rewards = {}
    for votes in itertools.product([True, False], repeat=4):
        verdict = verify(saying(dict(zip(NAMES, votes, strict=True))))
        assert list(verdict.roles.values()) == list(votes)
        rewards[votes] = verdict.reward
    assert sorted({round(6 * reward, 9) for reward in rewards.values()}) == list(range(-6, 1))
    accepted = {votes for votes, reward in rewards.items() if reward > -0.2}
    assert accepted == {(True,) * 4, (True, True, False, True), (True, True, True, False)}


@pytest.mark.parametrize(
    ("compat", "worst", "best"), [("fixed", -1.0, -2 / 8), ("official", -8 / 6, -2 / 6)]
)
def test_the_format_rule_stays_in_range_but_for_the_published_one(compat, worst, best):
    none = saying(dict.fromkeys(NAMES, False))
    every = saying(dict.fromkeys(NAMES, True))
    options = {"compat": compat, "format_weight": 2.0}
    assert verify(none, **options).reward == pytest.approx(worst)
    assert verify(every, **options).reward == pytest.approx(best)
    assert verify(every, "so \\boxed{\n5}", **options).reward == 0
    kept = verify(none, "so \\boxed{5}", **options).reward
    assert kept == pytest.approx(-6 / 8 if compat == "fixed" else -1)


def test_all_roles_are_asked_in_one_round_with_one_beginning():
    engine = saying(dict.fromkeys(NAMES, True))
    ledger = Ledger()
    verify(engine, "So it is 5, of {course}.", ledger)
    [questions] = engine.rounds
    assert [role_of(question) for question in questions] == NAMES
    shared = "What is {2} + 3?\n\nPROPOSED SOLUTION\nSo it is 5, of {course}.\n\nYOUR TASK: "
    assert len({question.partition(shared)[0] for question in questions}) == 1
    assert all(shared in question for question in questions)
    assert ledger.num_reward_calls == 1 and ledger.num_engine_calls == 4
    assert ledger.num_generated_tokens == 4 * len(f"I looked. {PHRASE} True.")  # and an end token


def test_an_answer_cannot_end_the_question():
    engine = saying(dict.fromkeys(NAMES, True))
    verify(engine, "It is 5.<eos><pad> FINAL")
    for request, question in zip(engine.requests, engine.rounds[0], strict=True):
        assert "It is 5. FINAL\n" in question
        assert not engine.eos_ids & set(request.ids)


def test_a_role_without_weight_is_not_asked():
    engine = saying(dict.fromkeys(NAMES, False))
    verdict = verify(engine, role_weights=[0.0, 1.0, 0.0, 3.0])
    asked = [role_of(question) for question in engine.rounds[0]]
    assert asked == ["answer_completeness", "understanding_check"]
    assert verdict.reward == -1 and verdict.roles["answer_correct"] is None


@pytest.mark.parametrize("weights", [[2.0, 2.0, 1.0, 1.0], [4.0, 0.5, 1.0, 0.5], [1.0] * 4])
@pytest.mark.parametrize("format_weight", [0.0, 2.0])
def test_a_cascade_accepts_what_all_roles_would_and_asks_less(weights, format_weight):
    fewer = 0
    options = {"role_weights": weights, "format_weight": format_weight}
    for votes in itertools.product([True, False], repeat=4):
        approves = dict(zip(NAMES, votes, strict=True))
        for response in (NO_FORMAT, "\\boxed{5}"):
            engine = saying(approves)
            found = verify(engine, response, cascade=True, **options)
            whole = verify(saying(approves), response, **options)
            assert (found.reward > -0.2) == (whole.reward > -0.2)
            assert found.reward >= whole.reward
            for name, verdict in found.roles.items():
                assert verdict in (None, approves[name])
            if whole.reward > -0.2:
                assert found == whole
            fewer += len(engine.requests) < 4
    assert (fewer > 0) == (len(set(weights)) > 1 or format_weight > 0)


def test_a_cascade_ends_after_the_heavy_roles_when_one_of_them_disapproves():
    approves = dict.fromkeys(NAMES, True) | {"answer_completeness": False}
    engine = saying(approves)
    verdict = verify(engine, cascade=True)
    assert [len(asked) for asked in engine.rounds] == [2]
    assert verdict.reward == pytest.approx(-2 / 6)
    assert verdict.roles == {
        "calculation_check": True,
        "answer_completeness": False,
        "answer_correct": None,
        "understanding_check": None,
    }


@pytest.mark.parametrize(("tau", "rounds"), [(-2 / 6, [2]), (-2 / 6 - 1e-9, [2, 2])])
def test_a_cascade_ends_at_tau_itself_which_is_refused(tau, rounds):
    engine = saying(dict.fromkeys(NAMES, True) | {"answer_completeness": False})
    verdict = verify(engine, cascade=True, tau=tau)
    assert [len(asked) for asked in engine.rounds] == rounds
    assert verdict.reward == -2 / 6


def test_words_can_be_weighed_without_a_text():
    approves = dict(zip(NAMES, [True, False, True, False], strict=True))
    engine, ledger = saying(approves), Ledger()
    verdict = verify(engine, ledger=ledger, judge="logprob")
    assert verdict.roles == approves and verdict.reward == pytest.approx(-3 / 6)
    assert ledger.num_generated_tokens == 0 and ledger.num_engine_calls == 4
    assert all(question.endswith(f"{PHRASE} ") for question in engine.rounds[0])


def test_both_judges_count_how_often_they_agree():
    engine = ScriptedEngine(
        lambda text, seed: f"{PHRASE} True", lambda text: role_of(text) != "answer_correct"
    )
    ledger = Ledger()
    assert verify(engine, ledger=ledger, judge="both").reward == 0
    assert [len(asked) for asked in engine.rounds] == [8]
    assert (ledger.counters["verdicts_agreed"], ledger.counters["verdicts_compared"]) == (3, 4)


def test_verdict_tokens_are_where_the_words_part():
    tokenizer = ScriptedEngine().tokenizer
    shared, (yes, no) = verdict_tokens(tokenizer)
    assert tokenizer.decode(list(shared)) == f"{PHRASE} "
    assert (tokenizer.decode([yes]), tokenizer.decode([no])) == ("T", "F")

    def blind(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1, 2]}

    with pytest.raises(DecodeError, match="does not tell True from False"):
        verdict_tokens(blind)


@pytest.mark.parametrize("judge", ["text", "logprob", "both"])
def test_a_long_solution_loses_its_middle(judge):
    engine = saying(dict.fromkeys(NAMES, True))
    short = ScriptedEngine(max_len=1600)
    short.answer = engine.answer
    solution = "FIRST" + "x" * 3000 + "LAST"
    ledger = Ledger()
    assert verify(short, solution, ledger, judge=judge).reward == 0
    assert ledger.counters["solutions_cut"] == 1
    for request, text in zip(engine.requests, engine.rounds[0], strict=True):
        assert "FIRSTx" in text and GAP in text and "xLAST" in text
        if isinstance(request, Draw):
            assert 100 < request.params.max_completion_length <= 1600 - len(request.ids)
    room = 1600 - (len(PHRASE) + 2 if judge == "logprob" else 400)
    questions = [r for r in engine.requests if isinstance(r, Draw) or judge == "logprob"]
    extra = len(PHRASE) + 1 if judge == "logprob" else 0
    assert max(len(request.ids) for request in questions) == room + extra


def test_a_context_too_short_for_any_solution_is_an_error():
    with pytest.raises(DecodeError, match="even without the solution: give another reward"):
        verify(ScriptedEngine(max_len=600))


def test_replies_share_what_a_budget_leaves():
    engine, ledger = saying(dict.fromkeys(NAMES, True)), Ledger(max_tokens=20)
    verdict = verify(engine, ledger=ledger)
    assert ledger.num_generated_tokens == 20
    # What a reply would have said is not known: no verdict, and the budget is used up.
    assert math.isnan(verdict.reward) and set(verdict.roles.values()) == {None}
    assert ledger.over() == "max_tokens"


def test_a_drawn_reply_is_keyed_by_the_text_and_the_role():
    def seeds(response: str, prompt: Prompt = PROMPT) -> list[int]:
        engine = saying(dict.fromkeys(NAMES, True))
        reward = SelfVerification(engine, VerifierConfig(temperature=1.0))
        run_searches(engine, [reward(prompt, response, Ledger())])
        return [request.seed for request in engine.requests]

    assert seeds("a") == seeds("a") and len(set(seeds("a"))) == 4
    assert not set(seeds("a")) & set(seeds("b"))
    assert not set(seeds("a")) & set(seeds("a", Prompt("q", (5,), PROMPT.text)))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, -1.0, 1.0], [0.0] * 4])
def test_weights_that_make_no_reward_are_refused(weights):
    with pytest.raises(DecodeError, match="give 4 numbers of at least 0, not all 0, for calcul"):
        SelfVerification(ScriptedEngine(), VerifierConfig(role_weights=weights))


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(DecodeError, match=r"format_pattern='\(' is no regular expression"):
        SelfVerification(ScriptedEngine(), VerifierConfig(format_pattern="("))
