"""Gradients of diffusion language models, one pass at a time: equal to autograd over all passes at
once, in the memory of one, whatever the cut into micro-batches."""

import dataclasses
import math

import pytest
import torch

from rlalign import algos
from tests.trainer.masked_cases import (
    Case,
    cosine,
    make_groups,
    relative_error,
    settings,
    tiny_lm,
)

OFF_POLICY = ("algo.num_iterations=2", "algo.likelihood.fresh_masks=false")


def estimated(config):
    """The loss of all passes, as the algorithm defines it."""
    limit = config.rollout.max_completion_length
    return lambda logp_BJT, batch: algos.estimate_loss(logp_BJT, batch, config.algo, limit).loss


def by_hand(logp_BJT, batch, *, divide: str = "none", clip: float | None = None, exact=False):
    """-sum_i 1/|S| R_i or its bound, in loops: independent of the shipped formulas."""
    rows, total = len(batch), torch.zeros((), dtype=torch.float64)
    masks = batch.masks
    for b in range(rows):
        advantage = float(batch.advantage_BT[b, 0])
        length = {"none": 1.0, "valid": float(batch.mask_BT[b].sum()), "canvas": 6.0}[divide]
        passes = masks.weight_BJT.shape[1]
        changes = []
        for j in range(passes):
            change = torch.zeros((), dtype=torch.float64)
            for t in range(masks.weight_BJT.shape[2]):
                weight = float(masks.weight_BJT[b, j, t])
                if weight:
                    now, old = logp_BJT[b, j, t], float(batch.logp_old_BJT[b, j, t])
                    change = change + weight * passes * (now - old) / length
            changes.append(change)
        if exact:
            terms = [torch.exp(sum(changes) / passes)]
        elif advantage >= 0:
            terms = [1 + change for change in changes]
        else:
            terms = [torch.exp(change) for change in changes]
        for ratio in terms:
            value = ratio * advantage
            if clip is not None:
                value = torch.minimum(value, ratio.clamp(1 - clip, 1 + clip) * advantage)
            total = total - value / len(terms) * float(batch.weight_BT[b].sum())
    return total


BGPO = {
    "clipped": ((), {"divide": "valid", "clip": 0.2}),
    "the paper's": (("algo.policy_loss=unclipped",), {}),
    "over the canvas": (("algo.likelihood.norm=canvas",), {"divide": "canvas", "clip": 0.2}),
    "exact": (("algo.likelihood.surrogate=exact",), {"divide": "valid", "clip": 0.2, "exact": 1}),
    "exact, unclipped": (
        ("algo.likelihood.surrogate=exact", "algo.policy_loss=unclipped"),
        {"exact": True},
    ),
}


@pytest.mark.parametrize("moved", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("form", BGPO)
def test_bgpo_one_pass_at_a_time_is_autograd_over_all_of_them(form, moved):
    overrides, options = BGPO[form]
    case = Case(settings(*OFF_POLICY, *overrides), moved=moved)
    naive = case.naive_gradient(lambda logp, batch: by_hand(logp, batch, **options))
    assert relative_error(case.gradient(), naive) < 1e-6


LOSSES = {
    "espo": OFF_POLICY,
    "spg": (*OFF_POLICY, "rollout.diffusion.block_size=3", "rollout.diffusion.steps=2"),
    "vrpo": (),
    "wd1": OFF_POLICY,
    "diffu_grpo": OFF_POLICY,
    "coupled_grpo": OFF_POLICY,
    "tracerl": ("algo.num_iterations=2",),
    "grpo": (*OFF_POLICY, "algo.likelihood.num_mc_samples=4"),
    "gspo": (*OFF_POLICY, "algo.likelihood.num_mc_samples=4", "algo.epsilon=0.2"),
    "cispo": (*OFF_POLICY, "algo.likelihood.num_mc_samples=4"),
    "copg": ("algo.likelihood.num_mc_samples=4",),
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_slopes_and_then_one_pass_at_a_time_is_autograd_over_all_of_them(loss_type):
    config = settings(*LOSSES[loss_type], "rollout.temperature=0.7", loss_type=loss_type)
    case = Case(config, moved=0.05)
    naive = case.naive_gradient(estimated(config))
    assert relative_error(case.gradient(), naive) < 1e-6


@pytest.mark.parametrize("loss_type", ["bgpo", "grpo", "espo", "spg", "vrpo", "tracerl"])
def test_how_passes_are_cut_into_micro_batches_changes_nothing(loss_type):
    gradients = []
    for tokens in (10, 23, 4096):  # one pass at a time, two or three, all
        overrides = [f"trainer.micro_batch_tokens={tokens}", "algo.num_iterations=2"]
        if loss_type in ("bgpo", "grpo"):
            overrides.append("algo.likelihood.num_mc_samples=4")
        case = Case(settings(*overrides, loss_type=loss_type), moved=0.05)
        gradients.append(case.gradient())
    for other in gradients[1:]:
        assert relative_error(other, gradients[0]) < 1e-6


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_on_the_policy_that_sampled_the_bound_is_the_objective(advantage):
    """Value A, gradient A times that of the estimate: those of any surrogate."""
    gradients = {}
    for surrogate in ("bound", "exact", "quadratic"):
        overrides = [f"algo.likelihood.surrogate={surrogate}", "algo.singleton_advantage=raw"]
        case = Case(settings(*overrides), make_groups([[6]]), [advantage])
        gradients[surrogate] = case.gradient()

    def mean_estimate(logp_BJT, batch):
        return -advantage * algos.combine(logp_BJT, batch.masks).sum() / 6

    gradients["estimate"] = case.naive_gradient(mean_estimate)
    for gradient in gradients.values():
        assert relative_error(gradient, gradients["estimate"]) < 1e-6


def test_the_bound_points_where_the_objective_does_for_good_completions():
    """Off-policy, unclipped: it only lacks the importance weight."""
    overrides = ("algo.num_iterations=2", "algo.policy_loss=unclipped")
    gradients = []
    for surrogate in ("bound", "exact"):
        config = settings(
            *overrides, f"algo.likelihood.surrogate={surrogate}", "algo.singleton_advantage=raw"
        )
        gradients.append(Case(config, make_groups([[6]]), [1.0], moved=0.1).gradient())
    assert cosine(*gradients) > 0.9999
    assert relative_error(*gradients) > 0.1


def test_a_group_without_signal_takes_no_forward_pass():
    groups = make_groups([[6, 6, 6], [6, 6, 6], [5]])
    for overrides in ((), ("algo.num_iterations=2",), ("algo.likelihood.surrogate=exact",)):
        case = Case(settings(*overrides), groups, [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
        case.gradient()
        assert case.engine.passes["now"] == 3 * 16
        assert case.engine.passes["without gradient"] in (0, 3 * 16)
        assert not case.minibatch().group_id_B.ne(1).any()


def test_one_step_a_rollout_takes_one_forward_pass_per_mask():
    """No old policy and no first run for slopes, unless something needs their values."""
    for loss_type, before in {"bgpo": 0, "grpo": 0, "espo": 1, "spg": 1, "wd1": 0}.items():
        overrides = ["algo.beta=0"] if loss_type == "grpo" else []
        case = Case(settings(*overrides, loss_type=loss_type))
        case.gradient()
        passes = case.engine.passes
        assert passes["without gradient"] == before * passes["now"], loss_type
        assert passes["now"] > 0


def kept_bytes(case: Case, naive: bool) -> int:
    """The most that autograd holds at a time for backward, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in case.policy.parameters()}
    alive: dict[int, int] = {}
    most = 0

    class Held:
        def __init__(self, tensor):
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            self.size = tensor.untyped_storage().nbytes()
            nonlocal most
            if self.key not in weights:
                alive[id(self)] = self.size
                most = max(most, sum(alive.values()))

        def __del__(self):
            alive.pop(id(self), None)

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        if naive:
            case.naive_gradient(lambda logp, batch: by_hand(logp, batch))
        else:
            case.gradient()
    return most


def test_memory_does_not_grow_with_the_number_of_passes():
    sizes = {False: [], True: []}
    for naive, found in sizes.items():
        for passes in (1, 4, 16, 64):
            overrides = (
                f"algo.likelihood.num_mc_samples={passes}",
                "trainer.micro_batch_tokens=10",
                "algo.num_iterations=2",
                "algo.policy_loss=unclipped",
                "algo.likelihood.estimator=count_strat",
            )
            groups = make_groups([[6, 6]])
            found.append(kept_bytes(Case(settings(*overrides), groups, [1.0, 0.0]), naive))
    ours, naive = sizes[False], sizes[True]
    assert max(ours) <= 1.02 * min(ours), ours
    assert naive[3] > 20 * naive[0], naive


@pytest.mark.parametrize("overrides", [(), ("algo.likelihood.surrogate=exact",)])
def test_rows_without_a_token_or_a_reward_or_a_peer_add_nothing(overrides):
    config = settings(*overrides, "rollout.diffusion.eos_policy=visible")
    groups = make_groups([[6, 4, 0], [3, 3, 3], [4]])
    reward = [1.0, 0.0, 1.0, 1.0, math.nan, 0.0, 1.0]
    case = Case(config, groups, reward)
    assert case.minibatch().reward_B.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert all(bool(g.isfinite().all()) for g in case.gradient().values())
    assert case.batch.advantage_BT[[2, 4, 6]].abs().max() == 0
    # the empty completion still counts in the mean of its group
    mean, deviation = 2 / 3, torch.tensor([1.0, 0.0, 1.0]).std()
    assert case.batch.advantage_BT[0, 0] == pytest.approx((1 - mean) / (deviation + 1e-6))


def test_passes_that_mask_nothing_leave_a_step_without_gradient():
    """Bernoulli masks of short completions may all be empty."""
    one = ("algo.likelihood.estimator=bernoulli", "algo.likelihood.num_mc_samples=1")
    groups = make_groups([[1, 1]])
    for seed in range(60):
        case = Case(settings(*one, f"seed={seed}"), groups, [1.0, 0.0])
        if not case.batch.masks.hidden_BJT.any():
            break
    gradient = case.gradient()
    assert gradient and max(float(g.abs().max()) for g in gradient.values()) == 0


def test_bf16_takes_the_same_step_up_to_its_rounding():
    config = settings("algo.likelihood.num_mc_samples=4")
    exact = Case(config).gradient()
    rounded = Case(config, lm=tiny_lm(dtype=torch.bfloat16)).gradient()
    assert relative_error({n: g.double() for n, g in rounded.items()}, exact) < 0.1
    assert all(bool(g.isfinite().all()) for g in rounded.values())


def test_each_iteration_compares_with_old_log_probs_under_its_own_masks():
    config = settings("algo.num_iterations=3", loss_type="espo")  # fresh masks
    case = Case(config)
    assert case.batch.masks.weight_BJT.shape[1] == 3 * 2
    seen = [case.likelihood.of_iteration(case.batch, i, config) for i in range(3)]
    assert not seen[0].masks.hidden_BJT.equal(seen[1].masks.hidden_BJT)
    for batch in seen:
        now_BJT = case.likelihood.logp(case.engine, batch, config, case.engine.world)
        learns_B = (batch.advantage_BT != 0).any(1)
        torch.testing.assert_close(batch.logp_old_BJT[learns_B], now_BJT[learns_B])
        gap_BT = algos.combine(now_BJT, batch.masks) - batch.logp_ref_BT
        assert gap_BT.abs().max() > 0.1  # the reference is another model


def test_the_kl_to_the_old_policy_begins_at_zero_and_then_pulls_back():
    config = settings("algo.num_iterations=2", "algo.beta=5.0", loss_type="tracerl")
    plain = settings("algo.num_iterations=2", "algo.beta=0.0", loss_type="tracerl")
    assert relative_error(Case(config).gradient(), Case(plain).gradient()) < 1e-6
    far, without = Case(config, moved=0.05), Case(plain, moved=0.05)
    assert relative_error(far.gradient(), without.gradient()) > 0.1
    assert far.engine.passes["reference"] == 0
    kl = algos.finalize_metrics(algos.merge_metrics(far.metrics))["kl"]
    assert kl > 0


def test_raft_averages_over_what_it_accepts():
    """BGPO with RAFT's credit: the share of a row is that among the accepted ones."""
    config = settings("algo.adv_estimator=raft", "algo.likelihood.num_mc_samples=4")
    reward = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    gradient = Case(config, reward=reward).gradient()
    first = Case(config, make_groups()[:1], reward[:4])
    second = Case(config, make_groups(), [0.0] * 4 + reward[4:])
    parts = [first.gradient(), second.gradient()]
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in gradient}
    assert relative_error(gradient, mean) < 1e-6


def test_policies_that_share_masks_differ_by_far_less_than_the_estimates_do():
    """Over many draws: the noise of ell - ell_old under the same masks and under two sets."""
    config = settings("algo.num_iterations=2", "algo.likelihood.num_mc_samples=4")
    groups = make_groups([[6] * 40])
    same = [groups[0].samples[0].token_ids] * 40
    samples = tuple(
        dataclasses.replace(sample, token_ids=ids)
        for sample, ids in zip(groups[0].samples, same, strict=True)
    )
    groups = [dataclasses.replace(groups[0], samples=samples)]
    case = Case(config, groups, [float(i % 2) for i in range(40)], moved=0.01)
    now_BJT = case.likelihood.logp(case.engine, case.batch, config, case.engine.world)
    masks = case.batch.masks
    now_B = algos.combine(now_BJT, masks).sum(1)
    old_B = algos.combine(case.batch.logp_old_BJT, masks).sum(1)
    shared, independent = (now_B - old_B).std(), (now_B - old_B.roll(1)).std()
    assert float(shared) < 0.3 * float(independent)
