"""Settings of training a diffusion language model that are each valid and do not go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlalign import algos
from rlalign.algos import Algorithm
from rlalign.config import Config, ConfigError
from rlalign.config.likelihood import LikelihoodConfig

PAIRED = ("count_anti", "coupled", "complement")
OWN_NUMBER = ("all_masked", "trace")  # estimators that say themselves how many passes there are


@dataclass(frozen=True, slots=True)
class Rule:
    """`broken` says whether a config breaks it; `why` is formatted with its `algo` as `a` and its
    `algo.likelihood` as `l`."""

    broken: Callable[[Config, Algorithm], object]
    why: str


RULES: tuple[Rule, ...] = (
    Rule(
        lambda c, _: c.algo.entropy_coef > 0,
        "algo.entropy_coef={a.entropy_coef:g}: the entropy of an estimate is none of the policy; "
        "leave it out",
    ),
    Rule(
        lambda c, _: bool(c.algo.beta) and c.algo.kl_in == "reward",
        "algo.kl_in=reward with algo.beta={a.beta:g}: a reward that estimates enter is as noisy as "
        "they are; use kl_in=loss, or beta=0",
    ),
    Rule(
        lambda c, _: c.algo.adv_estimator == "tree" or c.rollout.tree.num_trees > 0,
        "algo.adv_estimator={a.adv_estimator}, rollout.tree: no sample is the beginning of another "
        "one; use an algorithm without trees and rollout.tree.num_trees=0",
    ),
    Rule(
        lambda c, _: c.algo.allocation.allocator not in (None, "uniform"),
        "algo.allocation.allocator={a.allocation.allocator} measures gradients of exact log-probs; "
        "use allocator=uniform",
    ),
    Rule(
        lambda c, _: c.algo.mismatch.rollout_is not in (None, "none", "auto"),
        "algo.mismatch.rollout_is={a.mismatch.rollout_is}: the sampler's log-probs are those of "
        "its order, the estimates are not, and it reads the trainer's own weights anyway; use none",
    ),
    Rule(
        lambda c, _: c.algo.mismatch.bypass_mode or c.algo.mismatch.rollout_is_batch_normalize,
        "algo.mismatch.bypass_mode, rollout_is_batch_normalize compare with the sampler's "
        "log-probs, which the estimates are none of; leave them out",
    ),
    Rule(
        lambda c, _: c.algo.loss_agg_mode == "token-mean-local",
        "algo.loss_agg_mode=token-mean-local (loss_type={a.loss_type}) is a mean over a "
        "micro-batch, which holds single passes here; use token-mean",
    ),
    Rule(
        lambda c, _: _l(c).estimator in PAIRED and bool((_l(c).num_mc_samples or 2) % 2),
        "algo.likelihood.num_mc_samples={l.num_mc_samples} with estimator={l.estimator}, whose "
        "masks come in pairs: use an even number",
    ),
    Rule(
        lambda c, own: _l(c).surrogate != "bound" and own.pass_loss is None,
        "algo.likelihood.surrogate={l.surrogate} is for a loss that is a sum over passes, and "
        "loss_type={a.loss_type} has none; leave it out, or use loss_type=bgpo",
    ),
    Rule(
        lambda c, own: (
            _l(c).surrogate != "exact" and own.pass_loss is not None and bool(c.algo.beta)
        ),
        "algo.beta={a.beta:g} with algo.likelihood.surrogate={l.surrogate}: the KL of estimates is "
        "no sum over passes; use surrogate=exact, or beta=0",
    ),
    Rule(
        lambda c, own: (
            _l(c).surrogate != "exact" and own.pass_loss is not None and _l(c).estimator == "trace"
        ),
        "algo.likelihood.estimator=trace with surrogate={l.surrogate}: completions have as many "
        "passes as they took steps, and their sum is no mean; use surrogate=exact",
    ),
    Rule(
        lambda c, _: _l(c).kl_to == "old" and algos.couples_rows(c.algo),
        "algo.likelihood.kl_to=old with loss_type={a.loss_type}, which compares with the reference;"
        " leave it out",
    ),
    Rule(
        lambda c, _: _l(c).kl_to == "old" and bool(c.algo.beta) and c.algo.kl_estimator == "k1",
        "algo.kl_estimator=k1 with algo.likelihood.kl_to=old: its gradient is no gradient of a KL; "
        "use k2 or k3",
    ),
    Rule(
        lambda c, own: c.algo.use_bias_correction_kl and own.estimate_loss is not None,
        "algo.use_bias_correction_kl=true is for token ratios, and loss_type={a.loss_type} has "
        "none; leave it out",
    ),
    Rule(
        lambda c, _: c.algo.loss_type == "spg" and bool(c.algo.beta),
        "algo.beta={a.beta:g} with loss_type=spg: a KL of two bounds is none; leave it out",
    ),
    Rule(
        lambda c, _: c.algo.loss_type == "vrpo" and not c.algo.beta,
        "algo.beta={a.beta} with loss_type=vrpo: every preference is worth beta times a difference "
        "of log-probs; use beta > 0, e.g. 0.1",
    ),
    Rule(
        lambda c, _: c.algo.loss_type in ("vrpo", "wd1") and c.algo.normalize_advantages,
        "algo.normalize_advantages=true has no effect with loss_type={a.loss_type}; leave it out",
    ),
    Rule(
        lambda c, _: (_l(c).estimator == "block_noise") != (c.algo.loss_type == "spg"),
        "algo.likelihood.estimator={l.estimator} with loss_type={a.loss_type}: block_noise has the "
        "mean over a completion's tokens, which spg needs, the others have sums, which all else "
        "needs; leave it out",
    ),
    Rule(
        lambda c, _: c.task.completions != "rollout" and _keeps_canvas(c),
        "rollout.diffusion.eos_policy with task.completions other than rollout: completions of the "
        "data end with their end token and have no canvas behind it; use eos_policy=drop",
    ),
    Rule(
        lambda c, _: c.algo.overlong.buffer_len > 0 and _keeps_canvas(c),
        "algo.overlong.buffer_len={a.overlong.buffer_len} with rollout.diffusion.eos_policy other "
        "than drop: every completion is as long as the canvas then; use eos_policy=drop, or 0",
    ),
    Rule(
        lambda c, _: _l(c).estimator == "trace" and c.task.completions != "rollout",
        "algo.likelihood.estimator=trace with task.completions other than rollout: completions of "
        "the data come without the steps that decided their tokens; use count_strat",
    ),
    Rule(
        lambda c, _: _l(c).estimator == "trace" and c.rollout.diffusion.edit_threshold is not None,
        "algo.likelihood.estimator=trace with rollout.diffusion.edit_threshold: a token that was "
        "edited has two steps; leave one of them out",
    ),
)

# Which settings are read by what alone, and how to say so.
READ_BY: dict[str, tuple[Callable[[Config], bool], str]] = {
    "num_mc_samples": (
        lambda c: _l(c).estimator not in OWN_NUMBER,
        f"estimators other than {' and '.join(OWN_NUMBER)}",
    ),
    "min_time": (lambda c: _l(c).estimator == "bernoulli", "estimator=bernoulli"),
    "shrink": (lambda c: _l(c).estimator == "trace", "estimator=trace"),
    "fresh_masks": (
        lambda c: c.algo.num_iterations > 1 and _l(c).estimator != "trace",
        "several iterations over a batch (algo.num_iterations) and masks of chance",
    ),
    "kl_to": (lambda c: bool(c.algo.beta), "algo.beta > 0"),
    "norm": (lambda c: algos.has_sequence_ratio(c.algo), "loss_type=bgpo or espo"),
    "eubo_power": (lambda c: c.algo.loss_type == "spg", "loss_type=spg"),
    "eubo_share": (lambda c: c.algo.loss_type == "spg", "loss_type=spg"),
}


def check_estimates(config: Config) -> None:
    """Raise ConfigError for settings of the likelihood or the algorithm that would do nothing, or
    something else than they say, with this engine. The config is resolved."""
    own, algo = algos.get(config.algo.loss_type), config.algo
    preset, given = algos.likelihood_preset(algo), algo.likelihood
    chosen = [name for name, value in vars(given).items() if value != getattr(preset, name)]
    if config.rollout.engine != "masked_diffusion":
        _check_elsewhere(config, own, chosen)
        return
    for rule in RULES:
        if rule.broken(config, own):
            why = rule.why.format(a=algo, l=given)
            raise ConfigError(f"{why} (rollout.engine=masked_diffusion)")
    for name in chosen:
        read, where = READ_BY.get(name, (lambda _: True, ""))
        if not read(config):
            raise ConfigError(
                f"algo.likelihood.{name}={getattr(given, name)} is read with {where} only, and "
                f"this is loss_type={algo.loss_type}, estimator={given.estimator}, "
                f"beta={algo.beta}, num_iterations={algo.num_iterations}; leave it out"
            )


def _check_elsewhere(config: Config, own: Algorithm, chosen: list[str]) -> None:
    """What is for diffusion language models, without one."""
    engine = config.rollout.engine
    if own.likelihood and engine == "none":
        raise ConfigError(
            f"algo.loss_type={config.algo.loss_type} trains a diffusion language model, and "
            "rollout.engine=none says nothing of the model: use rollout.engine=masked_diffusion, "
            "which samples nothing with task.completions=dataset and no task.eval"
        )
    if own.likelihood:
        raise ConfigError(
            f"algo.loss_type={config.algo.loss_type} estimates the log-probs of a diffusion "
            f"language model, and rollout.engine={engine} has exact ones: use "
            "rollout.engine=masked_diffusion with such a model, or another algorithm, e.g. grpo"
        )
    if chosen:
        raise ConfigError(
            f"algo.likelihood.{chosen[0]}={getattr(_l(config), chosen[0])} is for "
            f"rollout.engine=masked_diffusion, and rollout.engine={engine} has exact log-probs; "
            "leave it out"
        )


def _keeps_canvas(config: Config) -> bool:
    return config.rollout.diffusion.eos_policy not in (None, "drop")


def _l(config: Config) -> LikelihoodConfig:
    return config.algo.likelihood
