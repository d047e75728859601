"""Training on trees of tokens: each token once, with the gradient of whole leaves; a tree that
never branches is a flat group, to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlalign
from rlalign import algos
from rlalign.config import Config, ConfigError
from rlalign.config.schema import TokenTreeConfig
from rlalign.models.random import write_random_model
from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.hf import HFEngine
from rlalign.rollout.tree_rollout import grow_trees
from rlalign.trainer import token_trees
from rlalign.trainer.ahead import draw, open_source
from rlalign.trainer.batch import make_train_batch, with_weights
from rlalign.trainer.build import open_job
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TorchEngine
from rlalign.trainer.policy import Policy
from rlalign.trainer.record_trees import places_in_trees, segment_texts, tree_rows
from rlalign.trainer.token_likelihood import accumulate_gradient, prepare
from rlalign.trainer.update import minibatches
from rlalign.types import Group, Prompt, Sample, Scores, TrainBatch
from tests.support import tiny_config

NAN = math.nan
WHOLE = World()
PROMPTS = [Prompt(f"p{i}", (7, 9 + i, 11), f"{i}?", str(i)) for i in range(3)]
TREES = ["algo.loss_type=branch_grpo", "rollout.tree.num_trees=2", "rollout.tree.segment_length=3"]
TREES += ["rollout.tree.max_depth=3", "rollout.tree.max_leaves=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trees")
    write_random_model(folder / "model", "qwen2", hidden=32, layers=2, max_positions=64)
    return folder


@pytest.fixture(scope="module")
def engine(folder) -> TorchEngine:
    config = tiny_config(folder)
    return TorchEngine(Policy.from_config(config.model), config.trainer.optim)


@pytest.fixture(scope="module")
def groups(engine) -> list[Group]:
    """Two trees of 4 leaves for each of three prompts."""
    return grown(engine, num_trees=2, segment_length=3, max_depth=3, max_leaves=4)


def grown(engine: TorchEngine, **settings: Any) -> list[Group]:
    class Tokens:
        eos_token_id = 250

        def decode(self, ids, **_: Any) -> str:
            return " ".join(map(str, ids))

    rollout = HFEngine(engine.module.model, Tokens())
    cfg, params = TokenTreeConfig(**settings), SamplingParams(10, temperature=1.0)
    decode = Tokens().decode
    return grow_trees(rollout, PROMPTS, [0] * 3, cfg, params, decode, seed=1, step=0)


def make_config(folder: Path, *overrides: str) -> Config:
    config = tiny_config(folder, [*TREES, *overrides])
    algo = algos.resolve(config.algo, engine_shares_parameters=True)
    return dataclasses.replace(config, algo=algo)


def scores_of(groups: list[Group], values: list[float] | None = None) -> Scores:
    count = sum(len(group.samples) for group in groups)
    rng = torch.Generator().manual_seed(2)
    reward_B = torch.rand(count, generator=rng) if values is None else torch.tensor(values)
    return Scores(reward_B, reward_B)


def prepared(groups, scores, config: Config, engine: Any = None, step: int = 0) -> TrainBatch:
    batch = make_train_batch(groups, scores, config.algo)
    return prepare(engine, batch, scores.acc_B, config, WHOLE, step=step)


def gradients(engine: TorchEngine) -> Tensor:
    found = [p.grad.flatten() for p in engine.module.parameters() if p.grad is not None]
    for parameter in engine.module.parameters():
        parameter.grad = None
    return torch.cat(found)


# --- the gradient ------------------------------------------------------------------------------


def expected_edges(groups: list[Group], scores: Scores) -> list[dict[int, tuple[float, float]]]:
    """(A, u) of each node of each group by the definitions, in plain loops: values are means of
    children, A the z-score within tree and depth, u shares depths, then branches, then tokens."""
    found, row = [], 0
    for group in groups:
        tree = group.tree
        assert tree is not None
        parent, depth = tree.parent_N.tolist(), tree.depth_N.tolist()
        number, length = tree.tree_N.tolist(), tree.num_actions_N.tolist()
        nodes = range(len(parent))
        children = {n: [c for c in nodes if parent[c] == n] for n in nodes}
        value = {path[-1]: float(scores.reward_B[row + i]) for i, path in enumerate(group.paths)}
        row += len(group.paths)
        for n in reversed(nodes):
            if children[n]:
                value[n] = sum(value[c] for c in children[n]) / len(children[n])
        omega = {}
        for n in nodes:
            roots = max(number) + 1
            omega[n] = 1 / roots if parent[n] < 0 else omega[parent[n]] / len(children[parent[n]])
        depths = max(depth)
        edges = {}
        for d in range(1, depths + 1):
            total = sum(omega[n] * length[n] for n in nodes if depth[n] == d)
            for n in nodes:
                if depth[n] != d:
                    continue
                peers = [value[m] for m in nodes if depth[m] == d and number[m] == number[n]]
                mean = sum(peers) / len(peers)
                sd = math.sqrt(sum((v - mean) ** 2 for v in peers) / max(len(peers) - 1, 1))
                credit = (value[n] - mean) / (sd + 1e-6) if sd > 1e-6 else 0.0
                edges[n] = (credit, omega[n] / total / depths / len(groups))
        found.append(edges)
    return found


def old_logp(sample: Sample, t: int) -> float:
    """Of another policy, the same for all leaves that share token t."""
    return sample.logp[t] + (sum(sample.token_ids[: t + 1]) % 7 - 3) / 20


@pytest.fixture(scope="module")
def by_leaf_rows(engine, groups) -> tuple[float, Tensor]:
    """The loss over whole leaves, one forward pass each, and its gradient: a token that k leaves
    share counts 1/k in each of them. Ratios are clipped to 0.9 .. 1.1."""
    loss = torch.zeros((), dtype=torch.float64)
    for group, edges in zip(groups, expected_edges(groups, scores_of(groups)), strict=True):
        shared = Counter(node for path in group.paths for node in path)
        start = len(group.prompt.token_ids)
        for sample, path in zip(group.samples, group.paths, strict=True):
            ids = torch.tensor([[*group.prompt.token_ids, *sample.token_ids]])
            logp = engine.module.model(ids).logits[0].double().log_softmax(-1)[start - 1 : -1]
            at = 0
            for node in path:
                credit, weight = edges[node]
                for _ in range(int(group.tree.num_actions_N[node])):
                    ratio = (logp[at, sample.token_ids[at]] - old_logp(sample, at)).exp()
                    term = torch.minimum(ratio * credit, ratio.clamp(0.9, 1.1) * credit)
                    loss = loss - weight / shared[node] * term
                    at += 1
    loss.backward()
    return float(loss.detach()), gradients(engine)


@pytest.mark.parametrize("tokens", [30, 4096])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_loss_and_gradient_are_those_of_whole_leaves(
    tokens, packing, folder, engine, groups, by_leaf_rows
):
    """Off policy, so that ratios differ and some are clipped."""
    scores = scores_of(groups)
    config = make_config(
        folder,
        "algo.epsilon=0.1",
        f"trainer.micro_batch_tokens={tokens}",
        f"trainer.packing={packing}",
    )
    batch = prepared(groups, scores, config, engine)
    logp_old_BT, row = torch.zeros_like(batch.logp_rollout_BT), 0
    for group in groups:
        for sample in group.samples:
            for t in range(len(sample.token_ids)):
                logp_old_BT[row, t] = old_logp(sample, t)
            row += 1
    batch = with_weights(batch.replace(logp_old_BT=logp_old_BT), config)
    metrics: list = []
    accumulate_gradient(engine, batch, config, WHOLE, metrics)
    found = gradients(engine)
    loss, expected = by_leaf_rows
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    logp_BT = engine.forward(batch).logp_BT
    output = algos.policy_loss(logp_BT, batch, config.algo)
    assert float(output.loss.detach()) == pytest.approx(loss, rel=1e-4)
    clipped = algos.finalize_metrics(algos.merge_metrics(metrics))
    assert clipped["clip_ratio/low"] > 0.05 and clipped["clip_ratio/high"] > 0.05


# --- rows --------------------------------------------------------------------------------------


def trained(batch: TrainBatch, groups: list[Group]) -> dict[int, Counter[tuple[int, ...]]]:
    """For each node of the forest the beginnings whose last token some row trains on."""
    assert batch.node_BT is not None
    found = defaultdict(Counter)
    for row, t in batch.mask_BT.nonzero().tolist():
        start = len(batch.sequences[row]) - int(batch.completion_len_B[row])
        found[int(batch.node_BT[row, t])][batch.sequences[row][: start + t + 1]] += 1
    return found


def test_each_token_trains_once_in_the_first_leaf_that_has_it(folder, groups):
    batch = make_train_batch(groups, scores_of(groups), make_config(folder).algo)
    assert batch.tree is not None and batch.node_BT is not None
    found = trained(batch, groups)
    for node, length in enumerate(batch.tree.num_actions_N.tolist()):
        assert len(found[node]) == length and set(found[node].values()) <= {1}
    generated = sum(int(group.tree.num_actions_N.sum()) for group in groups)
    assert int(batch.mask_BT.sum()) == generated < int(batch.completion_len_B.sum())
    first = {}
    for row, nodes in enumerate(batch.node_BT.tolist()):
        for t, node in enumerate(nodes):
            if node >= 0:
                first.setdefault(node, row)
                assert bool(batch.mask_BT[row, t]) == (first[node] == row)
    assert torch.equal(batch.node_BT >= 0, batch.logp_rollout_BT != 0)


def test_a_leaf_without_a_score_takes_only_its_own_chain_along(folder, groups):
    """Leaves 0 and 1 of the first tree part at their last split; what led to both goes on."""
    values = scores_of(groups).reward_B.tolist()
    values[0] = NAN
    config = make_config(folder, "algo.tree.weight=omega_sum")
    batch = prepared(groups, scores_of(groups, values), config)
    [one, other] = groups[0].paths[:2]
    own = set(one) - {node for path in groups[0].paths[1:] for node in path}
    assert own and set(one) & set(other)
    found = trained(batch, groups)
    missing = {node for node in range(len(batch.tree)) if not found[node]}
    roots = set((batch.tree.parent_N < 0).nonzero()[:, 0].tolist())
    assert missing == own | roots
    credit = token_trees.credit(batch, config, 0)
    parent = int(batch.tree.parent_N[one[-1]])
    others = [
        n for n in range(len(batch.tree)) if batch.tree.parent_N[n] == parent and n not in own
    ]
    assert float(credit.value_N[parent]) == pytest.approx(
        sum(float(credit.value_N[n]) for n in others) / len(others)
    )
    assert torch.isnan(credit.value_N[one[-1]])


def test_truncated_leaves_keep_their_reward_and_lose_their_chain(folder, groups):
    """All leaves but one are truncated; its path trains, with the values of all."""
    config = make_config(folder, "algo.overlong.mask_truncated_completions=true")
    cut = [
        dataclasses.replace(
            group,
            samples=tuple(
                dataclasses.replace(s, finish_reason="stop" if s.index == 5 else "length")
                for s in group.samples
            ),
        )
        for group in groups
    ]
    scores = scores_of(groups)
    batch, whole = prepared(cut, scores, config), prepared(groups, scores, make_config(folder))
    found = trained(batch, cut)
    first = 0
    for group in groups:
        kept = {first + node for node in group.paths[5]}
        assert {n for n in range(first, first + len(group.tree)) if found[n]} == kept
        first += len(group.tree)
    assert torch.equal(batch.advantage_BT, whole.advantage_BT)
    weights = with_weights(batch, config).weight_BT
    assert float(weights.sum()) == pytest.approx(1)


def test_probable_tokens_do_not_train_and_count_nowhere(folder, groups):
    config = make_config(folder, "algo.loss_type=spo", "algo.tree.prob_mask=0.004")
    batch = with_weights(prepared(groups, scores_of(groups), config), config)
    probable_BT = batch.logp_rollout_BT.exp() >= 0.004
    alone = make_train_batch(groups, scores_of(groups), make_config(folder).algo).mask_BT
    assert torch.equal(batch.mask_BT, alone * ~probable_BT)
    assert 0 < int(batch.mask_BT.sum()) < int(alone.sum())
    assert torch.equal(batch.weight_BT > 0, batch.mask_BT > 0)
    assert float(batch.weight_BT.sum()) == pytest.approx(1)
    assert batch.weight_BT.unique().numel() == 2  # 0 and one over the tokens that train


def test_a_pruned_depth_does_not_train_and_the_window_follows_the_step(folder, groups):
    window = "algo.tree.depth_prune={size: 1, start: 1, interval: 2, stop: 2}"
    config = make_config(folder, window, "trainer.max_steps=10")
    for step, pruned in ((0, 1), (1, 1), (2, 2), (9, 2)):
        batch = with_weights(prepared(groups, scores_of(groups), config, step=step), config)
        depth_BT = batch.tree.depth_N[batch.node_BT.clamp(min=0)]
        trains = set(depth_BT[batch.mask_BT > 0].tolist())
        assert trains == {1, 2} - {pruned}
        assert float(batch.weight_BT.sum()) == pytest.approx(1)


def test_minibatches_hold_whole_groups_and_share_the_loss_among_themselves(folder, groups):
    config = make_config(folder, "algo.num_minibatches=3")
    batch = prepared(groups, scores_of(groups), config, engine=NoForward())
    parts = [rows for _, rows in minibatches(batch, config, step=0)]
    assert sorted(row for rows in parts for row in rows) == list(range(len(batch)))
    for rows in parts:
        minibatch = with_weights(batch.rows(rows), config)
        assert len(minibatch.group_id_B.unique()) == 1 and len(rows) == 8
        assert float(minibatch.weight_BT.sum()) == pytest.approx(1)


class NoForward:
    """Stands for the trainer's engine where old log-probs do not matter."""

    def forward(self, batch: TrainBatch, *_: Any, **__: Any) -> Any:
        return type("Output", (), {"logp_BT": batch.logp_rollout_BT})


def test_a_step_without_groups_has_no_trees_and_nothing_to_learn(folder):
    config = make_config(folder)
    batch = with_weights(prepared([], Scores(torch.zeros(0), torch.zeros(0)), config), config)
    assert len(batch) == 0 and batch.weight_BT.numel() == batch.advantage_BT.numel() == 0


# --- flat groups -------------------------------------------------------------------------------


FLAT_TREES = ["algo.loss_type=branch_grpo", "rollout.tree.num_trees=4"]
FLAT_TREES += ["rollout.tree.branch_factor=[1]", "algo.tree.scope=prompt"]
FLAT = ["algo.loss_type=grpo", "algo.loss_agg_mode=token-mean", "algo.epsilon=0.2"]


@pytest.mark.parametrize("values", [None, [1, 0, 0, 1, 1, 1, 1, 1, NAN, 0.5, 0, 0.2]])
def test_trees_that_never_branch_have_the_numbers_of_grpo(values, folder, engine):
    groups = grown(engine, num_trees=4, branch_factor=[1])
    scores = scores_of(groups, values)
    trees = make_config(folder, *FLAT_TREES, "algo.tree.weight=token_mean")
    flat = tiny_config(folder, FLAT)
    flat = dataclasses.replace(flat, algo=algos.resolve(flat.algo, engine_shares_parameters=True))
    one = with_weights(prepared(groups, scores, trees), trees)
    plain = [Group(group.prompt, group.samples) for group in groups]
    other = with_weights(prepared(plain, scores, flat), flat)
    assert other.tree is None and one.tree is not None
    for name in ("mask_BT", "weight_BT"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.advantage_BT * one.mask_BT, other.advantage_BT)


def figures(folder: Path, overrides: list[str]) -> list[dict[str, float]]:
    run = rlalign.train(tiny_config(folder, overrides), quiet=True).path
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = ("time/", "perf/", "memory/", "tree/")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]


def test_a_run_on_trees_that_never_branch_is_a_run_of_grpo(tmp_path):
    """Samples, figures and optimizer steps are the same to the last bit."""
    steps = ["trainer.max_steps=3", "algo.beta=0"]
    trees = figures(tmp_path, [*FLAT_TREES, "algo.tree.weight=token_mean", *steps])
    flat = figures(tmp_path, [*FLAT, *steps])
    assert trees == flat
    assert all(row["optim/grad_norm"] > 0 for row in flat)


# --- runs --------------------------------------------------------------------------------------


def test_a_run_records_its_trees(tmp_path):
    run = rlalign.train(tiny_config(tmp_path, TREES), quiet=True).path
    lines = (run / "trees" / "step_000002.jsonl").read_text().splitlines()
    recorded = [json.loads(line) for line in lines]
    samples = [json.loads(line) for line in (run / "rollouts" / "step_000002.jsonl").open()]
    assert [tree["tree"] for tree in recorded] == [0, 1, 2, 3]
    for tree in recorded:
        nodes = tree["nodes"]
        leaves = [row for row in samples if row["tree"] == tree["tree"]]
        assert {row["prompt_id"] for row in leaves} == {tree["prompt_id"]}
        for row in leaves:
            assert all(nodes["text"][i] for i in row["path"])
            assert nodes["reward"][row["path"][-1]] == row["reward"]
            assert [nodes["parent"][i] for i in row["path"]] == [0, *row["path"][:-1]]
        assert nodes["kind"] == ["root"] + ["policy"] * (len(nodes["parent"]) - 1)
        assert nodes["parent"][0] == -1 and nodes["reward"][0] is None
        assert nodes["kept"] == [False] + [True] * (len(nodes["parent"]) - 1)
    row = [json.loads(line) for line in (run / "metrics.jsonl").open()][1]
    by_leaf = sum(sample["num_tokens"] for sample in samples)
    assert row["tree/leaves"] == len(samples) and row["tree/tokens_saved"] > 0.05
    generated = row["perf/rollout_tokens_per_s"] * row["time/rollout_s"]
    assert generated == pytest.approx((1 - row["tree/tokens_saved"]) * by_leaf)
    assert row["tree/explained_variance/2"] == pytest.approx(1)


def test_what_the_record_says_of_a_node(folder, groups):
    """Null where there is no number; the payload and the places are those of the tree's nodes."""
    values = scores_of(groups).reward_B.tolist()
    values[0] = NAN
    config = make_config(folder)
    batch = prepared(groups, scores_of(groups, values), config)
    credit = token_trees.credit(batch, config, 0)
    prompts = [group.prompt for group in groups]
    texts = segment_texts(batch.tree, groups, lambda ids: f"{ids}")
    lines = list(tree_rows(3, batch.tree, credit, prompts, {"text": texts}))
    assert [line["prompt_id"] for line in lines] == ["p0", "p0", "p1", "p1"]
    assert len(texts) == len(batch.tree) and sum(map(bool, texts)) < len(batch.tree)
    places = list(places_in_trees(groups))
    assert [place["tree"] for place in places] == [i // 4 for i in range(24)]
    leaf = places[0]["path"][-1]
    assert math.isnan(lines[0]["nodes"]["value"][leaf]) and not lines[0]["nodes"]["kept"][leaf]
    samples = [sample for group in groups for sample in group.samples]
    for place, sample in zip(places[:16], samples, strict=False):
        parts = [lines[place["tree"]]["nodes"]["text"][i] for i in place["path"]]
        assert [t for part in parts for t in json.loads(part)] == list(sample.token_ids)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo.num_minibatches=2", "algo.num_iterations=2"],
        ["algo.beta=0.1", "model.lora.rank=4"],
        ["rollout.tree.segmenter=surprisal"],
        ["rollout.tree.fallback=true", "algo.tree.weight=leaf_count"],
        ["algo.filter_groups.enable=true", "algo.filter_groups.metric=reward"],
        ["algo.mismatch.rollout_is=token", "algo.mismatch.rollout_is_batch_normalize=true"],
        ["trainer.prompts_per_step=20", "trainer.max_steps=1"],  # of 12 prompts: some come twice
    ],
    ids=lambda overrides: overrides[0],
)
def test_settings_that_change_the_path_through_the_trainer(overrides, tmp_path):
    rows = figures(tmp_path, [*TREES, "trainer.max_steps=2", *overrides])
    assert all(row["optim/grad_norm"] > 0 and row["sampling/logp_diff/max"] < 1 for row in rows)


def test_a_prompt_that_comes_twice_has_other_trees(tmp_path):
    config = tiny_config(tmp_path, [*TREES, "trainer.prompts_per_step=20"])
    with open_job(config) as job:
        groups = draw(job, 0, open_source(job)).collected.groups
    seen = defaultdict(list)
    for group in groups:
        seen[group.prompt.id].append(tuple(sample.token_ids for sample in group.samples))
    twice = [found for found in seen.values() if len(found) == 2]
    assert len(twice) == 8 and all(one != other for one, other in twice)


def test_an_error_of_the_engine_ends_the_run(tmp_path, monkeypatch):
    original, calls = HFEngine.generate, []

    def fails(self, requests, params):
        calls.append(len(requests))
        if len(calls) == 2:
            raise EngineError("no engine any more")
        return original(self, requests, params)

    monkeypatch.setattr(HFEngine, "generate", fails)
    with pytest.raises(EngineError, match="no engine any more"):
        rlalign.train(tiny_config(tmp_path, TREES), quiet=True)


REFUSED = {
    "compares flat samples": ["algo.loss_type=grpo"],
    "grows none": ["rollout.tree.num_trees=0"],
    "max_lag = 1 does not go": ["rollout.engine=server", "rollout.max_lag=1"],
    "completions=mixed does not go": ["task.completions=mixed"],
    "numbers of children": ["rollout.tree.branch_factor=[2, 0]"],
    "never branch": ["rollout.tree.max_leaves=1"],
    "weights are per token": ["algo.mismatch.rollout_is=sequence"],
    "ratios are per token": ["algo.importance_sampling_level=sequence"],
    "use kl_in=loss": ["algo.beta=0.1", "algo.kl_in=reward"],
    "use allocator=uniform": ["algo.allocation.allocator=gvm"],
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_go_with_trees_is_refused_before_anything_is_written(why, tmp_path):
    with pytest.raises((ConfigError, algos.AlgoError), match=why):
        rlalign.train(tiny_config(tmp_path, [*TREES, *REFUSED[why]]), quiet=True)
    assert not (tmp_path / "runs").exists()
