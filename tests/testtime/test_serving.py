"""Methods as the server is given them: names, what clients may say, budgets, rewards, progress."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.config import ConfigError, parse
from rlalign.config.serving import ServeTesttimeConfig
from rlalign.config.testtime import (
    BestOfConfig,
    LatentSeekConfig,
    MajorityConfig,
    RainConfig,
    VerifierConfig,
)
from rlalign.errors import RlalignError
from rlalign.models.random import write_random_model
from rlalign.rewards.verdict import RewardError
from rlalign.rollout.search import run_searches
from rlalign.rollout.server.methods import Asked, Progress
from rlalign.testtime import serving
from rlalign.testtime.best_of_n import best_of_n
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.latent_seek import latent_seek
from rlalign.testtime.majority import majority
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.rain import rain
from rlalign.testtime.rewards import FunctionReward
from rlalign.testtime.serving import MAX_NUMBER, ServedMethods

QUESTION = "75-9-5=?"
ORACLE = {"reward": "right", "columns": {"answer": "61"}}


def served(**options) -> ServedMethods:
    rewards = [
        {"name": "right", "function": "exact_match", "params": {"pattern": "<answer>(.*)</"}}
    ]
    return ServedMethods(parse(ServeTesttimeConfig, {"rewards": rewards, **options}))


@pytest.fixture(scope="module")
def methods():
    with contextlib.closing(served()) as methods:
        yield methods


@pytest.fixture(scope="module")
def engine():
    return open_engine("mini:chain")


@pytest.fixture(scope="module")
def long_engine(tmp_path_factory):
    """A context in which a model can be asked about its answers."""
    folder = write_random_model(
        tmp_path_factory.mktemp("model"), "qwen2", hidden=32, layers=2, max_positions=4096
    )
    return open_engine(str(folder))


def asked(engine, **options) -> Asked:
    return Asked("0", tuple(engine.tokenizer(QUESTION)["input_ids"]), QUESTION, options)


def find(methods, engine, name, progress=None, **options):
    options = {"seed": 1, "max_new_tokens": 40, **options}
    search = methods.begin(name, engine, asked(engine, **options), progress or Progress())
    [found] = run_searches(engine, [search])
    if isinstance(found, Exception):
        raise found
    return found


def test_the_names_are_those_that_it_knows(methods):
    assert methods.names() == ["best-of-8", "majority-8", "latent-seek", "rain"]
    for name in (*methods.names(), "best-of-1", "majority-99999"):
        assert methods.knows(name)
    for name in ("best-of", "best-of-0", "best-of-08", "best-of-8x", "rain-8", "", "latent_seek",
                 "best-of-100000", "best-of--1"):  # fmt: skip
        assert not methods.knows(name)


def test_each_method_finds_what_it_finds_without_a_server(methods, engine):
    row = {"prompt": QUESTION, "answer": "61"}
    common = {"seed": 1, "max_new_tokens": 40}
    climb = {"rho": 0.8, "lr": 10.0, "tau": 0.5}
    grow = {"max_searches": 10, "score_range": [0.0, 1.0]}
    with FunctionReward("exact_match", {"pattern": "<answer>(.*)</"}) as reward:
        [best] = best_of_n(engine, [row], reward, num_samples=8, **common)
        [most] = majority(engine, [row], num_samples=5, **common)
        [sought] = latent_seek(engine, [row], reward, **climb, **common)
        [grown] = rain(engine, [row], reward, **grow, **common)
    for name, options, want in (
        ("best-of-8", ORACLE, best),
        ("majority-5", {}, most),
        ("latent-seek", {**ORACLE, **climb}, sought),
        ("rain", {**ORACLE, **grow}, grown),
    ):
        found = find(methods, engine, name, **options)
        assert found.text == want.text
        assert (found.num_tokens, found.finish) == (len(want.token_ids), want.finish)
        assert found.num_generated_tokens == want.num_generated_tokens
        assert found.account["stop_reason"] == want.stop_reason
        assert found.account["reward"] == want.reward
        assert found.account["counters"] == want.counters


def test_token_ids_alone_are_read_as_text_for_rewards(methods, engine):
    given = asked(engine, **ORACLE)
    search = methods.begin(
        "best-of-1", engine, Asked("0", given.ids, None, given.options), Progress()
    )
    [rate] = search.send(engine.answer(next(search)))
    assert rate.prompt.text == QUESTION and rate.prompt.row == {"answer": "61"}


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"num_sample": 3}, "num_samples"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": "x"}, "max_new_tokens"),
        ({"num_samples": 3}, "num_samples=3 with best-of-8"),
        ({"reward": "math"}, "this server has self, right"),
        ({"reward": "os:system"}, "this server has self, right"),
        ({"reward": ["right"]}, "this server has"),
        ({"columns": [1]}, "columns"),
        ({"columns": {"completions": [1]}}, "'completions' is no name of a column"),
        ({"columns": {"a b": 1}}, "'a b' is no name of a column"),
        ({"temperature": math.nan}, "finite"),
        ({"max_wall_s": math.inf}, "finite"),
        ({"max_tokens": 262_145}, "this server gives 262144 at most .testtime.max_search_tokens"),
        ({"max_wall_s": 301}, "this server gives 300"),
        ({"top_k": MAX_NUMBER + 1}, "65536 at most"),
        ({"top_k": "${oc.env:HOME}"}, "not from a request"),
        ({"seed": 2**31}, "seed"),
    ],
)
def test_what_a_client_may_not_say_is_an_error_by_name(methods, engine, options, reason):
    with pytest.raises((DecodeError, ConfigError), match=reason):
        methods.begin("best-of-8", engine, asked(engine, **options), Progress())


@pytest.mark.parametrize(
    "name, options",
    [
        ("rain", {"embedder": "/some/model"}),
        ("latent-seek", {"verifier": {"format_pattern": "(a+)+$"}}),
        ("majority-8", {"extract": "pattern:(a+)+$"}),
        ("rain", {"num_attempts": 10**9}),
        ("rain", {"set_lengths": [10**9]}),
        ("rain", {"rollout": {"boundary": "${oc.env:HOME}"}}),
    ],
)
def test_a_request_names_no_files_no_patterns_and_no_millions(methods, engine, name, options):
    with pytest.raises(DecodeError, match=r"cannot be set by a request|not from|65536 at most"):
        methods.begin(name, engine, asked(engine, **options), Progress())


def test_sampling_fields_are_refused_where_nothing_is_sampled(methods, engine):
    quiet = {"temperature": 0, "top_p": 1.0, "top_k": 0}
    assert find(methods, engine, "latent-seek", **ORACLE, **quiet).text
    for name, value in (("temperature", 0.5), ("top_p", 0.9), ("top_k", 5)):
        with pytest.raises(DecodeError, match=f"{name}: latent-seek does not sample"):
            methods.begin("latent-seek", engine, asked(engine, **{name: value}), Progress())
    hot = find(methods, engine, "best-of-1", **ORACLE, temperature=2.0).text
    assert hot != find(methods, engine, "best-of-1", **ORACLE, temperature=0.0).text


def test_the_servers_budgets_hold_where_a_client_has_none(engine):
    with contextlib.closing(served(max_search_tokens=100)) as methods:
        grown = find(methods, engine, "rain", **ORACLE)
        assert grown.finish == grown.account["stop_reason"] == "max_tokens"
        assert 100 <= grown.num_generated_tokens < 300  # looked at between rounds
        own = find(methods, engine, "rain", **ORACLE, max_tokens=30)
        assert own.finish == "max_tokens" and own.num_generated_tokens < grown.num_generated_tokens
        few = find(methods, engine, "best-of-8", **ORACLE)
        assert few.finish == "max_tokens" and few.num_generated_tokens <= 100
    with contextlib.closing(served(max_search_s=1e-9)) as methods:
        late = find(methods, engine, "rain", **ORACLE)
        assert late.finish == "max_wall_s"


def test_samples_that_stay_below_the_budget_are_drawn_at_once(methods, engine):
    search = methods.begin("best-of-8", engine, asked(engine, **ORACLE), Progress())
    assert len(next(search)) == 8
    with contextlib.closing(served(max_search_tokens=8 * 40 - 1)) as fewer:
        short = asked(engine, **ORACLE, max_new_tokens=40)
        assert len(next(fewer.begin("best-of-8", engine, short, Progress()))) == 1


def test_the_model_judges_itself_unless_a_reward_is_asked_for(methods, long_engine, monkeypatch):
    """Majority counts votes, unless it is told to weigh them."""
    # A model of random weights would not come to its verdict.
    monkeypatch.setattr(serving, "VerifierConfig", lambda: VerifierConfig(max_new_tokens=4))
    short = {"verifier": {"max_new_tokens": 4}}
    for name, options, judged in (
        ("best-of-2", {}, True),
        ("majority-2", {}, False),
        ("majority-2", {"reward": "self"}, True),
        ("latent-seek", {**short, "max_steps": 0}, True),
        ("rain", {"max_total_searches": 2}, True),
        ("rain", {"max_total_searches": 2, "reward": "right", "columns": {"answer": "1"}}, True),
    ):
        progress = Progress()
        found = find(methods, long_engine, name, progress, max_new_tokens=4, **options)
        assert (found.account["num_reward_calls"] > 0) == judged
        assert (progress.best_reward is not None) == judged
        if name.startswith(("best", "latent")):
            assert progress.best_reward == found.account["reward"]


def test_a_reward_that_is_missing_stops_the_server_before_it_starts():
    def start(*rewards):
        ServedMethods(parse(ServeTesttimeConfig, {"rewards": list(rewards)})).close()

    with pytest.raises(RewardError, match="no_such"):
        start({"name": "no_such"})
    with pytest.raises(DecodeError, match="'math' is the name of two"):
        start({"name": "math"}, {"name": "math", "function": "exact_match"})
    with pytest.raises(DecodeError, match="'self' is the name of two; 'self' is taken"):
        start({"name": "self", "function": "math"})


def test_a_missing_column_is_the_clients_to_give(methods, engine):
    with pytest.raises(RewardError, match="requires 'answer'"):
        find(methods, engine, "best-of-2", reward="right")


def test_an_unknown_method_is_named(methods, engine):
    with pytest.raises(DecodeError, match="no method 'rain-3'; choose one of"):
        methods.begin("rain-3", engine, asked(engine), Progress())


def test_a_search_of_a_prompt_that_fills_the_context_says_so(methods, engine):
    ids = (5,) * engine.limits.max_len
    search = methods.begin("best-of-2", engine, Asked("0", ids, "", ORACLE), Progress())
    [error] = run_searches(engine, [search])
    assert isinstance(error, DecodeError) and "no token can follow" in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
KINDS = {"best-of-2": BestOfConfig, "majority-2": MajorityConfig, "latent-seek": LatentSeekConfig,
         "rain": RainConfig}  # fmt: skip


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_a_client_says_it_is_an_error_by_name_or_a_search(methods, engine, data):
    name = data.draw(st.sampled_from([*KINDS]))
    fields = [*(field.name for field in dataclasses.fields(KINDS[name])), "reward", "columns", "x"]
    options = data.draw(st.dictionaries(st.sampled_from(fields), JSON, max_size=4))
    try:
        search = methods.begin(name, engine, asked(engine, **options), Progress())
    except RlalignError as error:
        assert str(error)
    else:
        search.close()
