"""CoPG in the trainer: one gradient however a batch is split, whole prompts, and what it learns."""

import dataclasses
import json

import pytest
import torch

import rlalign
from rlalign import algos
from rlalign.config import AlgoConfig
from rlalign.models.random import write_random_model
from rlalign.trainer.batch import bare_batch, with_weights
from rlalign.trainer.coupled import SplitGroupError
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TorchEngine
from rlalign.trainer.policy import Policy
from rlalign.trainer.token_likelihood import accumulate_gradient, my_micro_batches
from rlalign.trainer.update import minibatches
from rlalign.types import TrainBatch
from tests.support import tiny_config, tiny_settings

GROUP = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3]  # ragged
SCORE = [1.0, 0.0, 0.5, 0.2, -1.0, 2.0, 2.0, 0.1, 0.4, float("nan"), 0.3]
WHOLE = World()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copg")
    write_random_model(folder / "model", "qwen2", hidden=32, layers=2, max_positions=64)
    return folder


def make_config(folder, *overrides: str):
    config = tiny_config(folder, ["algo.loss_type=copg", "algo.beta=0.2", *overrides])
    algo = algos.resolve(config.algo, engine_shares_parameters=True)
    return dataclasses.replace(config, algo=algo)


def make_engine(folder) -> TorchEngine:
    """The reference is the model of another seed, so that rho is not 0."""
    config = tiny_config(folder)
    policy = Policy.from_config(config.model, with_reference=True)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(3)
        for parameter in policy.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return TorchEngine(policy, config.trainer.optim)


def make_batch() -> TrainBatch:
    rng = torch.Generator().manual_seed(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(6, 250, (count,), generator=rng).tolist())

    prompts = [tokens(3 + g) for g in range(4)]
    lengths = [2 + i % 5 for i in range(len(GROUP))]
    rows = [prompts[g] + tokens(n) for g, n in zip(GROUP, lengths, strict=True)]
    batch = bare_batch(rows, lengths)
    mask_BT = batch.mask_BT * torch.tensor(SCORE).isfinite()[:, None]
    return batch.replace(
        group_id_B=torch.tensor(GROUP), reward_B=torch.tensor(SCORE), mask_BT=mask_BT
    )


def with_reference(engine: TorchEngine, batch: TrainBatch) -> TrainBatch:
    with torch.no_grad():
        return batch.replace(logp_ref_BT=engine.forward(batch, reference=True).logp_BT)


def gradients(engine: TorchEngine) -> torch.Tensor:
    found = [p.grad.flatten() for p in engine.module.parameters() if p.grad is not None]
    for parameter in engine.module.parameters():
        parameter.grad = None
    return torch.cat(found)


def by_hand(engine: TorchEngine, batch: TrainBatch, beta: float) -> torch.Tensor:
    """1/G sum_g 1/(2 beta) variance of R - beta rho over the scorable rows, in one pass."""
    logp_BT = engine.forward(batch).logp_BT
    rho_B = ((logp_BT - batch.logp_ref_BT) * batch.mask_BT).sum(1)
    loss = torch.zeros(())
    for g in range(4):
        rows = [i for i, h in enumerate(GROUP) if h == g and SCORE[i] == SCORE[i]]
        a = torch.tensor([SCORE[i] for i in rows]) - beta * rho_B[rows]
        loss = loss + a.var(correction=1) / (2 * beta) / 4
    loss.backward()
    return gradients(engine)


def by_trainer(engine: TorchEngine, batch: TrainBatch, config) -> torch.Tensor:
    batch = batch.replace(advantage_BT=torch.zeros_like(batch.mask_BT))
    accumulate_gradient(engine, with_weights(batch, config), config, WHOLE, [])
    return gradients(engine)


@pytest.mark.parametrize("mode", ["group_in_microbatch", "two_pass"])
@pytest.mark.parametrize("tokens", [38, 45, 4096])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_any_split_has_the_gradient_of_the_formula(folder, mode, tokens, packing):
    engine = make_engine(folder)
    batch = with_reference(engine, make_batch())
    config = make_config(
        folder,
        f"algo.copg.microbatch_mode={mode}",
        f"trainer.micro_batch_tokens={tokens}",
        f"trainer.packing={packing}",
    )
    expected = by_hand(engine, batch, 0.2)
    found = by_trainer(engine, batch, config)
    assert float((found - expected).norm() / expected.norm()) < 2e-6
    if mode == "group_in_microbatch":
        parts = my_micro_batches(batch, config, WHOLE, whole_groups=True)
        assert (len(parts) == 1) == (tokens == 4096)
        for part in parts:
            assert {GROUP[i] for i in part}.isdisjoint(
                GROUP[i] for other in parts if other is not part for i in other
            )


@pytest.mark.parametrize("mode", ["group_in_microbatch", "two_pass"])
def test_figures_add_up_over_micro_batches_those_without_rows_too(folder, mode):
    engine = make_engine(folder)
    batch = with_reference(engine, make_batch())
    batch = batch.replace(advantage_BT=torch.zeros_like(batch.mask_BT))
    found = []
    for tokens in (45, 4096):
        settings = [f"algo.copg.microbatch_mode={mode}", f"trainer.micro_batch_tokens={tokens}"]
        config = make_config(folder, *settings)
        metrics = []
        weighed = with_weights(batch, config)
        accumulate_gradient(engine, weighed, config, WHOLE, metrics)
        idle = weighed.rows([])
        output = engine.forward(idle, 1.0, entropy=True)
        loss = algos.policy_loss(output.logp_BT, idle, config.algo, entropy_BT=output.entropy_BT)
        loss.loss.backward()  # other processes wait for it
        metrics.append(loss.metrics)
        found.append(algos.finalize_metrics(algos.merge_metrics(metrics)))
    assert "entropy" in found[0]
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_surrogate_and_square_have_one_gradient(folder):
    engine = make_engine(folder)
    batch = with_reference(engine, make_batch())
    square = by_trainer(engine, batch, make_config(folder))
    other = by_trainer(engine, batch, make_config(folder, "algo.copg.loss_type=surrogate"))
    assert float((other - square).norm() / square.norm()) < 1e-6


def test_a_prompt_too_large_for_a_micro_batch_is_named_and_two_passes_take_it(folder):
    engine = make_engine(folder)
    batch = with_reference(engine, make_batch())
    settings = ["trainer.micro_batch_tokens=12"]
    with pytest.raises(SplitGroupError, match="two_pass"):
        by_trainer(engine, batch, make_config(folder, *settings))
    config = make_config(folder, *settings, "algo.copg.microbatch_mode=two_pass")
    expected = by_hand(engine, batch, 0.2)
    assert float((by_trainer(engine, batch, config) - expected).norm() / expected.norm()) < 2e-6


def test_several_optimizer_steps_share_out_prompts_not_rows(folder):
    config = make_config(folder, "algo.num_minibatches=3")
    batch = make_batch()
    parts = [rows for _, rows in minibatches(batch, config, 0)]
    assert sorted(i for part in parts for i in part) == list(range(len(GROUP)))
    groups = [{GROUP[i] for i in part} for part in parts]
    assert sum(map(len, groups)) == 4 and len(groups) == 3


@pytest.mark.parametrize("weighting", ["prompt", "inverse_propensity"])
def test_several_optimizer_steps_count_each_prompt_once_where_prompts_are_weighed(
    weighting, folder
):
    """Five prompts of 1 to 15 accepted samples; a sample's propensity weight is 1/n."""
    settings = ["algo.loss_type=gvm_raft", f"algo.prompt_weighting={weighting}"]
    settings += ["algo.num_minibatches=5", "algo.allocation.train_on_pilot=false"]
    config = tiny_config(folder, settings)
    sizes = [1, 15, 2, 6, 8]
    group = [g for g, size in enumerate(sizes) for _ in range(size)]
    batch = bare_batch([(1, 2, 3)] * len(group), [2] * len(group))
    batch = batch.replace(group_id_B=torch.tensor(group), advantage_BT=batch.mask_BT)
    if weighting == "inverse_propensity":
        batch = batch.replace(group_weight_B=torch.tensor([1 / sizes[g] for g in group]))
    total = torch.zeros(5)
    for _, rows in minibatches(batch, config, 0):
        part = with_weights(batch.rows(rows), config)
        assert part.policy_weight_BT is not None
        total.index_add_(0, part.group_id_B, part.policy_weight_BT.sum(1))
    torch.testing.assert_close(total, torch.ones(5))


def test_on_policy_the_first_step_is_that_of_rloo(folder):
    """RLOO with the KL in the reward, summed log-probs, on the same samples."""
    engine = make_engine(folder)
    batch = make_batch()
    keep = [i for i, g in enumerate(GROUP) if g in (0, 2)]  # equal sizes: a mean over rows is one
    batch = with_reference(engine, batch.rows(keep))  # over prompts
    copg = by_trainer(engine, batch, make_config(folder))
    rloo = make_config(folder, "algo.loss_type=rloo")
    with torch.no_grad():
        logp_BT = engine.forward(batch).logp_BT
    kl_BT = algos.reward_kl(logp_BT, batch.logp_ref_BT, batch.mask_BT, rloo.algo)
    batch = batch.replace(
        logp_old_BT=logp_BT,
        advantage_BT=algos.compute_advantages(
            batch.reward_B, batch.reward_B, batch.group_id_B, batch.mask_BT, rloo.algo, kl_BT=kl_BT
        ),
    )
    accumulate_gradient(engine, with_weights(batch, rloo), rloo, WHOLE, [])
    found = gradients(engine)
    assert float((found - copg).norm() / copg.norm()) < 1e-5


def test_scored_completions_are_fitted(tmp_path):
    """Eight prompts with four completions each, no engine: the score differences become beta times
    those of the log-ratios."""
    settings = tiny_settings(tmp_path)
    settings |= {
        "task": settings["task"] | {"completions": "dataset"},
        "rewards": {"functions": []},
    }
    settings["rollout"] = settings["rollout"] | {"engine": "none"}
    rows = [
        {
            "prompt": f"{i}+{i}=?",
            "completions": [f"{i}ab", f"c{i}", "f", f"{i}{i}9"],
            "scores": [((i + j) % 4) / 2 for j in range(4)],
        }
        for i in range(8)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["algo.loss_type=copg", "algo.beta=0.2", "trainer.max_steps=120"]
    overrides += ["trainer.prompts_per_step=8", "trainer.optim.learning_rate=3e-3"]
    config = rlalign.load_config(settings, overrides)
    result = rlalign.train(config, quiet=True)
    figures = [json.loads(s) for s in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert figures[0]["copg/fit_r2"] == pytest.approx(0, abs=1e-4)
    assert figures[0]["copg/accuracy"] == pytest.approx(0.5, abs=0.01)
    assert figures[-1]["copg/fit_r2"] > 0.99 and figures[-1]["copg/accuracy"] == 1.0


@pytest.mark.parametrize(
    ("fields", "copg", "says"),
    [
        ({"beta": 0.0}, {}, "divides by 0"),
        ({}, {"length_normalization": "const"}, "loss_scale_factor"),
        ({"prompt_weighting": "sample"}, {}, "one loss per prompt"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, copg, says):
    config = AlgoConfig(loss_type="copg", **fields)
    section = dataclasses.replace(config.copg, **copg)
    with pytest.raises(algos.AlgoError, match=says):
        algos.resolve(dataclasses.replace(config, copg=section))
