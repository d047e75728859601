import time

import pytest

from rlalign.config.schema import RewardsConfig, RewardSpec
from rlalign.rewards import BUILTINS, RewardError, check
from rlalign.rewards.call import resolve

COLUMNS = ["answer", "tests", "level"]


def verify(*specs, columns=COLUMNS, **options):
    check(RewardsConfig(functions=list(specs)), columns, **options)


def test_a_good_configuration_passes_without_calling_anything(module):
    name = module("def f(prompts, completions, level, **kw): raise SystemExit")
    verify(
        RewardSpec("exact_match"),
        RewardSpec("python_tests"),
        RewardSpec(f"{name}:f"),
        RewardSpec("llm_judge", params={"base_url": "http://127.0.0.1:9", "model": "m"}),
        RewardSpec("mine"),
        functions={"mine": lambda completions: 1 / 0},
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RewardSpec("exact_mtch"), "did you mean 'exact_match'"),
        (RewardSpec("my_reward"), "package.module:function"),
        (RewardSpec("no_such_pkg.mod:f"), "no module named 'no_such_pkg'"),
        (RewardSpec("json:dump5"), r"json has no 'dump5'; did you mean dump, dumps"),
        (RewardSpec("exact_match", params={"ptern": "(x)"}), "did you mean pattern"),
        (RewardSpec("math", params={"timeout": 3}), "did you mean timeout_s"),
        (RewardSpec("regex"), "missing a required argument: 'pattern'"),
        (RewardSpec("regex", params={"pattern": "("}), "not a regular expression"),
        (RewardSpec("python_tests", params={"column": "unit_tests"}), "requires 'unit_tests'"),
        (RewardSpec("reward_model", params={"path": "./nowhere"}), "no such folder"),
        (RewardSpec("llm_judge", params={"base_url": "x", "model": "m"}), "not an http"),
    ],
)
def test_each_mistake_is_named_with_its_fix_within_seconds(spec, message):
    start = time.monotonic()
    with pytest.raises(RewardError, match=message):
        verify(spec)
    assert time.monotonic() - start < 20


def test_a_column_that_the_data_lacks(module):
    name = module("def f(completions, dificulty): pass")
    with pytest.raises(RewardError, match=r"requires 'dificulty'.*answer, level, tests"):
        verify(RewardSpec(f"{name}:f"))
    verify(RewardSpec(f"{name}:f"), columns=None)


def test_no_function_at_all():
    with pytest.raises(RewardError, match="functions is empty"):
        verify()


@pytest.mark.parametrize("name", BUILTINS)
def test_every_built_in_exists(name):
    assert callable(resolve(BUILTINS[name].path))
