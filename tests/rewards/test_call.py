import asyncio
from typing import Any

import pytest

from rlalign.rewards.call import bind, invoke, resolve, takes
from rlalign.rewards.verdict import RewardError, VerdictKind
from tests.rewards.rows import call


def run(function: Any, batch: Any) -> list[Any]:
    with asyncio.Runner() as runner:
        return invoke(function, batch.arguments(takes(function)), len(batch), runner)


def test_a_function_gets_only_what_it_takes():
    def narrow(completions, level):
        return [float(x) for x in level]

    batch = call("a", "b", level=[1, 2], other=[3, 4])
    assert [v.value for v in run(narrow, batch)] == [1.0, 2.0]


def test_a_function_with_kwargs_gets_every_column_and_the_token_ids():
    seen = {}

    def wide(prompts, completions, **columns):
        seen.update(columns)
        return [0.0] * len(prompts)

    run(wide, call("ab", "c", level=[1, 2], answer=["x", "y"]))
    assert seen == {"completion_ids": [[0, 0], [0]], "level": [1, 2], "answer": ["x", "y"]}


@pytest.mark.parametrize("alias", ["answer", "solution", "ground_truth"])
def test_the_answer_column_has_three_names(alias):
    namespace: dict[str, Any] = {}
    exec(f"def f(completions, {alias}): return [float(a) for a in {alias}]", namespace)
    assert not takes(namespace["f"]).missing_from(["answer"])
    assert run(namespace["f"], call("a", answer=["7"]))[0].value == 7.0


def test_required_columns_are_parameters_without_default():
    def f(prompts, completions, level, style="plain", **columns):
        return []

    assert takes(f).missing_from(["answer"]) == ["level"]


def test_async_functions_and_async_objects_are_awaited():
    async def later(completions):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    class Later:
        async def __call__(self, completions):
            return await later(completions)

    assert run(later, call("a"))[0].value == 2.0
    assert run(Later(), call("a"))[0].value == 2.0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("lost"), VerdictKind.CRASH),
        (MemoryError(), VerdictKind.OOM),
        (TimeoutError(), VerdictKind.TIMEOUT),
    ],
)
def test_what_a_function_raises_is_typed_and_keeps_its_traceback(error, kind):
    def raising(completions):
        raise error

    verdicts = run(raising, call("a", "b"))
    assert [v.kind for v in verdicts] == [kind, kind]
    if kind is VerdictKind.CRASH:
        assert "KeyError: 'lost'" in verdicts[0].detail
        assert "in raising" in verdicts[0].detail


def test_params_bind_to_a_reward_and_build_a_factory():
    def reward(completions, bonus=0.0):
        return [bonus] * len(completions)

    def factory(bonus):
        return lambda completions: [bonus + 1.0] * len(completions)

    class Stateful:
        def __init__(self, bonus):
            self.bonus = bonus

        def __call__(self, completions):
            return [self.bonus + 2.0] * len(completions)

    made = [bind(target, {"bonus": 3.0}, name="x") for target in (reward, factory, Stateful)]
    assert [run(function, call("a"))[0].value for function in made] == [3.0, 4.0, 5.0]


def test_a_wrong_parameter_names_its_neighbour():
    def factory(threshold=1.0, margin=0.0):
        return print

    with pytest.raises(RewardError, match=r"did you mean threshold\?.*threshold, margin"):
        bind(factory, {"treshold": 2}, name="mine")


def test_a_factory_that_returns_no_function_is_explained():
    with pytest.raises(RewardError, match=r"takes no `completions`.*returned float"):
        bind(lambda: 0.5, {}, name="pkg.mod:oops")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.rewards:f", "no module named 'no_such_package'"),
        ("rlalign.rewards.text:exact_mach", r"did you mean exact_match\?"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(path, message):
    with pytest.raises(RewardError, match=message):
        resolve(path)
