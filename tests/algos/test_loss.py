"""The loss of a micro-batch: missing inputs, masked garbage, corrections, metrics by hand."""

import dataclasses
import math

import pytest
import torch

from rlalign import algos
from rlalign.algos import AlgoError
from rlalign.config import AlgoConfig
from rlalign.types import TrainBatch


def cfg(loss_type="dapo", mismatch=None, **fields) -> AlgoConfig:
    config = AlgoConfig(loss_type=loss_type, **fields)
    mismatch = dataclasses.replace(config.mismatch, **(mismatch or {"rollout_is": "none"}))
    return algos.resolve(dataclasses.replace(config, mismatch=mismatch))


def batch_of(ratio, advantage, **changes) -> tuple[torch.Tensor, TrainBatch]:
    """One row: current log-probs log(ratio) - 2 against old ones of -2."""
    old_BT = torch.full((1, len(ratio)), -2.0)
    mask_BT = torch.ones_like(old_BT)
    batch = TrainBatch(
        sequences=((0,) * len(ratio),),
        completion_len_B=torch.tensor([len(ratio)]),
        group_id_B=torch.tensor([0]),
        mask_BT=mask_BT,
        reward_B=torch.zeros(1),
        logp_rollout_BT=old_BT,
        logp_old_BT=old_BT,
        advantage_BT=torch.tensor([advantage]),
        weight_BT=mask_BT / len(ratio),
    ).replace(**changes)
    logp_BT = (old_BT + torch.tensor([ratio]).log()).requires_grad_(True)
    return logp_BT, batch


def figures(output: algos.LossOutput) -> dict[str, float]:
    return algos.finalize_metrics(output.metrics)


def test_ppo_by_hand():
    """max(-rho A, -clip(rho) A) for four tokens, epsilon .2 / .28."""
    logp_BT, batch = batch_of([1.5, 1.1, 0.5, 1.5], [1.0, 1.0, -1.0, -1.0])
    output = algos.policy_loss(logp_BT, batch, cfg())
    assert output.loss.item() == pytest.approx((-1.28 - 1.1 + 0.8 + 1.5) / 4, abs=1e-6)
    (gradient_BT,) = torch.autograd.grad(output.loss, logp_BT)
    assert gradient_BT[0].tolist() == pytest.approx([0.0, -1.1 / 4, 0.0, 1.5 / 4])


def test_clip_ratios_count_tokens_whose_gradient_a_clip_removed():
    logp_BT, batch = batch_of([1.5, 1.1, 0.5, 1.5, 9.0], [1.0, 1.0, -1.0, -1.0, -1.0])
    found = figures(algos.policy_loss(logp_BT, batch, cfg(delta=3.0)))
    assert found["clip_ratio/high"] == pytest.approx(1 / 5)
    assert found["clip_ratio/low"] == pytest.approx(1 / 5)
    assert found["clip_ratio/dual"] == pytest.approx(1 / 5)


def test_one_optimizer_step_needs_no_old_log_probs():
    logp_BT, batch = batch_of([1.5, 0.5], [1.0, -2.0], logp_old_BT=None)
    output = algos.policy_loss(logp_BT, batch, cfg())
    (gradient_BT,) = torch.autograd.grad(output.loss, logp_BT)
    assert gradient_BT[0].tolist() == pytest.approx([-0.5, 1.0])
    assert figures(output)["approx_kl_old"] == 0.0


def test_correction_multiplies_after_clipping():
    logp_BT, batch = batch_of([1.5], [1.0], logp_rollout_BT=torch.tensor([[-2.5]]))
    config = cfg(mismatch={"rollout_is": "token", "rollout_is_max": 10.0})
    loss = algos.policy_loss(logp_BT, batch, config).loss
    assert loss.item() == pytest.approx(-1.28 * math.exp(0.5))
    truncated = cfg(mismatch={"rollout_is": "token", "rollout_is_max": 1.2})
    assert algos.policy_loss(logp_BT, batch, truncated).loss.item() == pytest.approx(-1.28 * 1.2)
    masked = cfg(mismatch={"rollout_is": "token", "rollout_is_max": 1.2, "rollout_is_mode": "mask"})
    assert algos.policy_loss(logp_BT, batch, masked).loss.item() == 0.0


def test_kl_in_the_loss_and_only_there():
    reference = {"logp_ref_BT": torch.tensor([[-1.0]])}
    logp_BT, batch = batch_of([1.0], [0.0], **reference)
    k3 = math.exp(1.0) - 1 - 1.0
    output = algos.policy_loss(logp_BT, batch, cfg(beta=0.1))
    assert output.loss.item() == pytest.approx(0.1 * k3)
    assert figures(output)["kl"] == pytest.approx(k3)
    in_reward = algos.policy_loss(logp_BT, batch, cfg(beta=0.1, kl_in="reward"))
    assert float(in_reward.loss) == 0.0
    assert figures(in_reward)["kl"] == pytest.approx(k3)


def test_entropy_bonus_lowers_the_loss_by_its_mean():
    logp_BT, batch = batch_of([1.0, 1.0], [0.0, 0.0])
    entropy_BT = torch.tensor([[0.5, 1.5]], requires_grad=True)
    output = algos.policy_loss(logp_BT, batch, cfg(entropy_coef=0.1), entropy_BT=entropy_BT)
    assert output.loss.item() == pytest.approx(-0.1)
    assert figures(output)["entropy"] == pytest.approx(1.0)
    (gradient_BT,) = torch.autograd.grad(output.loss, entropy_BT)
    assert gradient_BT[0].tolist() == pytest.approx([-0.05, -0.05])


def test_bypass_puts_the_engine_under_the_ratio():
    logp_BT, batch = batch_of([1.0], [1.0], logp_rollout_BT=torch.tensor([[-2.1]]))
    loss = algos.policy_loss(logp_BT, batch, cfg(mismatch={"bypass_mode": True})).loss
    assert loss.item() == pytest.approx(-math.exp(0.1))


def test_the_gap_between_engine_and_trainer_is_reported_with_and_without_correction():
    rollout_BT = torch.tensor([[-2.25, -1.5]])
    for mismatch in ({"rollout_is": "none"}, {"rollout_is": "token"}, {"bypass_mode": True}):
        logp_BT, batch = batch_of([1.0, 1.0], [1.0, 1.0], logp_rollout_BT=rollout_BT)
        found = figures(algos.policy_loss(logp_BT, batch, cfg(mismatch=mismatch)))
        assert found["sampling/logp_diff/max"] == pytest.approx(0.5)
        assert found["sampling/logp_diff/mean"] == pytest.approx(0.375)
        ratios = [math.exp(0.25), math.exp(-0.5)]
        name = "sampling/importance_sampling_ratio"
        assert found[f"{name}/max"] == pytest.approx(max(ratios))
        assert found[f"{name}/min"] == pytest.approx(min(ratios))
        assert found[f"{name}/mean"] == pytest.approx(sum(ratios) / 2)


@pytest.mark.parametrize("level", ["token", "sequence", "seq_mask_tis"])
def test_completions_of_the_data_are_neither_corrected_nor_measured(level):
    """What drew them, and with which probability, is unknown: the zeros stand for nothing."""
    sampled, row = batch_of([1.5, 0.9], [1.0, -1.0], logp_rollout_BT=torch.full((1, 2), -2.3))
    logp_BT = sampled.detach().repeat(2, 1)
    both = row.replace(
        sequences=row.sequences * 2,
        completion_len_B=torch.tensor([2, 2]),
        group_id_B=torch.tensor([0, 0]),
        reward_B=torch.zeros(2),
        source_id_B=torch.tensor([0, 1]),
        logp_rollout_BT=torch.tensor([[-2.3, -2.3], [0.0, 0.0]]),
        **{
            name: getattr(row, name).repeat(2, 1)
            for name in ("mask_BT", "logp_old_BT", "advantage_BT", "weight_BT")
        },
    )
    corrected = cfg(mismatch={"rollout_is": level})
    mixed = algos.policy_loss(logp_BT, both, corrected)
    alone = algos.policy_loss(sampled, row, corrected)
    plain = algos.policy_loss(sampled, row, cfg())
    assert mixed.loss.item() == pytest.approx(alone.loss.item() + plain.loss.item(), abs=1e-6)
    assert alone.loss.item() != pytest.approx(plain.loss.item(), abs=1e-3)
    names = [name for name in figures(alone) if name.startswith("sampling/")]
    assert names and all(figures(mixed)[n] == pytest.approx(figures(alone)[n]) for n in names)
    data = algos.policy_loss(sampled, row.replace(source_id_B=torch.tensor([1])), corrected)
    assert data.loss.item() == pytest.approx(plain.loss.item(), abs=1e-6)
    assert not [name for name in figures(data) if name.startswith("sampling/")]


def test_batch_normalisation_needs_and_uses_the_weights_of_the_whole_batch():
    config = cfg(mismatch={"rollout_is": "token", "rollout_is_batch_normalize": True})
    logp_BT, batch = batch_of([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(AlgoError, match="rollout_weights"):
        algos.policy_loss(logp_BT, batch, config)
    given = batch.replace(rollout_is_weight_BT=torch.tensor([[0.5, 1.5]]))
    output = algos.policy_loss(logp_BT, given, config)
    (gradient_BT,) = torch.autograd.grad(output.loss, logp_BT)
    assert gradient_BT[0].tolist() == pytest.approx([-0.25, -0.75])


def test_masked_garbage_stays_out_of_loss_gradient_and_metrics():
    _, batch = batch_of([1.1, 1.0], [1.0, 1.0], mask_BT=torch.tensor([[1.0, 0.0]]))
    weight_BT = torch.tensor([[1.0, 0.0]])
    garbage = {
        name: torch.tensor([[-2.0, bad]])
        for name, bad in zip(
            ("logp_old_BT", "logp_rollout_BT", "logp_ref_BT", "advantage_BT"),
            (math.nan, math.inf, -math.inf, math.nan),
            strict=True,
        )
    }
    bad_BT = torch.tensor([[0.1 - 2.0, math.nan]], requires_grad=True)
    for level in ("token", "sequence", "sequence_token", "sequence_sum"):
        config = cfg(
            "grpo",
            importance_sampling_level=level,
            mismatch={"rollout_is": "sequence"},
            entropy_coef=0.1,
        )
        entropy_BT = torch.tensor([[0.3, math.nan]])
        output = algos.policy_loss(
            bad_BT, batch.replace(weight_BT=weight_BT, **garbage), config, entropy_BT=entropy_BT
        )
        (gradient_BT,) = torch.autograd.grad(output.loss, bad_BT)
        assert math.isfinite(output.loss.item()) and gradient_BT[0, 1] == 0
        assert all(math.isfinite(value) for value in figures(output).values())


def test_an_empty_micro_batch_still_has_a_graph():
    logp_BT, batch = batch_of([1.0, 1.0], [1.0, 1.0], mask_BT=torch.zeros(1, 2))
    output = algos.policy_loss(logp_BT, batch, cfg())
    assert output.loss.item() == 0.0
    (gradient_BT,) = torch.autograd.grad(output.loss, logp_BT)
    assert gradient_BT.tolist() == [[0.0, 0.0]]
    assert figures(output) == {}


def test_half_precision_log_probs_are_compared_in_float32():
    logp_BT, batch = batch_of([1.01], [1.0])
    half_BT = logp_BT.detach().bfloat16()
    loss = algos.policy_loss(half_BT, batch, cfg()).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-math.exp(float(half_BT) + 2.0), rel=1e-6)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ({"advantage_BT": None}, "advantage_BT"),
        ({"weight_BT": None}, "weight_BT"),
        ({"logp_old_BT": torch.zeros(1, 3)}, "shape"),
    ],
)
def test_what_is_missing_or_misshapen_is_named(missing, says):
    logp_BT, batch = batch_of([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(AlgoError, match=says):
        algos.policy_loss(logp_BT, batch.replace(**missing), cfg())


def test_kl_without_reference_entropy_without_values_and_auto_are_errors():
    logp_BT, batch = batch_of([1.0], [1.0])
    with pytest.raises(AlgoError, match="logp_ref_BT"):
        algos.policy_loss(logp_BT, batch, cfg(beta=0.1))
    with pytest.raises(AlgoError, match="entropy_BT"):
        algos.policy_loss(logp_BT, batch, cfg(entropy_coef=0.1))
    with pytest.raises(AlgoError, match="engine_shares_parameters"):
        algos.policy_loss(logp_BT, batch, cfg(mismatch={"rollout_is": "auto"}))
