import pytest

from rlalign.config import Config, ConfigError, RolloutConfig
from rlalign.config.schema import DiffusionConfig
from rlalign.trainer.diffusion_checks import check_diffusion


def check(length=16, **options):
    rollout = RolloutConfig(max_completion_length=length, diffusion=DiffusionConfig(**options))
    check_diffusion(Config(name="x", rollout=rollout))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 16, "eval_steps": 4, "block_size": 4},
        {"steps": 5},
        {"order": "topk_margin", "threshold": 0.9},
        {"order": "entropy", "alg_temp": 0.5},
        {"order": "random", "eos_confidence": False},
        {"eos_early_stop": True, "block_size": 8, "eos_policy": "visible"},
        {"eos_early_stop": True},  # a model may have blocks of its own
    ],
)
def test_settings_that_go_together(options):
    check(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 5}, r"blocks of rollout\.diffusion\.block_size = 5.*length=20"),
        ({"block_size": 32}, r"length=32"),
        ({"steps": 17}, r"steps = 17.*16 tokens"),
        ({"eval_steps": 17}, r"eval_steps = 17"),
        ({"steps": 6, "block_size": 4}, r"steps = 6.*4 blocks.*use .*steps=4"),
        ({"eval_steps": 3, "block_size": 4}, r"eval_steps = 3.*use .*eval_steps=4"),
        ({"threshold": 0.9, "factor": 1.0}, r"threshold.*factor.*set one"),
        ({"threshold": 0.9, "order": "entropy"}, r"threshold.*order=entropy.*maskgit_plus"),
        ({"factor": 0.9, "order": "random"}, r"factor.*order=random"),
        ({"alg_temp": 0.5}, r"alg_temp.*entropy.*order=low_confidence"),
        ({"alg_temp": 0.5, "order": "topk_margin", "factor": 1.0}, r"alg_temp.*factor"),
        ({"order": "origin", "eos_confidence": False}, r"eos_confidence.*origin"),
        ({"eos_early_stop": True, "eos_policy": "all"}, r"nobody sampled"),
        ({"eos_early_stop": True, "block_size": 16}, r"one block"),
    ],
)
def test_settings_that_do_not(options, message):
    with pytest.raises(ConfigError, match=message):
        check(**options)
