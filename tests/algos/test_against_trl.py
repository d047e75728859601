"""The losses of TRL 1.16's GRPOTrainer on the same tensors: value and gradient.

`_compute_loss` of the installed library is called as it is, on an object that carries only the
settings it reads. TRL counts fully masked rows and we do not, so there are none here.
"""

import collections
import types

import pytest
import torch

from rlalign import algos
from rlalign.config import AlgoConfig
from rlalign.types import TrainBatch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

T = 5
LENGTHS = torch.tensor([5, 2, 4, 1])


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal() -> torch.Tensor:
        return torch.randn(4, T, generator=generator, dtype=torch.float64)

    old_BT = -1.0 - normal().abs()
    return {
        "old": old_BT,
        "now": old_BT + 0.3 * normal(),
        "ref": old_BT + 0.3 * normal(),
        "engine": old_BT + 0.3 * normal(),
        "mask": (torch.arange(T) < LENGTHS[:, None]).double(),
        "advantage": torch.tensor([1.2, -0.7, 0.4, -1.5], dtype=torch.float64),
    }


def theirs(settings: dict, q_BT: torch.Tensor | None) -> tuple[float, torch.Tensor]:
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer")
    x = tensors()
    now_BT = x["now"].clone().requires_grad_(True)
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (now_BT, now_BT.detach(), None),
        accelerator=types.SimpleNamespace(
            reduce=lambda value, reduction: value,
            gather=lambda value: value,
            num_processes=1,
            sync_gradients=True,
        ),
        args=types.SimpleNamespace(
            use_bias_correction_kl=settings["use_bias_correction_kl"],
            delta=settings["delta"],
            steps_per_generation=1,
        ),
        model=types.SimpleNamespace(training=True),
        _metrics={"train": collections.defaultdict(list)},
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=settings["level"],
        beta=settings["beta"],
        loss_type=settings["trl"],
        epsilon_low=settings["epsilon"],
        epsilon_high=settings["epsilon_high"],
        use_vllm=q_BT is not None,
        vllm_importance_sampling_correction=q_BT is not None,
        current_gradient_accumulation_steps=1,
        max_completion_length=T,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, T, dtype=torch.long),
        "completion_mask": x["mask"],
        "advantages": x["advantage"],
        "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["ref"],
        "importance_sampling_ratio": q_BT,
        "num_items_in_batch": x["mask"].sum(),
    }
    loss = trainer_module.GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient_BT,) = torch.autograd.grad(loss, now_BT)
    return loss.item(), gradient_BT


def ours(cfg: AlgoConfig) -> tuple[float, torch.Tensor]:
    x = tensors()
    now_BT = x["now"].clone().requires_grad_(True)
    group_id_B = torch.tensor([0, 0, 1, 1])
    batch = TrainBatch(
        sequences=((0,) * T,) * 4,
        completion_len_B=LENGTHS,
        group_id_B=group_id_B,
        mask_BT=x["mask"],
        reward_B=torch.zeros(4),
        logp_rollout_BT=x["engine"],
        advantage_BT=x["advantage"][:, None].expand(4, T),
        weight_BT=algos.aggregation_weights(x["mask"], group_id_B, cfg, max_completion_length=T),
        logp_old_BT=x["old"],
        logp_ref_BT=x["ref"],
    )
    loss = algos.policy_loss(now_BT, batch, cfg).loss
    (gradient_BT,) = torch.autograd.grad(loss, now_BT)
    return loss.item(), gradient_BT


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(
    ("name", "trl", "fields"),
    [
        ("grpo", "grpo", {}),
        ("grpo", "grpo", {"beta": 0.1, "use_bias_correction_kl": True}),
        ("grpo", "grpo", {"delta": 1.4, "beta": 0.0}),
        ("dr_grpo", "dr_grpo", {}),
        ("dapo", "dapo", {}),
        ("bnpo", "bnpo", {}),
        ("gspo", "grpo", {}),
        ("gspo", "grpo", {"epsilon": 0.2, "epsilon_high": 0.3}),
        ("cispo", "cispo", {}),
        ("cispo", "cispo", {"epsilon_high": 0.1}),
    ],
)
def test_same_loss_and_gradient(name, trl, fields, corrected):
    cfg = AlgoConfig(loss_type=name, **fields)
    cfg.mismatch.rollout_is = "token" if corrected else "none"
    cfg = algos.resolve(cfg)
    settings = {
        "trl": trl,
        "level": cfg.importance_sampling_level,
        "epsilon": cfg.epsilon,
        # TRL's cispo takes the cap itself, we take it relative to 1.
        "epsilon_high": cfg.epsilon_high + (trl == "cispo"),
        "delta": cfg.delta,
        "beta": cfg.beta,
        "use_bias_correction_kl": cfg.use_bias_correction_kl,
    }
    x = tensors()
    q_BT = (x["old"] - x["engine"]).exp().clamp(max=cfg.mismatch.rollout_is_max)
    expected, expected_BT = theirs(settings, q_BT if corrected else None)
    loss, gradient_BT = ours(cfg)
    assert loss == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(gradient_BT, expected_BT, rtol=0, atol=1e-12)
