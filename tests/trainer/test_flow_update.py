"""Denoising trees to gradients: against loops in float64, flat GRPO, and each other."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import rlalign
from rlalign import algos
from rlalign.algos.errors import AlgoError
from rlalign.algos.tree_pruning import edge_weights
from rlalign.config import Config, ConfigError
from rlalign.models.flow import FlowModel
from rlalign.rollout.flow import grow, make_plan, sde_steps
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TorchEngine
from rlalign.trainer.flow_policy import FlowPolicy
from rlalign.trainer.flow_update import FlowBatch, accumulate, flow_credit, update_flow

D, WORLD = 5, World()
BASE = {
    "name": "flow-test",
    "algo": {"loss_type": "branch_grpo"},
    "model": {"path": "unused"},
    "task": {"train": "unused"},
    "rollout": {"engine": "flow"},
    "rewards": {"functions": [{"name": "unused"}]},
    "trainer": {"engine": "torch", "max_steps": 10},
}


class Net(FlowModel):
    """v = W z + u sigma + b[label]: small enough for a loop."""

    latent_shape = (D,)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(0.3 * torch.randn(D, D))
        self.u = nn.Parameter(0.3 * torch.randn(D))
        self.b = nn.Parameter(0.3 * torch.randn(4, D))
        self.rows = 0

    def condition(self, prompts):
        return {"label": torch.tensor(prompts)}

    def null_condition(self, num):
        return {"label": torch.full((num,), 3)}

    def forward(self, z_NX, sigma_N, cond):
        self.rows += len(z_NX)
        return z_NX @ self.w.T + sigma_N[:, None] * self.u + self.b[cond["label"]]

    def decode(self, x0_NX):
        return x0_NX

    def config_dict(self):
        return {}


def configured(*overrides: str) -> Config:
    return rlalign.load_config(BASE, list(overrides))


def rolled_out(config: Config, num_prompts: int = 2, step: int = 0):
    """An engine and a batch of trees with rewards that depend on the sample alone."""
    flow = config.rollout.flow
    policy = FlowPolicy(Net(), flow, with_reference=bool(config.algo.beta))
    engine = TorchEngine(policy, config.trainer.optim)
    roots = flow.roots_per_prompt
    keys = [(f"p{i}", r) for i in range(num_prompts) for r in range(roots)]
    group_R = torch.arange(num_prompts).repeat_interleave(roots)
    label_R = group_R % 4
    plan = make_plan(flow, step)

    def velocity(z, sigma, tree):
        return engine.forward(z, sigma, {"label": label_R[tree]})

    local = grow(plan, velocity, keys, group_R, (D,), flow, seed=0, iteration=step)
    leaves = plan.shape.levels(len(keys))[-1]
    reward_N = torch.full((len(local.tree),), math.nan)
    reward_N[leaves] = torch.sin(3 * local.final_LX).sum(1)
    tree = local.tree.replace(reward_N=reward_N)
    own_N = torch.arange(len(tree))
    batch = FlowBatch(plan, tree, local, own_N, torch.zeros_like(own_N), {"label": label_R})
    return engine, batch


def gradient(config: Config, engine, batch, credit) -> torch.Tensor:
    weight_N = edge_weights(batch.tree, credit.keep_N, config.algo, torch.ones(len(batch.tree)))
    accumulate(engine, batch, credit.advantage_N, weight_N, credit.keep_N, config, WORLD, [])
    found = torch.cat([p.grad.flatten() for p in engine.module.parameters()])
    for parameter in engine.module.parameters():
        parameter.grad = None
    return found


def loop_gradient(config: Config, batch: FlowBatch, advantage, weight, keep) -> torch.Tensor:
    """One edge at a time, one call each, float64: -sum u A log p."""
    net, plan, flow = Net().double(), batch.plan, config.rollout.flow
    states = torch.cat(batch.local.state_DMX).double()
    total = torch.zeros((), dtype=torch.float64)
    sigma = plan.sigma_T1.double()
    for n in range(len(keep)):
        if not keep[n]:
            continue
        pa, i = int(batch.tree.parent_N[n]), int(batch.tree.depth_N[n]) - 1
        label = batch.cond["label"][batch.tree.tree_N[n]][None]
        v = net(states[pa][None], sigma[i][None], {"label": label})[0]
        delta = sigma[i + 1] - sigma[i]
        room = 1 - (sigma[1] if i == 0 else sigma[i])
        g = flow.eta * (sigma[i] / room).sqrt()
        z = states[pa]
        mean = z + delta * (v + g**2 / (2 * sigma[i]) * (z + (1 - sigma[i]) * v))
        logp = torch.distributions.Normal(mean, g * (-delta).sqrt()).log_prob(states[n])
        reduced = logp.mean() if flow.logp_reduce == "mean" else logp.sum()
        total = total - weight[n] * advantage[n] * reduced
    total.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("options", [(), ("rollout.flow.logp_reduce=sum",)])
def test_the_gradient_is_that_of_a_loop_over_edges(options):
    config = configured("rollout.flow.num_steps=6", "rollout.flow.split_steps=[0,2]", *options)
    engine, batch = rolled_out(config)
    credit = flow_credit(batch, config, 0)
    assert not credit.keep_N[batch.tree.depth_N == 6].any()  # the reward ignores its noise
    expected = loop_gradient(config, batch, credit.advantage_N, credit.weight_N, credit.keep_N)
    assert expected.norm() > 0
    for rows in (1024, 3):
        config.rollout.flow.micro_batch_rows = rows
        found = gradient(config, engine, batch, credit)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_siblings_share_a_call_and_only_kept_parents_are_called():
    config = configured()
    engine, batch = rolled_out(config, num_prompts=1)
    assert batch.local.num_calls == engine.module.model.rows == 203
    engine.module.model.rows = 0
    gradient(config, engine, batch, flow_credit(batch, config, 0))
    assert engine.module.model.rows == 187  # 203 without the last step
    paper = configured("algo.tree.compat=paper")
    engine.module.model.rows = 0
    gradient(paper, engine, batch, flow_credit(batch, paper, 0))
    assert engine.module.model.rows == 203


@pytest.mark.parametrize(
    "options, edges, parents",
    [
        (["rollout.flow.mix.window_size=4"], 34, 19),
        (["algo.tree.width_prune=parent_top1"], 138, 123),
        (["algo.tree.width_prune=extreme_b", "algo.tree.width_prune_b=4"], 138, 123),
        (["algo.tree.depth_prune={size: 5, start: 12}"], 138, 123),
    ],
)
def test_published_counts(options, edges, parents):
    config = configured("algo.tree.compat=paper", *options)
    engine, batch = rolled_out(config, num_prompts=1)
    credit = flow_credit(batch, config, 0)
    assert int(credit.keep_N.sum()) == edges
    engine.module.model.rows = 0
    gradient(config, engine, batch, credit)
    assert engine.module.model.rows == parents


def test_pruning_changes_nothing_but_the_gradient():
    plain = rolled_out(configured())[1]
    for option in ("algo.tree.width_prune=parent_top1", "algo.tree.depth_prune.size=4"):
        state = torch.random.get_rng_state()
        config = configured(option)
        batch = rolled_out(config)[1]
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(map(torch.equal, batch.local.state_DMX, plain.local.state_DMX))
        credit, whole = flow_credit(batch, config, 0), flow_credit(plain, configured(), 0)
        assert torch.equal(credit.value_N.nan_to_num(), whole.value_N.nan_to_num())
        assert torch.equal(credit.advantage_N, whole.advantage_N)
        assert not torch.equal(credit.keep_N, whole.keep_N)


def test_factor_1_is_flat_grpo_to_the_bit():
    """Advantages and loss of chains, against a plain GRPO over whole samples."""
    config = configured(
        "algo.loss_type=dance_grpo",
        "algo.epsilon=0.2",
        "rollout.flow.split_steps=[]",
        "rollout.flow.roots_per_prompt=6",
        "rollout.flow.num_steps=5",
    )
    engine, batch = rolled_out(config)
    credit = flow_credit(batch, config, 0)
    leaves = batch.plan.shape.levels(12)[-1]
    flat = algos.resolve(dataclasses.replace(config.algo, loss_type="grpo", adv_estimator="grpo"))
    reward_B = batch.tree.reward_N[leaves]
    group_B = torch.arange(2).repeat_interleave(6)
    advantage_BT = algos.compute_advantages(reward_B, reward_B, group_B, torch.ones(12, 4), flat)
    by_depth = credit.advantage_N[12:].view(5, 12).T.float()  # chains: level by level
    assert torch.equal(by_depth[:, :4], advantage_BT)

    branched = configured(
        "algo.loss_type=dance_grpo",
        "algo.epsilon=0.2",
        "rollout.flow.split_steps=[0,2]",
        "rollout.flow.branch_factor=[1]",
        "rollout.flow.roots_per_prompt=6",
        "rollout.flow.num_steps=5",
    )
    other_engine, other = rolled_out(branched)
    assert all(map(torch.equal, other.local.state_DMX, batch.local.state_DMX))
    found = gradient(branched, other_engine, other, flow_credit(other, branched, 0))
    assert torch.equal(found, gradient(config, engine, batch, credit))
    states = torch.stack(batch.local.state_DMX, 1)  # [B, T+1, D]
    expected = plain_grpo_gradient(states, group_B, advantage_BT, batch, config)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def plain_grpo_gradient(states, group_B, advantage_BT, batch, config):
    net, sigma = Net().double(), batch.plan.sigma_T1.double()
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(states)):
        for i in range(4):
            z, label = states[b, i].double(), batch.cond["label"][b][None]
            v = net(z[None], sigma[i][None], {"label": label})[0]
            delta = sigma[i + 1] - sigma[i]
            g2 = config.rollout.flow.eta**2 * sigma[i] / (1 - sigma[max(i, 1)])
            mean = z + delta * (v + g2 / (2 * sigma[i]) * (z + (1 - sigma[i]) * v))
            std = (g2 * -delta).sqrt()
            logp = torch.distributions.Normal(mean, std).log_prob(states[b, i + 1].double()).mean()
            total = total - float(advantage_BT[b, i]) * logp / (12 * 4)
    total.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_the_ratio_is_1_before_the_first_update_and_moves_after_it():
    config = configured("algo.num_iterations=2", "trainer.optim.learning_rate=0.01")
    engine, batch = rolled_out(config)
    result = update_flow(engine, batch, flow_credit(batch, config, 0), config, WORLD, 0, 0.01)
    assert result.optimizer_steps == 2
    assert abs(result.metrics["approx_kl_old"]) > 1e-4  # of the second pass
    one = configured("trainer.optim.learning_rate=0.01")
    engine, batch = rolled_out(one)
    result = update_flow(engine, batch, flow_credit(batch, one, 0), one, WORLD, 0, 0.01)
    assert result.metrics["sampling/logp_diff/max"] < 1e-6
    assert result.metrics["clip_ratio/high"] == result.metrics["clip_ratio/low"] == 0


def test_minibatches_are_whole_prompts_and_cover_all():
    config = configured("algo.num_minibatches=3")
    engine, batch = rolled_out(config, num_prompts=6)
    result = update_flow(engine, batch, flow_credit(batch, config, 0), config, WORLD, 0, 1e-4)
    assert (result.optimizer_steps, result.train_tokens) == (3, 6 * 187)


def test_rollouts_do_not_depend_on_what_is_batched_with_them():
    config = configured("rollout.flow.num_steps=6", "rollout.flow.split_steps=[0,2]")
    batch = rolled_out(config)[1]
    config.rollout.flow.micro_batch_rows = 1
    single = rolled_out(config)[1]
    alone = rolled_out(config, num_prompts=1)[1]
    for d, states in enumerate(batch.local.state_DMX):
        torch.testing.assert_close(single.local.state_DMX[d], states, rtol=1e-6, atol=1e-6)
        first = states[: len(states) // 2]
        torch.testing.assert_close(alone.local.state_DMX[d], first, rtol=1e-6, atol=1e-6)


def test_ode_steps_have_no_siblings_log_prob_or_gradient():
    config = configured("rollout.flow.mix={window_size: 2, start: 10}")
    _, batch = rolled_out(config)
    credit = flow_credit(batch, config, 0)
    trained = sorted(set((batch.tree.depth_N[credit.keep_N] - 1).tolist()))
    assert trained == [0, 3, 6, 9, 10, 11] == sde_steps(config.rollout.flow, 0)
    ode_N = ~torch.isin(batch.tree.depth_N, torch.tensor(trained) + 1)
    assert not batch.local.logp_N[ode_N].any() and not credit.advantage_N[ode_N].any()


def test_a_window_over_all_steps_is_the_plain_tree():
    plain, config = configured(), configured("rollout.flow.mix.window_size=19")
    batch, mixed = rolled_out(plain)[1], rolled_out(config)[1]
    depth_N = batch.tree.depth_N
    assert torch.equal(
        flow_credit(batch, plain, 0).weight_N, flow_credit(mixed, config, 0).weight_N
    )
    for d in range(20):
        assert torch.equal(batch.local.state_DMX[d], mixed.local.state_DMX[d])
    assert int(depth_N.max()) == 20


@pytest.mark.parametrize(
    "mix, step, window",
    [
        ("{window_size: 4, interval: 10}", 0, [0, 1, 2, 3]),
        ("{window_size: 4, interval: 10}", 25, [2, 3, 4, 5]),
        ("{window_size: 4, start: 17, interval: 10}", 0, [17, 18]),  # clipped before the last step
        ("{window_size: 4, start: 18, interval: 1}", 1, [0, 1, 2, 3]),  # starts over
        ("{window_size: 4, start: 18, interval: 1, wrap: false}", 9, [15, 16, 17, 18]),
        ("{window_size: 2, interval: 1, stride: 3}", 2, [6, 7]),
    ],
)
def test_the_window_slides_as_told(mix, step, window):
    config = configured("rollout.flow.split_steps=[0]", f"rollout.flow.mix={mix}")
    assert sde_steps(config.rollout.flow, step) == sorted({0, *window})


def test_the_kl_is_that_of_gaussians_and_pulls_back():
    config = configured(
        "algo.beta=10.0", "rollout.flow.num_steps=4", "rollout.flow.split_steps=[0]"
    )
    engine, batch = rolled_out(config)
    credit = flow_credit(batch, config, 0)
    silent = credit._replace(advantage_N=torch.zeros_like(credit.advantage_N))
    assert gradient(config, engine, batch, silent).norm() == 0  # the policy is the reference
    with torch.no_grad():
        engine.module.model.u.add_(0.5)
    pull = gradient(config, engine, batch, silent)
    at = engine.module.model.w.numel()
    assert (pull[at : at + D] > 0).all()  # down again, in each dimension


@pytest.mark.parametrize(
    "options, words",
    [
        (["rollout.flow.split_steps=[0,3,3]"], "at most once"),
        (["rollout.flow.split_steps=[0,20]"], "must lie in 0 .. 18"),
        (["rollout.flow.split_steps=[19]"], "must lie in 0 .. 18"),
        (
            [
                "rollout.flow.split_steps=[19]",
                "rollout.flow.terminal=sample",
                "rollout.flow.sde_kind=cps",
            ],
            "deterministic",
        ),
        (["rollout.flow.split_steps=[]"], "one leaf"),
        (["algo.loss_type=grpo"], "loss_type"),
        (["rollout.flow.branch_corr=0"], "branch_corr"),
        (["algo.filter_groups.enable=true"], "filter_groups.*without effect"),
        (["rollout.max_lag=1", "rollout.tree.num_trees=2"], "max_lag, rollout.tree.num_trees"),
        (["trainer.zero_stage=2"], "zero_stage"),
        (["algo.mismatch.rollout_is=token"], "rollout_is.*without effect"),
        (["algo.tree.compat=official", "rollout.flow.branch_corr=null"], "finite"),
        (["algo.tree.depth_prune={size: 20, start: 1}"], "no depth to train"),
        (
            [
                "rollout.flow.num_steps=6",
                "rollout.flow.split_steps=[0]",
                "algo.tree.depth_prune.size=2",
            ],
            "prunes nothing",
        ),
        (["rollout.flow.split_steps=[]", "algo.tree.advantage=parent"], "one leaf"),
        (["algo.loss_type=flow_grpo"], "flat method"),
        (
            [
                "algo.loss_type=mix_grpo",
                "rollout.flow.split_steps=[]",
                "rollout.flow.roots_per_prompt=4",
            ],
            "without a window",
        ),
        (
            [
                "rollout.flow.num_steps=1",
                "rollout.flow.sde_kind=dance",
                "rollout.flow.split_steps=[]",
                "rollout.flow.roots_per_prompt=4",
                "algo.tree.scope=prompt",
            ],
            "no step trains",
        ),
        (["algo.beta=0.1", "algo.kl_in=reward"], "kl_in"),
        (["rollout.flow.num_steps=1", "rollout.flow.split_steps=[]"], "single step|one leaf"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, words):
    with pytest.raises((ConfigError, AlgoError, ValueError), match=words):
        configured(*options)
