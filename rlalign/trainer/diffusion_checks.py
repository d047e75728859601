"""Settings of a masked-diffusion sampler that are each valid and do not go together."""

from __future__ import annotations

from rlalign.config import Config, ConfigError
from rlalign.config.schema import DiffusionConfig
from rlalign.rollout.unmask_order import conflict

SECTION = "rollout.diffusion"


def check_diffusion(config: Config) -> None:
    """Raise ConfigError. What depends on the model, the engine checks when it is built."""
    diffusion, length = config.rollout.diffusion, config.rollout.max_completion_length
    blocks = _check_blocks(diffusion, length)
    for name, steps in (("steps", diffusion.steps), ("eval_steps", diffusion.eval_steps)):
        if steps is not None:
            _check_steps(name, steps, blocks, length)
    _check_order(diffusion)
    _check_end(diffusion, blocks)


def _check_blocks(diffusion: DiffusionConfig, length: int) -> int:
    """The number of blocks of a completion."""
    size = diffusion.block_size or length
    if length % size:
        raise ConfigError(
            f"rollout.max_completion_length = {length} is not a whole number of blocks of "
            f"{SECTION}.block_size = {size}: the last one would be shorter. Use "
            f"max_completion_length={-(-length // size) * size}, or another block_size"
        )
    return length // size


def _check_steps(name: str, steps: int, blocks: int, length: int) -> None:
    if steps > length:
        raise ConfigError(
            f"{SECTION}.{name} = {steps}, and a completion has {length} tokens "
            "(rollout.max_completion_length): a step decides at least one, so at most as many "
            "steps can be taken"
        )
    if steps % blocks:
        raise ConfigError(
            f"{SECTION}.{name} = {steps} cannot be shared out evenly over {blocks} blocks "
            f"(max_completion_length / block_size): use "
            f"{SECTION}.{name}={max(1, steps // blocks) * blocks}"
        )


def _check_order(diffusion: DiffusionConfig) -> None:
    threshold, factor = diffusion.threshold is not None, diffusion.factor is not None
    if threshold and factor:
        raise ConfigError(
            f"{SECTION}.threshold and {SECTION}.factor are two rules for the same thing: set one"
        )
    if reason := conflict(
        diffusion.order,
        parallel=threshold or factor,
        alg_temp=diffusion.alg_temp,
        eos_confidence=diffusion.eos_confidence,
    ):
        raise ConfigError(f"{SECTION}: {reason}")


def _check_end(diffusion: DiffusionConfig, blocks: int) -> None:
    if not diffusion.eos_early_stop:
        return
    if diffusion.eos_policy == "all":
        raise ConfigError(
            f"{SECTION}.eos_early_stop fills in end tokens that nobody sampled, and "
            f"{SECTION}.eos_policy=all trains on them: leave one of them out"
        )
    if diffusion.block_size and blocks == 1:
        raise ConfigError(
            f"{SECTION}.eos_early_stop looks for an end token after each block but the last, and "
            f"there is one block: lower {SECTION}.block_size, or leave it out"
        )
