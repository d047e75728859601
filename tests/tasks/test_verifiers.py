"""verifiers environments: single-turn tasks load, and their own rewards judge a completion."""

from __future__ import annotations

import sys

import pytest

from rlalign.config import TaskConfig
from rlalign.models.tokenizer import build_tokenizer
from rlalign.tasks import TaskError, load_prompts

ENVIRONMENT = """
import verifiers.v1 as vf
from verifiers.v1.utils.decorators import reward

class Data(vf.TaskData):
    answer: str

class Add(vf.Task[Data]):
    NEEDS_CONTAINER = {needs_container}

    @reward(weight=2.0)
    async def right(self, trace) -> float:
        return float(self.data.answer in trace.last_reply)

    @reward
    async def short(self, trace) -> float:
        return float(len(trace.last_reply) < 10)

class Config(vf.TasksetConfig):
    offset: int = 1

class Adds(vf.Taskset[Add, Config]):
    INFINITE = {infinite}

    def load(self):
        for i in range(5):
            right = str(i + self.config.offset)
            data = Data(prompt=f"{{i}}+{{self.config.offset}}=?", answer=right)
            yield Add(data, self.config.task)

__all__ = ["Adds"]
"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Installs an environment package and returns its name."""
    pytest.importorskip("verifiers.v1")
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, needs_container=False, infinite=False) -> str:
        text = ENVIRONMENT.format(needs_container=needs_container, infinite=infinite)
        (tmp_path / f"{name.replace('-', '_')}.py").write_text(text)
        return name

    return install


def load(name: str, **params):
    return load_prompts(
        TaskConfig(train=f"verifiers:{name}", params=params), build_tokenizer(), split="train"
    )


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(TaskError, match=r"verifiers 0\.4 or later.*pip install 'rlalign\[envs\]'"):
        load("gsm8k")


def test_tasks_become_prompts_and_their_rewards_judge(environment):
    from rlalign.tasks.verifiers import reward

    prompts = load(environment("add-plain"), offset=3, size=4)
    assert [(p.source, p.answer) for p in prompts] == [(f"{i}+3=?", str(i + 3)) for i in range(4)]
    columns = {name: [p.columns[name] for p in prompts] for name in prompts.columns[1:]}
    said = ["3", "nothing at all", "it is certainly 5", "7"]
    assert reward(said, **columns) == [3.0, 0.0, 2.0, 1.0]


def test_what_is_not_single_turn_or_not_there_is_refused(environment):
    with pytest.raises(TaskError, match="not single-turn: its tasks run in a container"):
        load(environment("add-boxed", needs_container=True))
    with pytest.raises(TaskError, match="never ends: set the parameter size"):
        load(environment("add-endless", infinite=True))
    with pytest.raises(TaskError, match="bogus"):
        load(environment("add-params"), bogus=1)
    with pytest.raises(TaskError, match="not installed"):
        load("no-such-environment")
