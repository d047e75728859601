"""Training on completions that the data brings along: the update by hand, what is and is not
sampled, a resumed run, and groups of both kinds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rlalign
from rlalign.config import Config, ConfigError
from rlalign.models.tokenizer import build_tokenizer
from rlalign.rollout.engine import EngineError
from rlalign.rollout.hf import HFEngine
from rlalign.rollout.no_engine import NoEngine
from rlalign.tasks import TaskError
from rlalign.tracking.rundir import RunDirError
from rlalign.trainer import loop
from rlalign.trainer.batch import check_versions, make_train_batch, oldest_version
from rlalign.types import Group, Prompt, Sample, Scores
from tests.support import tiny_settings

TOKENIZER = build_tokenizer()
OFFLINE: dict[str, Any] = {
    "task": {"completions": "dataset"},
    "rollout": {"engine": "none"},
    "algo": {"loss_type": "rloo", "beta": 0.0},
    "rewards": {"functions": []},
}


def rows() -> list[dict[str, Any]]:
    """Groups of 2 to 4 completions, those of letters better than those of digits."""
    return [
        {
            "prompt": f"{i}+{i + 3}=?",
            "answer": str(2 * i + 3),
            "completions": ["abc", f"{i}23", "ba" * (1 + i % 4), f"9{i}"][: 2 + i % 3],
            "scores": [1.0, -0.5, 0.75, -1.0][: 2 + i % 3],
            "source": ["human", "model", "model", "human"][: 2 + i % 3],
        }
        for i in range(7)
    ]


def scored_config(
    folder: Path,
    overrides: Sequence[str] = (),
    data: Sequence[dict[str, Any]] | None = None,
    sections: dict[str, Any] = OFFLINE,
) -> Config:
    settings = tiny_settings(folder)
    for name, section in sections.items():
        settings[name] = settings[name] | section
    lines = [json.dumps(row) + "\n" for row in (data or rows())]
    (folder / "train.jsonl").write_text("".join(lines))
    return rlalign.load_config(settings, overrides)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    lines = (run / "rollouts" / f"step_{step:06}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


# --- the data alone, without an engine -----------------------------------------------------------


def loop_gradient(model: Any, groups: Sequence[dict[str, Any]]) -> float:
    """Norm of d/dtheta of -sum_i w_i A_i ln pi(y_i | x) / sum_i w_i, A_i = R_i - mean of the
    others', float64 and one sequence at a time: Ahmadian et al. 2024, arXiv 2402.14740, section
    2.3, with the weight w of its prompt for each completion."""
    model = model.double()
    count = sum(group["weights"] * len(group["completions"]) for group in groups)
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        prompt, scores = TOKENIZER(group["prompt"])["input_ids"], group["scores"]
        for i, text in enumerate(group["completions"]):
            others = [score for j, score in enumerate(scores) if j != i]
            advantage = scores[i] - sum(others) / len(others)
            ids = [*prompt, *TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
            logp_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for t in range(len(prompt), len(ids)):
                total = total - group["weights"] * advantage * logp_TV[t - 1, ids[t]] / count
    total.backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 0.5, 3)])
def test_the_first_update_is_that_of_a_float64_loop(weights, tmp_path):
    data = [{**row, "weights": weight} for row, weight in zip(rows()[2:5], weights, strict=True)]
    config = scored_config(tmp_path, ["trainer.max_steps=1", "task.shuffle=false"], data)
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    [row] = metrics(rlalign.train(config, quiet=True).path)
    assert row["optim/grad_norm"] == pytest.approx(loop_gradient(model, data), rel=1e-5)


def sequence_logp(model: Any, prompt: str, text: str) -> float:
    ids = [*TOKENIZER(prompt)["input_ids"], *TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    with torch.no_grad():
        logp_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(TOKENIZER(prompt)["input_ids"])
    return sum(float(logp_TV[t - 1, ids[t]]) for t in range(start, len(ids)))


def test_better_completions_become_likelier_than_worse_ones(tmp_path):
    config = scored_config(tmp_path, ["trainer.max_steps=30", "algo.beta=0.05"])
    before = AutoModelForCausalLM.from_pretrained(config.model.path)
    result = rlalign.train(config, quiet=True)
    after = AutoModelForCausalLM.from_pretrained(result.path / "checkpoints" / "step_30")
    for row in rows():
        good, bad = row["completions"][:2]
        gaps = [
            sequence_logp(model, row["prompt"], good) - sequence_logp(model, row["prompt"], bad)
            for model in (before, after)
        ]
        assert gaps[1] > gaps[0] + 1


def test_nothing_is_sampled_scored_or_published(tmp_path, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an engine was built, or a reward started")

    for name in ("build_scorer", "check_rewards"):
        monkeypatch.setattr(f"rlalign.trainer.build.{name}", fail)
    for name in ("publish", "check_engine"):
        monkeypatch.setattr(loop, name, fail)
    monkeypatch.setattr(HFEngine, "__init__", fail)
    result = rlalign.train(scored_config(tmp_path), quiet=True)
    assert result.summary["generated_tokens"] == 0
    assert result.summary["eval"] == {"before": {}, "after": {}}
    unknown = ("time/rollout", "time/reward", "time/sync", "perf/rollout", "sampling/logp_diff",
               "sampling/importance", "sampling/ess", "sampling/check")  # fmt: skip
    for row in metrics(result.path):
        assert not [name for name in row if name.startswith(unknown)]
        assert row["optim/grad_norm"] > 0 and row["policy/lag_max"] == 0


def test_each_epoch_takes_every_group_once_in_an_order_of_its_own(tmp_path):
    overrides = ["trainer.prompts_per_step=7", "trainer.max_steps=3"]
    orders = []
    for seed in (0, 1):
        config = scored_config(tmp_path, [*overrides, f"seed={seed}", f"name=seed{seed}"])
        run = rlalign.train(config, quiet=True).path
        for step in (1, 2, 3):
            taken = samples(run, step)
            orders.append(tuple(dict.fromkeys(row["prompt_id"] for row in taken)))
            for row in taken:
                given = rows()[int(row["prompt_id"].partition("/")[2])]
                assert row["completion"] == given["completions"][row["index"]]
                assert row["reward"] == given["scores"][row["index"]]
                assert row["source_id"] == {"human": 1, "model": 2}[given["source"][row["index"]]]
                assert row["versions"] == []
    assert len(set(orders)) == 6
    assert all(sorted(order) == [f"train/{i}" for i in range(7)] for order in orders)


def test_the_plain_view_shows_a_run_without_rollouts(tmp_path, capsys):
    config = scored_config(tmp_path, ["tracking.live=true", "trainer.max_steps=1"])
    rlalign.train(config)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("step 1/1  reward 0.") and "backward" in line and "rollout" not in line


VARIANTS = {
    "no reference": [],
    "KL in the loss": ["algo.beta=0.1"],
    "KL in the reward": ["algo.beta=0.1", "algo.kl_in=reward"],
    "LoRA": ["algo.beta=0.1", "model.lora.rank=4"],
    "several optimizer steps": ["algo.num_minibatches=2", "algo.num_iterations=2"],
    "dynamic sampling": ["algo.filter_groups.enable=true", "algo.filter_groups.metric=reward"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one(variant, tmp_path, monkeypatch):
    """Also where the log-probs of the reference, which trained weights are not, are lost."""
    overrides = ["trainer.checkpoint_every=2", "trainer.keep_checkpoints=9", *VARIANTS[variant]]
    config = scored_config(tmp_path, [*overrides, "name=whole", "trainer.max_steps=6"])
    whole = rlalign.train(config, quiet=True).path
    rlalign.train(scored_config(tmp_path, [*overrides, "trainer.max_steps=3"]), quiet=True)
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path / "empty"))
    config = scored_config(tmp_path, [*overrides, "trainer.max_steps=6"])
    halves = rlalign.train(config, quiet=True, resume=True).path
    measured = ("time/", "perf/", "memory/")
    figures = [
        [{k: v for k, v in row.items() if not k.startswith(measured)} for row in metrics(run)]
        for run in (whole, halves)
    ]
    assert len(figures[0]) == 6 and figures[0] == figures[1]
    assert [samples(whole, n) for n in range(1, 7)] == [samples(halves, n) for n in range(1, 7)]
    one, other = (
        load_file(run / "checkpoints/step_6/model.safetensors") for run in (whole, halves)
    )
    assert all(one[name].equal(other[name]) for name in one)


def test_other_completions_are_another_run(tmp_path):
    rlalign.train(scored_config(tmp_path, ["trainer.max_steps=1"]), quiet=True)
    changed = [*rows()[:6], {**rows()[6], "scores": [1.0, -0.75]}]
    with pytest.raises(RunDirError, match="began with training data"):
        rlalign.train(scored_config(tmp_path, data=changed), quiet=True, resume=True)


def test_samples_without_spans_are_of_no_version():
    sample = Sample("p", 0, (5, 1), (0.0, 0.0), "stop", (), source_id=1)
    groups = [Group(Prompt("p", (3,), "p"), (sample,))]
    check_versions(groups, {4})
    assert oldest_version(groups, 4) == 4


def test_a_broken_data_set_ends_before_a_model_is_loaded(tmp_path, monkeypatch):
    config = scored_config(tmp_path, data=[{"prompt": "q", "completions": ["a"], "scores": [1]}])
    monkeypatch.setattr("rlalign.trainer.build._load_policy", None)
    with pytest.raises(TaskError, match="at least 2"):
        rlalign.train(config, quiet=True)
    assert not (tmp_path / "runs").exists()


def test_sources_that_never_meet_are_named_before_a_model_is_loaded(tmp_path, monkeypatch):
    settings = ["algo.loss_type=copg", "algo.beta=0.1", "algo.copg.compare_sources=true"]
    data = [{**row, "source": ["human"] * len(row["scores"])} for row in rows()]
    config = scored_config(tmp_path, settings, data)
    with monkeypatch.context() as patched:
        patched.setattr("rlalign.trainer.build._load_policy", None)
        with pytest.raises(ConfigError, match=r"no prompt of .* has two .*'human'"):
            rlalign.train(config, quiet=True)
    run = rlalign.train(scored_config(tmp_path, [*settings, "trainer.max_steps=1"]), quiet=True)
    assert metrics(run.path)[0]["optim/grad_norm"] > 0


def test_the_missing_engine_says_what_it_is():
    for call in (
        lambda: NoEngine().generate([], None),
        lambda: NoEngine().score([]),
        lambda: NoEngine().update_weights([], 1),
    ):
        with pytest.raises(EngineError, match=r"rollout\.engine=none .*use rollout\.engine=hf"):
            call()


REFUSED = [
    (["task.completions=rollout"], "task.completions=dataset"),
    (["task.completions=mixed"], "task.completions=dataset"),
    (["task.eval=mini:chain"], "rlalign eval CONFIG rollout.engine=hf"),
    (["task.scored.score_transform=group"], "changes the optimum"),
    (["algo.mismatch.bypass_mode=true"], "algo.mismatch.bypass_mode"),
    (
        ["rollout.engine=hf", "task.completions=rollout", "algo.copg.compare_sources=true"],
        "copg.compare_sources",
    ),
    (["rollout.engine=server", "rollout.max_lag=1"], "rollout.max_lag=0"),
    (["rollout.engine=hf", "task.eval=mini:chain"], "rewards.functions is empty"),
    (["rollout.engine=hf", "task.completions=mixed"], "rewards.functions is empty"),
    (
        ["rollout.engine=hf", "task.completions=mixed", "task.scored.score_transform=standardize",
         "rewards.functions=[{name: exact_match}]"],
        "task.scored.rescore=false",
    ),
    (
        ["algo.mismatch.rollout_is=token", "algo.mismatch.rollout_is_batch_normalize=true"],
        "rollout_is_batch_normalize",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "part"), REFUSED)
def test_settings_that_contradict_each_other(tmp_path, overrides, part):
    with pytest.raises((ConfigError, TaskError)) as caught:
        scored_config(tmp_path, overrides)
    assert part in str(caught.value)


# --- the data to train on, an engine to evaluate with --------------------------------------------

RIGHT = "rewards.functions=[{name: regex, params: {pattern: '[a-f]', full: false}}]"


def test_an_engine_beside_the_data_serves_evaluation_only(tmp_path, monkeypatch):
    asked: list[int] = []
    generate = HFEngine.generate

    def counted(self: HFEngine, requests: Any, params: Any) -> Any:
        asked.append(self.version.version)
        return generate(self, requests, params)

    monkeypatch.setattr(HFEngine, "generate", counted)
    held_out = tmp_path / "eval.jsonl"
    overrides = ["rollout.engine=hf", f"task.eval={held_out}", RIGHT, "trainer.eval_every=2"]
    config = scored_config(tmp_path, overrides)
    held_out.write_text('{"prompt": "1+4=?"}\n{"prompt": "2+5=?"}\n')
    result = rlalign.train(config, quiet=True)
    assert asked == [0, 2, 4]  # each time under the weights that the trainer has
    assert result.summary["generated_tokens"] == 0
    for moment in ("before", "after"):
        assert "pass@1" in result.summary["eval"][moment]
    alone = rlalign.train(scored_config(tmp_path, ["name=alone"]), quiet=True)
    norms = [[row["optim/grad_norm"] for row in metrics(r.path)] for r in (result, alone)]
    assert norms[0] == norms[1]


# --- groups of both ------------------------------------------------------------------------------

MIXED: dict[str, Any] = {
    "task": {"completions": "mixed"},
    "rollout": {"engine": "hf"},
    "algo": {"loss_type": "rloo", "num_generations": 3, "beta": 0.0},
}


def letters(completions: Sequence[str], **_: Any) -> list[float]:
    return [sum(char in "abc" for char in text) / 4 for text in completions]


def train_mixed(tmp_path: Path, *overrides: str, data: Any = None) -> Path:
    overrides = ("rewards.functions=[{name: letters}]", "trainer.max_steps=2", *overrides)
    config = scored_config(tmp_path, overrides, data, MIXED)
    return rlalign.train(config, quiet=True, reward_functions={"letters": letters}).path


def test_mixed_groups_hold_samples_then_completions_scored_by_one_function(tmp_path):
    data = [{k: v for k, v in row.items() if k != "scores"} for row in rows()]
    run = train_mixed(tmp_path, data=data)
    plain = train_mixed(tmp_path, "name=plain", "task.completions=rollout", data=data)
    drawn = [row for row in samples(run, 1) if row["source_id"] == 0]
    assert [row["completion"] for row in drawn] == [row["completion"] for row in samples(plain, 1)]
    for step in (1, 2):
        by_prompt: dict[str, list[dict[str, Any]]] = {}
        for row in samples(run, step):
            by_prompt.setdefault(row["prompt_id"], []).append(row)
            assert row["reward"] == letters([row["completion"]])[0]
        for name, group in by_prompt.items():
            given = rows()[int(name.partition("/")[2])]
            assert [row["source_id"] > 0 for row in group[:3]] == [False] * 3
            assert [row["completion"] for row in group[3:]] == given["completions"]
    for row in metrics(run):  # of the samples only: nobody knows the log-probs of the others
        assert row["sampling/logp_diff/max"] <= 1e-4
    counts = [json.loads((r / "result.json").read_text())["generated_tokens"] for r in (run, plain)]
    first = [metrics(r)[0]["perf/rollout_tokens_per_s"] > 0 for r in (run, plain)]
    assert all(first) and counts[0] == sum(
        row["num_tokens"] for step in (1, 2) for row in samples(run, step) if not row["source_id"]
    )


def test_the_data_may_keep_its_scores(tmp_path):
    transform = "score_transform: clip, score_min: 0.1, score_max: 0.8"
    run = train_mixed(tmp_path, "task.scored={rescore: false, " + transform + "}")
    for row in samples(run, 1):
        score = letters([row["completion"]])[0]
        if row["source_id"]:
            given = rows()[int(row["prompt_id"].partition("/")[2])]
            score = given["scores"][row["index"]]
        assert row["reward"] == pytest.approx(min(max(score, 0.1), 0.8))


def test_a_mixed_group_keeps_the_weight_of_its_prompt(tmp_path):
    """Where the others weigh nothing, the step is that of the one prompt alone."""
    data = [{**row, "weights": float(i == 0)} for i, row in enumerate(rows())]
    runs = [
        train_mixed(tmp_path, "task.shuffle=false", f"trainer.prompts_per_step={n}", data=data)
        for n in (3, 1)
    ]
    norms = [metrics(run)[0]["optim/grad_norm"] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0


def test_mixed_groups_keep_their_weight_and_can_be_told_apart_in_a_batch():
    prompt = Prompt("p", (3, 4), "p")
    pair = (
        Sample("p", 0, (5, 1), (-0.5, -0.1), "stop", ()),
        Sample("p", 1, (6,), (0.0,), "stop", (), source_id=2),
    )
    groups = [Group(prompt, pair, weight=0.5), Group(prompt, pair[:1])]
    scores = Scores(torch.ones(3), torch.ones(3))
    algo = rlalign.load_config(
        {"name": "x", "model": {"path": "mini:chain"}, "task": {"train": "mini:chain"},
         "rewards": {"functions": [{"name": "exact_match"}]}}
    ).algo  # fmt: skip
    batch = make_train_batch(groups, scores, algo).rows([2, 1])
    assert batch.source_id_B is not None and batch.source_id_B.tolist() == [0, 2]
    assert batch.group_weight_B is not None and batch.group_weight_B.tolist() == [1.0, 0.5]
    plain = make_train_batch([Group(prompt, pair[:1])], Scores(torch.ones(1), torch.ones(1)), algo)
    assert plain.source_id_B is None and plain.group_weight_B is None
