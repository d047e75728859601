"""Rollouts drawn ahead: the order of the batches, how old their samples may be, and what a resumed
run sees. On a real server where versions matter, on scripted draws where the order does."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rlalign
from rlalign.config import ConfigError
from rlalign.models.random import write_random_model
from rlalign.rollout.engine import EngineError, WeightsLost
from rlalign.trainer import ahead
from rlalign.trainer.ahead import Drawn, RolloutsAhead
from rlalign.trainer.collect import Collected
from tests.rollout.live_server import LiveServer
from tests.support import tiny_config

# --- scripted draws ------------------------------------------------------------------------------


def scripted(monkeypatch, max_lag: int, fail_at: int = -1, error: type = EngineError):
    """A job of 5 steps whose draws take two prompts each and note (step, cursor, thread); that of
    step `fail_at` always raises `error`."""
    calls: list[tuple[int, int, str]] = []

    def draw(job: Any, step: int, source: Any) -> Drawn:
        calls.append((step, source.cursor, threading.current_thread().name))
        source.cursor += 2
        if step == fail_at:
            raise error("the engine is gone")
        return Drawn(Collected(), {"step": float(step)}, {}, source.cursor, [], 7)

    monkeypatch.setattr(ahead, "draw", draw)
    config = SimpleNamespace(
        rollout=SimpleNamespace(
            max_lag=max_lag, oversample=1.0, server=SimpleNamespace(in_flight="wait")
        ),
        trainer=SimpleNamespace(max_steps=5),
        task=SimpleNamespace(completions="rollout"),
        algo=SimpleNamespace(allocation=SimpleNamespace(allocator="uniform")),
    )
    progress = SimpleNamespace(step=0, cursor=0, carried=[])
    parts = {"rollout": None, "progress": progress, "stage": lambda text: None}
    return SimpleNamespace(config=config, **parts), calls


def never() -> None:
    raise AssertionError("no weights were lost")


@pytest.mark.parametrize("max_lag", [0, 1, 3, 9])
def test_every_step_gets_its_batch_once_and_none_is_drawn_beyond_the_last(monkeypatch, max_lag):
    job, calls = scripted(monkeypatch, max_lag)
    rollouts = RolloutsAhead(job, never)
    for step in range(5):
        drawn = rollouts.take()
        assert (drawn.figures["step"], drawn.cursor) == (step, 2 * step + 2)
        assert len(calls) <= step + 1 + max_lag
        job.progress.step += 1
        rollouts.settle()
    rollouts.close()
    assert [(step, cursor) for step, cursor, _ in calls] == [(n, 2 * n) for n in range(5)]
    main = threading.current_thread().name
    assert all((thread == main) == (max_lag == 0) for *_, thread in calls)


def test_a_resumed_run_draws_from_where_its_checkpoint_stands(monkeypatch):
    job, calls = scripted(monkeypatch, max_lag=2)
    job.progress.step, job.progress.cursor = 3, 6
    rollouts = RolloutsAhead(job, never)
    assert rollouts.take().figures["step"] == 3
    rollouts.settle()
    rollouts.close()
    assert [call[:2] for call in calls] == [(3, 6), (4, 8)]


def test_a_draw_that_fails_ends_the_step_that_needs_it_with_its_words(monkeypatch):
    job, _ = scripted(monkeypatch, max_lag=1, fail_at=1)
    rollouts = RolloutsAhead(job, never)
    rollouts.take()
    with pytest.raises(EngineError, match="the engine is gone"):
        rollouts.take()
    rollouts.close()


@pytest.mark.parametrize("max_lag", [0, 1, 2, 4])
@pytest.mark.parametrize("fail_at", [0, 2, 4])
def test_draws_whose_weights_were_lost_are_done_again_under_the_trainers(
    monkeypatch, max_lag, fail_at
):
    """Every draw fails until the weights are sent; twice they are lost on their way."""
    job, calls = scripted(monkeypatch, max_lag)
    draw, left = ahead.draw, 3
    published: list[int] = []

    def losing(job: Any, step: int, source: Any) -> Drawn:
        if step >= fail_at and left:
            source.cursor += 1  # whatever it had begun
            raise WeightsLost("they died")
        return draw(job, step, source)

    def publish() -> None:
        nonlocal left
        left -= 1
        published.append(job.progress.step)

    monkeypatch.setattr(ahead, "draw", losing)
    monkeypatch.setattr(ahead, "MAX_RESENDS", 4)
    rollouts = RolloutsAhead(job, publish)
    for step in range(5):
        drawn = rollouts.take()
        assert (drawn.figures["step"], drawn.cursor) == (step, 2 * step + 2)
        job.progress.step += 1
        rollouts.before_update()
    rollouts.close()
    assert published == [fail_at] * 3
    assert [call[:2] for call in calls] == [(n, 2 * n) for n in range(5)]


@pytest.mark.parametrize("max_lag", [1, 2, 3])
def test_settling_waits_for_every_draw_that_is_begun(monkeypatch, max_lag):
    job, calls = scripted(monkeypatch, max_lag)
    quick = ahead.draw
    monkeypatch.setattr(ahead, "draw", lambda *args: time.sleep(0.05) or quick(*args))
    rollouts = RolloutsAhead(job, never)
    rollouts.take()
    rollouts.settle()
    assert len(calls) == 1 + max_lag
    rollouts.close()


def test_weights_that_are_lost_again_and_again_end_the_run(monkeypatch):
    job, _ = scripted(monkeypatch, 1, 0, WeightsLost)
    rollouts = RolloutsAhead(job, lambda: None)
    with pytest.raises(WeightsLost, match="3 times in a row"):
        rollouts.take()
    rollouts.close()


def test_the_trainers_idle_time_is_measured(monkeypatch):
    job, _ = scripted(monkeypatch, max_lag=1)
    quick = ahead.draw
    monkeypatch.setattr(ahead, "draw", lambda *args: time.sleep(0.2) or quick(*args))
    rollouts = RolloutsAhead(job, never)
    rollouts.take()
    first = rollouts.waited_s
    assert first >= 0.2
    time.sleep(0.4)  # the trainer works, and the second batch is drawn
    rollouts.take()
    assert rollouts.waited_s - first < 0.1
    rollouts.close()


def test_drawing_ahead_needs_an_engine_in_another_process(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.max_lag = 1 needs .*rlalign serve MODEL"):
        tiny_config(tmp_path, ["rollout.max_lag=1"])


# --- a real server -------------------------------------------------------------------------------

on_a_server = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Path, LiveServer]]:
    folder = tmp_path_factory.mktemp("run")
    shape = {"hidden": 64, "heads": 2, "kv_heads": 1, "layers": 2, "max_positions": 64}
    model = write_random_model(folder / "model", "qwen2", **shape)
    tiny_config(folder)  # its prompts
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}+{i + 3}=?"}) + "\n" for i in range(12))
    )
    server = LiveServer(model, folder, "max_len=64")
    yield folder, server
    assert server.close() == 0


def train(folder: Path, server: LiveServer, name: str, *overrides: str, resume: bool = False):
    settings = [
        f"name={name}", "rollout.engine=server", f"rollout.server.name={server.connection}",
        "trainer.max_steps=6", "trainer.checkpoint_every=2", *overrides,
    ]  # fmt: skip
    result = rlalign.train(tiny_config(folder, settings), quiet=True, resume=resume)
    lines = (result.path / "metrics.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


def samples_of(result, step: int) -> list[dict[str, Any]]:
    path = result.path / "rollouts" / f"step_{step:06}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("served")
class TestServed:
    pytestmark = on_a_server

    def test_samples_are_one_version_old_and_no_older(self, served):
        result, rows = train(*served, "ahead", "rollout.max_lag=1")
        assert [row["policy/lag_max"] for row in rows] == [0, 1, 1, 1, 1, 1]
        for step in range(1, 7):
            versions = {v for row in samples_of(result, step) for v in row["versions"]}
            assert versions == {max(0, step - 2)}

    def test_lag_0_takes_the_steps_of_vllm_in_the_trainers_process(self, served):
        """The same engine elsewhere: same prompts, seeds and weights, and so the same samples."""
        folder, server = served
        result, rows = train(folder, server, "synchronous")
        assert all(row["policy/lag_max"] == 0 for row in rows)
        local = rlalign.train(
            tiny_config(folder, ["name=local", "rollout.engine=vllm", "trainer.max_steps=6"]),
            quiet=True,
        )
        for step in range(1, 7):
            texts = [[row["completion"] for row in samples_of(r, step)] for r in (result, local)]
            assert texts[0] == texts[1]

    def test_kept_sequences_train_with_tokens_of_two_versions(self, served):
        """The trainer does not wait for the batch that is being drawn."""
        settings = [
            "rollout.max_lag=1", "rollout.server.in_flight=keep", "trainer.max_steps=12",
            "rollout.max_completion_length=40",
        ]  # fmt: skip
        result, rows = train(*served, "kept", *settings)
        assert max(row["policy/lag_max"] for row in rows) == 1
        both = 0
        for step, row in enumerate(rows, 1):
            now = row["policy/version"]  # behind `step` where a batch had nothing to teach
            for sample in samples_of(result, step):
                assert set(sample["versions"]) <= {now - 1, now}
                both += len(set(sample["versions"])) == 2
        assert both

    @pytest.mark.parametrize("max_lag", [1, 2])
    def test_groups_that_are_carried_over_are_no_older_than_max_lag(self, served, max_lag):
        settings = [
            f"rollout.max_lag={max_lag}", "rollout.oversample=2", "trainer.max_steps=12",
            "rollout.server.in_flight=keep", "rollout.max_completion_length=40",
        ]  # fmt: skip
        result, rows = train(*served, f"carried {max_lag}", *settings)
        carried = [row["sampling/carried_groups"] for row in rows]
        assert max(carried) > 0
        for step, row in enumerate(rows, 1):
            for sample in samples_of(result, step):
                assert row["policy/version"] - max_lag <= min(sample["versions"])

    def test_a_run_whose_engine_dies_with_its_weights_goes_on(self, served):
        folder, server = served
        restarts = server.state()["restarts"]
        killer = threading.Timer(2.0, server.kill_engine)
        killer.start()
        settings = ["rollout.server.channel=ipc", "rollout.max_lag=1", "trainer.max_steps=150"]
        _, rows = train(folder, server, "killed", *settings)
        killer.join()
        assert server.state()["restarts"] == restarts + 1
        assert [row["step"] for row in rows] == list(range(1, 151))
        assert max(row["policy/lag_max"] for row in rows) == 1

    def test_a_resumed_run_goes_on_with_the_prompts_that_come_next(self, served):
        folder, server = served
        whole, _ = train(folder, server, "whole", "rollout.max_lag=1")
        train(folder, server, "halves", "rollout.max_lag=1", "trainer.max_steps=3")
        (folder / "runs" / "halves" / "result.json").unlink()
        halves, rows = train(folder, server, "halves", "rollout.max_lag=1", resume=True)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        for step in range(1, 7):
            prompts = [[s["prompt_id"] for s in samples_of(r, step)] for r in (whole, halves)]
            assert prompts[0] == prompts[1]
        assert {v for row in samples_of(halves, 4) for v in row["versions"]} == {3}
