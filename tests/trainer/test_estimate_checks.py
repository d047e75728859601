"""Settings of estimated log-probs that would do nothing are refused: the reason and the fix."""

import warnings

import pytest

import rlalign
from rlalign.algos import AlgoError, AlgoWarning
from rlalign.config import ConfigError
from tests.support import ROOT, tiny_config
from tests.trainer.masked_cases import settings

REFUSED = {
    ("algo.entropy_coef=0.1",): "algo.entropy_coef=0.1",
    ("algo.loss_type=rloo",): "algo.kl_in=reward with algo.beta=0.03",
    ("algo.loss_type=gvm_grpo", "algo.beta=0"): "allocator=uniform",
    ("algo.loss_type=branch_grpo",): "without trees",
    ("rollout.tree.num_trees=2",): "without trees",
    ("algo.mismatch.rollout_is=token",): "use none",
    ("algo.mismatch.bypass_mode=true",): "bypass_mode",
    ("rollout.max_lag=1",): "rollout.max_lag",
    ("algo.loss_type=bnpo",): "use token-mean",
    ("algo.likelihood.estimator=coupled", "algo.likelihood.num_mc_samples=3"): "even number",
    ("algo.loss_type=coupled_grpo", "algo.likelihood.num_mc_samples=1"): "even number",
    ("algo.beta=0.1",): "surrogate=exact",
    ("algo.likelihood.estimator=trace",): "surrogate=exact",
    ("algo.loss_type=grpo", "algo.likelihood.surrogate=exact"): "loss_type=bgpo",
    ("algo.loss_type=grpo", "algo.likelihood.norm=canvas"): "norm=canvas is read with",
    ("algo.likelihood.eubo_share=1.0",): "eubo_share=1.0 is read with loss_type=spg",
    ("algo.likelihood.min_time=0.1",): "read with estimator=bernoulli",
    ("algo.likelihood.shrink=2",): "read with estimator=trace",
    ("algo.likelihood.fresh_masks=true",): "num_iterations",
    ("algo.likelihood.kl_to=old",): "read with algo.beta > 0",
    ("algo.loss_type=tracerl", "algo.likelihood.num_mc_samples=8"): "num_mc_samples=8 is read",
    ("algo.loss_type=tracerl", "algo.kl_estimator=k1"): "use k2 or k3",
    ("algo.loss_type=tracerl", "rollout.diffusion.edit_threshold=0.9"): "two steps",
    ("algo.loss_type=copg", "algo.likelihood.kl_to=old"): "compares with the reference",
    ("algo.loss_type=spg", "algo.beta=0.1"): "loss_type=spg",
    ("algo.loss_type=vrpo", "algo.beta=0"): "use beta > 0",
    ("algo.loss_type=wd1", "algo.normalize_advantages=true"): "normalize_advantages",
    ("algo.loss_type=espo", "algo.use_bias_correction_kl=true"): "token ratios",
    ("algo.likelihood.estimator=block_noise",): "which spg needs",
    ("algo.loss_type=spg", "algo.likelihood.estimator=count"): "which spg needs",
    ("algo.overlong.buffer_len=2", "rollout.diffusion.eos_policy=visible"): "long as the canvas",
    ("rollout.diffusion.eos_policy=most",): "eos_policy",
    ("algo.likelihood.estimator=most",): "estimator",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_would_do_nothing_is_refused(overrides):
    with pytest.raises((ConfigError, AlgoError), match=REFUSED[overrides]):
        settings(*overrides)


ACCEPTED = [
    ("algo.loss_type=rloo", "algo.beta=0"),
    ("algo.loss_type=rloo", "algo.kl_in=loss"),
    ("algo.beta=0.1", "algo.likelihood.surrogate=exact"),
    ("algo.likelihood.estimator=trace", "algo.likelihood.surrogate=exact"),
    ("algo.likelihood.fresh_masks=true", "algo.num_iterations=2"),
    ("algo.likelihood.prompt_mask_prob=0.1",),
    ("algo.loss_type=grpo", "algo.likelihood.kl_to=old"),
    ("algo.likelihood.estimator=bernoulli", "algo.likelihood.min_time=0.1"),
    ("algo.loss_type=tracerl", "algo.likelihood.shrink=3"),
    ("algo.loss_type=spg", "algo.likelihood.eubo_power=1.0"),
]


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_what_does_something_is_not(overrides):
    assert settings(*overrides).rollout.engine == "masked_diffusion"


@pytest.mark.parametrize("name", ["bgpo", "diffu_grpo", "wd1", "spg", "tracerl", "espo", "vrpo"])
def test_algorithms_of_estimates_need_a_model_without_exact_log_probs(name, tmp_path):
    with pytest.raises(ConfigError, match="use rollout\\.engine="):
        tiny_config(tmp_path, [f"algo.loss_type={name}", "algo.beta=null"])


@pytest.mark.parametrize(
    "setting", ["num_mc_samples=8", "estimator=count", "shrink=2", "kl_to=old", "norm=canvas"]
)
def test_settings_of_estimates_are_refused_where_log_probs_are_exact(setting, tmp_path):
    with pytest.raises(ConfigError, match="has exact log-probs; leave it out"):
        tiny_config(tmp_path, [f"algo.likelihood.{setting}"])


AT_TEST_TIME = ("latent_seek", "rain")
TRAININGS = [p for p in sorted(ROOT.glob("configs/*/*.yaml")) if p.parent.name not in AT_TEST_TIME]


@pytest.mark.parametrize("path", TRAININGS, ids=lambda p: p.parent.name)
def test_no_shipped_config_is_refused(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlgoWarning)
        rlalign.load_config(path)
