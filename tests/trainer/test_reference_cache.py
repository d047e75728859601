"""Reference log-probs of a data set: those of the model itself, computed once, found again by all
that decides them and by nothing else, and what the data gives is checked against them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import rlalign
from rlalign.config import Config, OptimConfig
from rlalign.models.load import load_tokenizer
from rlalign.models.random import write_random_model
from rlalign.tasks import ScoredSet, TaskError, load_prompts, load_scored
from rlalign.trainer import build, reference_cache
from rlalign.trainer.batch import make_train_batch
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TorchEngine
from rlalign.trainer.policy import Policy
from rlalign.trainer.reference_cache import ReferenceLogpError, ReferenceLogps, reference_logps
from tests.trainer.test_offline import metrics, rows, scored_config

BETA = "algo.beta=0.1"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward pass of the reference."""
    seen: list[int] = []
    original = reference_cache.batch_logp

    def counted(engine: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(len(batch))
        return original(engine, batch, *args, **kwargs)

    monkeypatch.setattr(reference_cache, "batch_logp", counted)
    return seen


def find(
    config: Config, change: Callable[[Policy], None] = lambda policy: None
) -> tuple[ScoredSet, ReferenceLogps]:
    """What a run would begin with."""
    tokenizer = load_tokenizer(config.model)
    prompts = load_prompts(config.task, tokenizer, split="train")
    limit = config.rollout.max_completion_length
    scored = load_scored(prompts, config.task, tokenizer, max_completion_length=limit)
    policy = Policy.from_config(config.model)
    change(policy)
    engine = TorchEngine(policy, OptimConfig(), dtype=getattr(torch, config.model.dtype))
    return scored, reference_logps(scored, policy, engine, config, World())


def table(config: Config, scored: ScoredSet, found: ReferenceLogps) -> list[list[float]]:
    """One row a completion, in the order of the data."""
    values = []
    for prompt in scored.prompts:
        entry = scored[prompt.id]
        batch = make_train_batch([entry.group], entry.scores, config.algo)
        for logp_T, length in zip(found.of(batch), batch.completion_len_B.tolist(), strict=True):
            assert not logp_T[length:].any()
            values.append(logp_T[:length].tolist())
    return values


def by_hand(config: Config, scored: ScoredSet, temperature: float = 1.0) -> list[list[float]]:
    """By transformers in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path).double()
    values = []
    for prompt in scored.prompts:
        for sample in scored[prompt.id].group.samples:
            ids = [*prompt.token_ids, *sample.token_ids]
            with torch.no_grad():
                logits_TV = model(torch.tensor([ids])).logits[0] / temperature
            logp_TV = logits_TV.log_softmax(-1)
            first = len(prompt.token_ids)
            values.append([float(logp_TV[t - 1, ids[t]]) for t in range(first, len(ids))])
    return values


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["rollout.temperature=0.7"],
        ["model.lora.rank=4"],
        ["trainer.micro_batch_tokens=20"],
        ["trainer.packing=false"],
    ],
    ids=str,
)
def test_they_are_the_models_own_at_the_sampling_temperature(overrides, tmp_path):
    config = scored_config(tmp_path, [BETA, *overrides])
    scored, found = find(config)
    ours, theirs = table(config, scored, found), by_hand(config, scored, config.rollout.temperature)
    assert len(ours) == len(theirs) == sum(len(row["completions"]) for row in rows())
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_a_second_run_reads_what_the_first_computed(tmp_path, passes, cache):
    config = scored_config(tmp_path, [BETA])
    first = table(config, *find(config))
    assert sum(passes) == len(first) and len(list(cache.iterdir())) == 1
    passes.clear()
    assert table(config, *find(config)) == first and not passes
    # Neither the order of the rows nor what does not touch a log-prob matters.
    other = [{**row, "scores": [-s for s in row["scores"]]} for row in reversed(rows())]
    assert sorted(table(config, *find(scored_config(tmp_path, [BETA, "seed=5"], other)))) == sorted(
        first
    )
    assert not passes
    # Adapters that were just drawn leave the reference as it is.
    find(scored_config(tmp_path, [BETA, "model.lora.rank=4"]))
    assert not passes


def nudge(policy: Policy) -> None:
    with torch.no_grad():
        policy.model.get_parameter("model.norm.weight")[3] += 1e-3


def another(i: int, **change: Any) -> list[dict[str, Any]]:
    return [{**row, **(change if n == i else {})} for n, row in enumerate(rows())]


CHANGES: dict[str, Any] = {
    "a weight": {"change": nudge},
    "a completion": {"data": another(2, completions=["abc", "224", "bababa", "92"][:4])},
    "a prompt": {"data": another(6, prompt="6+8=?")},
    "one more": {"data": [*rows(), {"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]}]},
    "the temperature": {"overrides": ["rollout.temperature=0.9"]},
    "the dtype": {"overrides": ["model.dtype=bfloat16"]},
    "the kernels": {"overrides": ["kernels.backend=eager"]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_decides_the_numbers_is_a_miss(what, tmp_path, passes):
    config = scored_config(tmp_path, [BETA])
    first = table(config, *find(config))
    passes.clear()
    change = dict(CHANGES[what])
    config = scored_config(tmp_path, [BETA, *change.pop("overrides", [])], change.pop("data", None))
    second = table(config, *find(config, **change))
    assert sum(passes) == len(second)
    assert second != first or what == "the kernels"


def test_a_run_needs_no_reference_model_and_trains_as_with_one(tmp_path, monkeypatch):
    overrides = [BETA, "trainer.max_steps=6"]
    loaded: list[bool] = []
    original = build._load_policy

    def watched(config: Any, world: Any, *, with_reference: bool) -> Policy:
        loaded.append(with_reference)
        return original(config, world, with_reference=with_reference or len(loaded) == 2)

    monkeypatch.setattr(build, "_load_policy", watched)
    cached = rlalign.train(scored_config(tmp_path, overrides), quiet=True)
    monkeypatch.setattr(build, "reference_logps", lambda *args: None)
    live = rlalign.train(scored_config(tmp_path, [*overrides, "name=live"]), quiet=True)
    assert loaded == [False, False]
    figures = list(zip(metrics(cached.path), metrics(live.path), strict=True))
    assert figures[0][0]["kl"] == pytest.approx(0, abs=1e-6)  # the policy is its own reference yet
    assert figures[-1][0]["kl"] > 0.01
    for one, other in figures:
        for name in ("kl", "optim/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7)


def test_without_a_reference_nothing_is_computed(tmp_path, passes, cache):
    rlalign.train(scored_config(tmp_path, ["trainer.max_steps=1"]), quiet=True)
    assert not passes and not cache.exists()


def test_the_same_tokens_cut_elsewhere_are_another_sequence(tmp_path):
    texts = [("ab", "cd"), ("abc", "d")]
    data = [{"prompt": p, "completions": [c, "x"], "scores": [1, 0]} for p, c in texts]
    config = scored_config(tmp_path, [BETA], data)
    scored, found = find(config)
    for ours, theirs in zip(table(config, scored, found), by_hand(config, scored), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)


def test_a_sequence_that_is_not_among_them_is_no_silent_zero(tmp_path):
    config = scored_config(tmp_path, [BETA])
    scored, found = find(config)
    entry = scored[scored.prompts[0].id]
    [sample, *_] = entry.group.samples
    strange = dataclasses.replace(sample, token_ids=(*sample.token_ids, 5), logp=(0.0,) * 5)
    group = dataclasses.replace(entry.group, samples=(strange, *entry.group.samples[1:]))
    with pytest.raises(KeyError):
        found.of(make_train_batch([group], entry.scores, config.algo))


# --- what the data gives -------------------------------------------------------------------------


def with_sums(config: Config, shift: Callable[[int, int], float] = lambda i, j: 0.0) -> list[Any]:
    """The rows with ref_logps by transformers, off by `shift(row, completion)`."""
    scored, _ = find(config)
    sums = iter([math.fsum(values) for values in by_hand(config, scored)])
    return [
        {**row, "ref_logps": [next(sums) + shift(i, j) for j, _ in enumerate(row["completions"])]}
        for i, row in enumerate(rows())
    ]


def test_the_right_sums_pass_computed_and_read(tmp_path, passes):
    data = with_sums(scored_config(tmp_path, [BETA]))
    passes.clear()
    find(scored_config(tmp_path, [BETA], data))  # from the cache: given sums do not change the key
    assert not passes
    find(scored_config(tmp_path, [BETA], data), nudge)  # too small a change for the probe
    assert len(passes) == 2


@pytest.mark.parametrize("hit", [True, False])
def test_a_sum_that_is_off_is_found_with_its_numbers(tmp_path, hit, cache):
    config = scored_config(tmp_path, [BETA])
    off = with_sums(config, lambda i, j: -0.15 if (i, j) == (4, 1) else 0.0)
    if not hit:
        next(cache.iterdir()).unlink()
    config = scored_config(tmp_path, [BETA], off)
    with pytest.raises(ReferenceLogpError) as caught:
        find(config)
    for part in (
        "another tokenisation: probe mismatch 0.150 nat",
        "Completion 1 of train/4",
        "its 4 tokens is",
        "(allowed: 0.100 apart)",  # 0.05 sqrt(4)
        "task.scored.check_ref_logps=false",
    ):
        assert part in str(caught.value)
    find(scored_config(tmp_path, [BETA, "task.scored.check_ref_logps=false"], off))
    near = with_sums(scored_config(tmp_path, [BETA]), lambda i, j: 0.09 if j == 1 else 0.0)
    find(scored_config(tmp_path, [BETA], near))


def test_sums_without_the_end_of_sequence_are_found(tmp_path):
    config = scored_config(tmp_path, [BETA])
    ends = iter([values[-1] for values in by_hand(config, find(config)[0])])
    cut = with_sums(config, lambda i, j: -next(ends))
    with pytest.raises(ReferenceLogpError, match="probe mismatch"):
        rlalign.train(scored_config(tmp_path, [BETA], cut), quiet=True)
    assert not (tmp_path / "runs").exists()


def test_a_data_set_made_for_another_tokenizer_is_found_by_the_probe(tmp_path):
    """Its ids are all in range, and its sums right for the model that it was made with."""
    config = scored_config(tmp_path, [BETA])
    tokenizer = load_tokenizer(config.model)
    order = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(1)).tolist()

    def strange(text: str, end: Sequence[int] = ()) -> list[int]:
        return [order[token] for token in [*tokenizer(text)["input_ids"], *end]]

    data = [
        {
            **row,
            "prompt_ids": strange(row["prompt"]),
            "completion_ids": [strange(t, [tokenizer.eos_token_id]) for t in row["completions"]],
        }
        for row in with_sums(config)
    ]
    with pytest.raises(ReferenceLogpError, match="another tokenisation: probe mismatch"):
        find(scored_config(tmp_path, [BETA], data))
    # The same ids with sums that are this model's own are another data set, and a right one.
    free = [{k: v for k, v in row.items() if k != "ref_logps"} for row in data]
    own = scored_config(tmp_path, [BETA], free)
    sums = iter([math.fsum(values) for values in by_hand(own, find(own)[0])])
    mended = [{**row, "ref_logps": [next(sums) for _ in row["completions"]]} for row in free]
    find(scored_config(tmp_path, [BETA], mended))


def test_a_given_sum_of_minus_infinity_is_a_broken_row(tmp_path):
    data = [{**rows()[0], "ref_logps": [-3.0, -math.inf]}]
    with pytest.raises(TaskError, match="assigns -inf to completion 1"):
        find(scored_config(tmp_path, [BETA], data))


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_completion_that_the_reference_cannot_judge_is_named(value, tmp_path, monkeypatch, cache):
    original = reference_cache.batch_logp

    def broken(engine: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        logp_BT = original(engine, batch, *args, **kwargs)
        logp_BT[3, 1] = value
        return logp_BT

    monkeypatch.setattr(reference_cache, "batch_logp", broken)
    with pytest.raises(ReferenceLogpError) as caught:
        find(scored_config(tmp_path, [BETA]))
    said = f"assigns {value} to completion 1 of train/1 (token 1 of 4): support assumption violated"
    assert said in str(caught.value)
    assert not list(cache.iterdir())


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_damaged_file_is_computed_again_and_said(cut, tmp_path, cache, passes, caplog):
    config = scored_config(tmp_path, [BETA])
    first = table(config, *find(config))
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:cut])
    passes.clear()
    assert table(config, *find(config)) == first and passes
    assert "is damaged" in caplog.text or cut == 0  # an empty file is none
    passes.clear()
    find(config)
    assert not passes


def test_a_file_is_there_whole_or_not_at_all(tmp_path, cache, monkeypatch):
    def full(handle: int) -> None:
        raise OSError("no space left")

    config = scored_config(tmp_path, [BETA])
    with monkeypatch.context() as patch:
        patch.setattr(reference_cache.os, "fsync", full)
        with pytest.raises(ReferenceLogpError, match=r"no space left.*RLALIGN_CACHE"):
            find(config)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, passes):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ReferenceLogpError, match="RLALIGN_CACHE"):
        find(scored_config(tmp_path, [BETA]))
    assert not passes


def test_the_file_holds_no_pickle_and_one_number_a_token(tmp_path, cache):
    config = scored_config(tmp_path, [BETA])
    values = table(config, *find(config))
    [file] = cache.iterdir()
    with safe_open(file, framework="pt") as tensors:
        assert set(tensors.keys()) == {"key_SK", "start_S", "logp_N"}
        assert tensors.get_tensor("logp_N").tolist() == [x for row in values for x in row]


def test_another_model_of_the_same_shape_is_another_reference(tmp_path, passes):
    config = scored_config(tmp_path, [BETA])
    find(config)
    passes.clear()
    shape = {"hidden": 32, "layers": 2, "max_positions": 64}
    other = write_random_model(tmp_path / "other", "qwen2", seed=7, **shape)
    find(scored_config(tmp_path, [BETA, f"model.path={other}"]))
    assert passes
