"""Runs whose samples an allocator gives out: budgets, what trains when, accounting, resuming."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rlalign
from rlalign import algos
from rlalign.algos.gvm import gvm_weights
from rlalign.config import Config, ConfigError
from rlalign.trainer import allocated
from rlalign.trainer.ahead import draw, open_source
from rlalign.trainer.allocated import Allocated, _accepted
from rlalign.trainer.build import open_job
from rlalign.trainer.job import Job
from rlalign.types import Group, Sample, Scores
from tests.support import tiny_config

GVM = [
    "algo.loss_type=gvm_raft",
    "algo.allocation.acceptance_threshold=0",  # a regex found: about half of the samples
    "algo.allocation.num_pilot_samples=3",
    "algo.allocation.budget_per_prompt=4",
    "algo.allocation.update_interval=2",
    "rollout.max_completion_length=48",
    "trainer.max_steps=5",
    "task.eval=null",
]
CURES = [*GVM, "algo.loss_type=cures_grpo", "algo.beta=0"]


def run(folder: Path, overrides: list[str], **options: Any) -> Path:
    return rlalign.train(tiny_config(folder, overrides), quiet=True, **options).path


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def samples(path: Path, step: int) -> list[dict[str, Any]]:
    lines = (path / "rollouts" / f"step_{step:06}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_budgets_are_spent_and_every_token_counts(tmp_path):
    """Shards of 2, 2 and 1 steps with 3 prompts each: 3 pilot and 4 own samples a prompt."""
    path = run(tmp_path, GVM)
    steps = [samples(path, step) for step in range(1, 6)]
    assert len(steps[0]) + len(steps[1]) == len(steps[2]) + len(steps[3]) == 6 * 3 + 6 * 4
    assert len(steps[4]) == 3 * 3 + 3 * 4
    summary = json.loads((path / "result.json").read_text())
    assert summary["generated_tokens"] == sum(s["num_tokens"] for step in steps for s in step)
    figures = metrics(path)
    assert [row.get("allocation/pilot_tokens", 0) > 0 for row in figures] == [1, 0, 1, 0, 1]
    pilot = [s for s in steps[0] if s["index"] < 3]
    assert figures[0]["allocation/pilot_tokens"] == sum(s["num_tokens"] for s in pilot)
    assert all(row["optim/grad_norm"] > 0 for row in figures)


def test_a_pilot_that_does_not_train_counts_all_the_same(tmp_path):
    path = run(tmp_path, [*GVM, "algo.allocation.train_on_pilot=false"])
    recorded = [s for step in range(1, 6) for s in samples(path, step)]
    assert len(recorded) == 15 * 4
    pilot = sum(row.get("allocation/pilot_tokens", 0) for row in metrics(path))
    summary = json.loads((path / "result.json").read_text())
    assert summary["generated_tokens"] == pilot + sum(s["num_tokens"] for s in recorded)


@pytest.mark.parametrize("kind", ["gvm", "cures"])
def test_a_resumed_run_equals_an_uninterrupted_one(kind, tmp_path):
    """It stops in the middle of a shard, and goes on with the shares of its pilot."""
    overrides = [*(GVM if kind == "gvm" else CURES), "trainer.checkpoint_every=1"]
    whole = run(tmp_path, [*overrides, "name=whole", "trainer.max_steps=6"])
    run(tmp_path, [*overrides, "trainer.max_steps=6", "name=halves", "trainer.keep_checkpoints=9"])
    halves = tmp_path / "runs" / "halves"
    for step in (4, 5, 6):
        folder = halves / "checkpoints" / f"step_{step}"
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        folder.rmdir()
    (halves / "result.json").unlink()
    run(tmp_path, [*overrides, "trainer.max_steps=6", "name=halves"], resume=True)
    measured = ("time/", "perf/", "memory/")
    one, other = (
        [{k: v for k, v in row.items() if not k.startswith(measured)} for row in metrics(path)]
        for path in (whole, halves)
    )
    assert one == other
    assert all(samples(whole, n) == samples(halves, n) for n in range(1, 7))
    mine, theirs = (
        load_file(path / "checkpoints/step_6/model.safetensors") for path in (whole, halves)
    )
    assert all(mine[name].equal(theirs[name]) for name in mine)


@pytest.fixture
def job(tmp_path):
    with open_job(tiny_config(tmp_path, GVM)) as job:
        yield job


def test_the_pilot_trains_in_the_first_step_with_the_stated_weight(job: Job):
    source = Allocated(job)
    first, second = draw(job, 0, source), draw(job, 1, source)
    own, pilot = first.collected.groups[:3], first.collected.groups[3:]
    assert [group.weight for group in own] == [1.0] * 3
    assert [group.weight for group in pilot] == [3 / 4] * 6
    assert [len(group.samples) for group in pilot] == [3] * 6
    assert len(second.collected.groups) == 3
    drawn = [group.prompt.id for group in own + second.collected.groups]
    assert drawn == [group.prompt.id for group in pilot]


def test_no_two_samples_of_a_step_share_a_seed(job: Job):
    found = draw(job, 0, Allocated(job)).collected.groups
    numbers = Counter((g.prompt.id, s.index) for g in found for s in g.samples)
    assert max(numbers.values()) == 1


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_shares_follow_rates_and_norms_of_single_backward_passes(reduction, tmp_path):
    """The norm of each accepted pilot sample's gradient in the head, by autograd."""
    settings = [*GVM, f"algo.allocation.grad_reduction={reduction}"]
    with open_job(tiny_config(tmp_path, settings)) as job:
        check_shares(job, reduction)


def check_shares(job: Job, reduction: str) -> None:
    source = Allocated(job)
    found = draw(job, 0, source).collected
    rates, norms = [], []
    for group, scores in zip(found.groups[3:], found.scores[3:], strict=True):
        right = right_samples(group, scores)
        rates.append(len(right) / 3)
        divisors = [len(sample.token_ids) if reduction == "mean" else 1 for sample in right]
        gradients = head_gradients(job, group, right)
        norms.append([float(g.norm()) / n for g, n in zip(gradients, divisors, strict=True)])
    mean = [sum(own) / len(own) if own else 0.0 for own in norms]
    assert any(rates) and len(set(rates)) > 1
    expected = algos.allocate(gvm_weights(torch.tensor(rates), torch.tensor(mean)), 24)
    state = source.state["allocator"]
    assert state["count"] == expected.tolist()
    torch.testing.assert_close(
        torch.tensor(state["stats"]["right_norm_m"]), torch.tensor(mean), rtol=1e-4, atol=1e-4
    )


def right_samples(group: Group, scores: Scores) -> list[Sample]:
    judged = zip(group.samples, scores.acc_B.tolist(), strict=True)
    return [sample for sample, acc in judged if acc > 0 and sample.finish_reason == "stop"]


def head_gradients(job: Job, group: Group, samples: list[Sample]) -> list[torch.Tensor]:
    """Of the log-prob of each sample, by autograd."""
    model, found = job.policy.model, []
    weight = model.get_output_embeddings().weight.detach().clone().requires_grad_()
    for sample in samples:
        ids = torch.tensor([group.prompt.token_ids + sample.token_ids])
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        length = len(sample.token_ids)
        logp = (hidden[-length - 1 : -1] @ weight.T).log_softmax(-1)
        total = logp.gather(1, ids[0, -length:, None]).sum()
        found.append(torch.autograd.grad(total, weight)[0])
    return found


@pytest.mark.parametrize("settings", [[*GVM, "algo.allocation.grad_stat=exact"], CURES])
def test_the_mean_gradient_is_that_of_the_right_samples(settings, tmp_path):
    """|mean|^2 over pairs of different samples: without the bias of a sample with itself."""
    settings = [*settings, "algo.allocation.num_pilot_samples=32"]  # few of them stop
    with open_job(tiny_config(tmp_path, settings)) as job:
        source = Allocated(job)
        source.next(3, 0, Counter())
        pilot = source.extra()
        expected = []
        for group, scores in zip(pilot.groups, pilot.scores, strict=True):
            gradients = head_gradients(job, group, right_samples(group, scores))
            pairs = [float((a * b).sum()) for a in gradients for b in gradients if a is not b]
            expected.append(sum(pairs) / len(pairs) if pairs else 0.0)
        assert any(expected)
        found = source.state["allocator"]["stats"]["right_mean_square_m"]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_lost_weights_undo_a_draw(job: Job):
    source = Allocated(job)
    before = source.cursor, source.state
    once = draw(job, 0, source)
    source.rewind()
    source.next(3, 0, Counter())  # and before the pilot was taken
    source.rewind()
    assert (source.cursor, source.state) == before
    again = draw(job, 0, source)
    assert again.collected.groups == once.collected.groups
    source.commit()
    draw(job, 1, source)
    source.rewind()
    assert source.state == again.allocation


def test_cures_counts_what_it_saw(tmp_path):
    with open_job(tiny_config(tmp_path, [*CURES, "trainer.prompts_per_step=6"])) as job:
        source = Allocated(job)
        drawn = draw(job, 0, source)
        state = source.state["allocator"]
        total = sum(state["right"]) + sum(state["wrong"])
        assert total == sum(len(g.samples) for g in drawn.collected.groups) == 12 * 3 + 24
        right = sum(
            int(acc > 0 and sample.finish_reason == "stop")
            for group, scores in zip(drawn.collected.groups, drawn.collected.scores, strict=True)
            for sample, acc in zip(group.samples, scores.acc_B.tolist(), strict=True)
        )
        assert sum(state["right"]) == right


def test_nothing_right_and_nothing_to_give_is_an_empty_step(tmp_path):
    settings = [*GVM, "algo.allocation.acceptance_threshold=9", "algo.allocation.on_empty=skip"]
    figures = metrics(run(tmp_path, [*settings, "trainer.max_steps=2"]))
    assert [row["optim/empty_steps"] for row in figures] == [1, 1]
    assert [row["policy/version"] for row in figures] == [0, 0]


def test_dynamic_sampling_takes_further_prompts_of_the_shards(tmp_path):
    settings = [*GVM, "algo.filter_groups.enable=true", "algo.filter_groups.on_exhausted=train"]
    figures = metrics(run(tmp_path, [*settings, "algo.filter_groups.max_num_gen_batches=3"]))
    assert any(row["sampling/groups_generated"] > 3 for row in figures)


def settings_of(tmp_path: Path, *overrides: str) -> Config:
    return tiny_config(tmp_path, [*GVM, *overrides])


def test_two_pilots_of_one_step_add_up(job: Job):
    """A step of 8 prompts takes more than the shard of 6 that is opened first."""
    source = Allocated(job)
    source.next(8, 0, Counter())
    pilot = source.extra()
    assert len(pilot.groups) == 2 * 6
    drawn = sum(len(s.token_ids) for group in pilot.groups for s in group.samples)
    assert source.figures()["allocation/pilot_tokens"] == pilot.generated_tokens == drawn


def test_rewards_of_a_pilot_are_recorded_where_no_prompt_has_samples(tmp_path):
    settings = [*GVM, "algo.allocation.acceptance_threshold=9", "algo.allocation.on_empty=skip"]
    path = run(tmp_path, [*settings, "trainer.max_steps=1"])
    assert all(len(sample["rewards"]) == 2 for sample in samples(path, 1))
    mean = sum(sample["reward"] for sample in samples(path, 1)) / len(samples(path, 1))
    [figures] = metrics(path)
    functions = [v for k, v in sorted(figures.items()) if k.startswith("rewards/")]
    assert functions[0] + 0.5 * functions[1] == pytest.approx(mean)


@pytest.mark.parametrize("then", ["gvm", "cures", "uniform"])
def test_another_allocator_goes_on_with_the_prompts_that_are_left(then, tmp_path, monkeypatch):
    """A shard of 12 prompts, the training set, of which 3 steps take 9."""
    first = "cures" if then == "gvm" else "gvm"
    said: list[str] = []
    monkeypatch.setattr(allocated.log, "warning", lambda text, *values: said.append(text % values))
    overrides = [*GVM, "algo.allocation.update_interval=4", "algo.allocation.num_pilot_samples=2"]
    overrides += ["algo.allocation.min_samples=1", "algo.prompt_weighting=prompt"]
    run(tmp_path, [*overrides, f"algo.allocation.allocator={first}", "trainer.max_steps=4",
                   "trainer.checkpoint_every=3", "trainer.keep_checkpoints=9"])  # fmt: skip
    folder = tmp_path / "runs" / "tiny"
    for file in sorted((folder / "checkpoints" / "step_4").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (folder / "checkpoints" / "step_4").rmdir()
    (folder / "result.json").unlink()
    config = tiny_config(tmp_path, [*overrides, f"algo.allocation.allocator={then}"])
    with open_job(config, resume=True) as job:
        count = 6 if then == "cures" else 3  # it draws from the whole of its shard
        left = {prompt.id for prompt in job.train_prompts.take(9, count)}
        source = open_source(job)
        assert {group.prompt.id for group in draw(job, 3, source).collected.groups[:3]} <= left
        assert source.cursor == 12
    told = [text for text in said if text.startswith("the shard of allocator")]
    assert len(told) == (then != "uniform")


def test_samples_that_the_engine_gave_up_are_not_right(job: Job):
    prompt = job.train_prompts[0]
    samples = [
        Sample(prompt.id, i, (5,), (0.0,), reason, (), text="a")
        for i, reason in enumerate(("stop", "abort", "length"))
    ]
    scores = Scores(torch.ones(3), torch.ones(3))
    found = _accepted([Group(prompt, tuple(samples))], scores, job)
    assert found.tolist() == [True, False, False]


def test_an_engine_that_runs_ahead_is_refused(tmp_path):
    config = settings_of(tmp_path)
    rollout = dataclasses.replace(config.rollout, engine="server", max_lag=1)
    with (
        pytest.raises(ConfigError, match="is busy with"),
        open_job(dataclasses.replace(config, rollout=rollout)),
    ):
        pass
