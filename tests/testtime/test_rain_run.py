"""Where answers and continuations end, and what a score is worth."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.config.testtime import RainConfig, RolloutConfig
from rlalign.models.random import write_random_model
from rlalign.rollout.search import run_searches
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.prompt import Prompt, plain_text
from rlalign.testtime.rain_run import Ends, Run, boundary_ids, check

CHARACTERS = ",.?:;\n"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    return open_engine(str(write_random_model(folder, "qwen2", max_positions=64)))


def ids_of(engine, text: str) -> tuple[int, ...]:
    return tuple(engine.tokenizer(text, add_special_tokens=False)["input_ids"])


def ends(engine, prompt: str = "Hi", **options) -> Ends:
    return Ends(engine, Prompt("0", ids_of(engine, prompt), prompt), RainConfig(**options))


def test_boundaries_are_the_tokens_whose_last_character_is_one(engine):
    found = boundary_ids(engine.tokenizer, CHARACTERS, 262)
    assert {engine.tokenizer.decode([i]) for i in found} == set(CHARACTERS)
    assert boundary_ids(engine.tokenizer, "", 262) == frozenset()


@given(st.text(alphabet="ab ,.;é\n?", max_size=30))
def test_stopping_at_a_token_is_stopping_at_the_character(text):
    tokenizer = _tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stop_ids = boundary_ids(tokenizer, CHARACTERS, 262)
    end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids))
    expected = ""
    for character in text:
        expected += character
        if character in CHARACTERS:
            break
    assert plain_text(tokenizer, ids[:end]) == expected


def _tokenizer():
    from rlalign.models.tokenizer import build_tokenizer

    return build_tokenizer()


def test_a_set_is_cut_behind_an_end_of_sequence_and_at_the_longest_answer(engine):
    short = ends(engine, max_new_tokens=5)
    assert short.close((7, 8), (9, 1, 9)) == ((9, 1), True)
    assert short.close((7, 8), (9, 9, 9, 9)) == ((9, 9, 9), True)
    assert short.close((7, 8), (9, 9)) == ((9, 9), False)
    assert short.why((7, 1)) == "eos" and short.why((7, 8)) == "length"


def test_the_context_bounds_the_answer(engine):
    assert ends(engine, "x" * 60).room == 4
    with pytest.raises(DecodeError, match="64 tokens"):
        ends(engine, "x" * 64)


def test_another_turn_ends_the_answer_and_is_no_part_of_its_text(engine):
    marked = ends(engine, "Human: a\nAI:", rollout=RolloutConfig(turn_marker="\nHuman:"))
    before, tokens = ids_of(engine, "no\nHum"), ids_of(engine, "an: b")
    assert marked.close(before, tokens) == (ids_of(engine, "an:"), True)
    assert marked.text(before + tokens) == "no"
    assert marked.why(before + tokens) == "turn"
    assert marked.close((), ids_of(engine, "Human")) == (ids_of(engine, "Human"), False)
    assert ends(engine).text(before + tokens) == "no\nHuman: b"


def test_the_prompt_s_end_is_a_boundary_only_officially(engine):
    assert not ends(engine, "AI:").at_boundary(())
    assert ends(engine, "AI:", compat="official").at_boundary(())
    for compat in ("fixed", "official"):
        both = ends(engine, "AI:", compat=compat)
        assert both.at_boundary(ids_of(engine, "so,")) and not both.at_boundary(
            ids_of(engine, "so")
        )


def test_scores_are_mapped_clipped_remembered_and_minus_one_where_there_is_none(engine):
    asked = []

    def scorer(prompt, response, ledger):
        asked.append(response)
        return {"none": math.nan, "low": 0.0, "mid": 0.75, "high": 3.0}[response]
        yield

    run = Run(engine, Prompt("0", (5,), "Q"), scorer, RainConfig(score_range=[0.0, 1.0]))
    wanted = ["none", "low", "mid", "high", "mid", "none"]
    assert run_searches(engine, [run.value(text) for text in wanted]) == [-1, -1, 0.5, 1, 0.5, -1]
    assert asked == ["none", "low", "mid", "high", "none"] and run.ledger.counters["unscored"] == 2


def test_nothing_is_embedded_where_nothing_needs_it(engine):
    def vectors(**options):
        run = Run(engine, Prompt("0", (5,), "Q"), None, RainConfig(**options))  # type: ignore[arg-type]
        return run_searches(engine, [run.embed(["a"])])[0]

    assert vectors(gamma_sim=0.0, max_children=0) == [None]
    assert vectors(embedder="none") == [None]
    assert vectors(gamma_sim=0.0)[0] is not None  # type: ignore[index]


@pytest.mark.parametrize(
    "options",
    [{"set_lengths": []}, {"set_lengths": [1, 0]}, {"score_range": [1.0]},
     {"score_range": [1.0, 1.0]}],
)  # fmt: skip
def test_lists_that_make_no_sense_are_refused(options):
    with pytest.raises(DecodeError):
        check(RainConfig(**options))
