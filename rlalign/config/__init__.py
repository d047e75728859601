"""Structured configuration: `schema` holds every option, `load` reads and checks."""

from rlalign.config.load import ConfigError, all_keys, check_values, parse_config, to_yaml
from rlalign.config.schema import (
    AlgoConfig,
    Config,
    FilterGroupsConfig,
    LoraConfig,
    MismatchConfig,
    ModelConfig,
    OptimConfig,
    RewardsConfig,
    RewardSpec,
    RolloutConfig,
    TaskConfig,
    TrackingConfig,
    TrainerConfig,
    VllmConfig,
)

__all__ = [
    "AlgoConfig",
    "Config",
    "ConfigError",
    "FilterGroupsConfig",
    "LoraConfig",
    "MismatchConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardSpec",
    "RewardsConfig",
    "RolloutConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainerConfig",
    "VllmConfig",
    "all_keys",
    "check_values",
    "parse_config",
    "to_yaml",
]
