"""Mini models: a function of the seed, built once by one builder, never half there."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

import rlalign.models.building as building
import rlalign.models.mini as mini
from rlalign.config import ModelConfig
from rlalign.models.building import START_FILE
from rlalign.models.errors import ModelError
from rlalign.models.load import load_causal_lm, load_tokenizer
from rlalign.models.mini import build_mini, recipe_digest
from rlalign.models.tokenizer import build_tokenizer
from rlalign.models.warm_start import greedy_accuracy, warm_start
from rlalign.tasks import chain
from rlalign.tasks.mini import MiniModel, MiniTask, WarmStart

QUIET = lambda stage, done, total: None  # noqa: E731


def tiny_task(steps: int = 3) -> MiniTask:
    phases = tuple(dataclasses.replace(phase, steps=steps) for phase in chain.TASK.model.phases)
    model = MiniModel(phases, hidden=16, layers=1, mlp=16, batch_size=4, eval_size=4)
    return dataclasses.replace(chain.TASK, model=model)


@pytest.fixture
def tiny(monkeypatch):
    """`mini:chain` with a recipe of a second; the machinery is the real one."""
    monkeypatch.setattr(mini, "get_mini_task", lambda name: tiny_task())


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("tiny")
def test_weights_are_a_function_of_the_seed(tmp_path):
    first, again = (build_mini("chain", 1, tmp_path / name, QUIET) for name in "ab")
    other = build_mini("chain", 2, tmp_path / "a", QUIET)
    assert weights(first) == weights(again) != weights(other)
    assert {first.parent, other.parent} == {tmp_path / "a" / "models"}


@pytest.mark.usefixtures("tiny")
def test_a_build_leaves_threads_and_random_state_alone(tmp_path):
    torch.set_num_threads(2)
    try:
        state = torch.get_rng_state()
        build_mini("chain", 0, tmp_path, QUIET)
        assert torch.get_num_threads() == 2
        assert torch.equal(state, torch.get_rng_state())
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("tiny")
def test_the_folder_is_complete_used_again_and_alone(tmp_path, monkeypatch):
    folder = build_mini("chain", 0, tmp_path, QUIET)
    start = json.loads((folder / START_FILE).read_text())
    assert start["task"] == "mini:chain" and 0 <= start["greedy_accuracy"] <= 1
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert build_mini("chain", 0, tmp_path, QUIET) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [p.name for p in folder.parent.iterdir() if not p.name.startswith(".")] == [folder.name]
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path))
    config = ModelConfig(path="mini:chain")
    assert load_causal_lm(config, 0).config.hidden_size == 16
    assert len(load_tokenizer(config, 0)) == 262


@pytest.mark.usefixtures("tiny")
def test_stages_are_named_and_counted(tmp_path):
    seen = []
    build_mini("chain", 0, tmp_path, lambda *event: seen.append(event))
    names = [phase.name for phase in chain.TASK.model.phases]
    assert seen == [(name, done, 3) for name in names for done in (1, 2, 3)]


def test_a_changed_recipe_gets_another_folder():
    base = chain.TASK
    first, *rest = base.model.phases

    def with_first(**changes):
        phases = (dataclasses.replace(first, **changes), *rest)
        return dataclasses.replace(base, model=dataclasses.replace(base.model, phases=phases))

    changed = [
        dataclasses.replace(base, model=dataclasses.replace(base.model, hidden=64)),
        with_first(steps=1),
        with_first(lr=1.0),
        with_first(demonstrations=rest[0].demonstrations),
    ]
    digests = [recipe_digest(task, 0) for task in (base, *changed)]
    assert len(set(digests)) == len(digests)
    assert recipe_digest(base, 0) == digests[0]


def build_slowly(folder, started):
    """A builder in a process of its own: tells when it trains, then takes its time."""

    def dawdle(*_):
        started.set()
        time.sleep(0.4)

    mini.get_mini_task = lambda name: tiny_task()
    build_mini("chain", 0, folder, dawdle)


def run_builder(folder):
    context = multiprocessing.get_context("spawn")  # forking a threaded torch can deadlock
    started = context.Event()
    process = context.Process(target=build_slowly, args=(folder, started))
    process.start()
    assert started.wait(60), "the builder did not start within 60 s"
    return process


@pytest.mark.usefixtures("tiny")
def test_a_second_builder_waits_with_a_deadline_and_uses_the_first_ones_folder(
    tmp_path, monkeypatch
):
    process = run_builder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(building, "LOCK_TIMEOUT_S", 0.1)
        with pytest.raises(
            ModelError, match=r"another process to build chain-seed0.*RLALIGN_CACHE"
        ):
            build_mini("chain", 0, tmp_path, QUIET)
    events = []
    folder = build_mini("chain", 0, tmp_path, lambda *event: events.append(event))
    process.join(60)
    assert process.exitcode == 0
    assert events == []  # built by the other
    assert (folder / START_FILE).is_file()


@pytest.mark.usefixtures("tiny")
def test_a_killed_builder_leaves_nothing_that_counts(tmp_path):
    process = run_builder(tmp_path)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    visible = [p for p in (tmp_path / "models").iterdir() if not p.name.startswith(".")]
    assert visible == []
    folder = build_mini("chain", 0, tmp_path, QUIET)
    assert (folder / START_FILE).is_file()
    assert not list(folder.parent.glob("*.tmp"))


@pytest.mark.usefixtures("tiny")
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot be written.*RLALIGN_CACHE"):
        build_mini("chain", 0, tmp_path / "file", QUIET)


def test_training_lowers_the_loss_on_what_it_is_shown():
    """A model shown one demonstration again and again writes it, and so is right on it."""
    shown = chain.draw_chain(random.Random(0), 2)
    row = {"prompt": shown.prompt, "answer": shown.answer}

    def endlessly(seed):
        while True:
            yield shown.prompt, chain.demonstrate(shown, random.Random(0))

    model = MiniModel(
        (WarmStart("one", 120, 6e-3, 1e-2, endlessly),),
        hidden=32,
        layers=1,
        mlp=32,
        batch_size=2,
        eval_size=1,
    )
    task = MiniTask("one", lambda split, **_: [row], chain.check_completion, model)
    tokenizer = build_tokenizer()
    assert greedy_accuracy(warm_start(task, 0, tokenizer), tokenizer, task) == 1.0
    untrained = dataclasses.replace(task, model=dataclasses.replace(model, phases=()))
    assert greedy_accuracy(warm_start(untrained, 0, tokenizer), tokenizer, task) == 0.0


@pytest.mark.slow
def test_the_start_of_seed_0_leaves_room_to_learn(tmp_path):
    folder = build_mini("chain", 0, tmp_path, QUIET)
    start = json.loads((folder / START_FILE).read_text())
    # Room for a rise of 40 points below the 97 % that the policy reaches. Rounding differs between
    # processors, and training carries that on: .495 and .505 were seen.
    assert 0.35 <= start["greedy_accuracy"] <= 0.55
