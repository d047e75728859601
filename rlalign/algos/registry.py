"""Finding algorithms and filling configs from them.

Every module of this package that defines `ALGORITHM` is an algorithm (`ALGORITHMS`: a family of
them), so adding one is adding a file. One outside the package is named by import path:
`algo.loss_type=package.module:ALGORITHM`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlalign.algos.aggregate import depends_on_split
from rlalign.algos.base import PRESET_FIELDS, Algorithm, PassLoss
from rlalign.algos.checks import GROUP_BASELINES, check
from rlalign.algos.elbo import combine, sequence_loss
from rlalign.algos.errors import AlgoError
from rlalign.algos.kl import ALIASES
from rlalign.algos.loss import LossOutput, corrects
from rlalign.types import TrainBatch

if TYPE_CHECKING:
    from rlalign.config.schema import (
        AlgoConfig,
        AllocationConfig,
        LikelihoodConfig,
        MismatchConfig,
        TreeConfig,
    )

SHARED_DEFAULTS: Mapping[str, Any] = {
    "adv_estimator": "grpo",
    "importance_sampling_level": "token",
    "policy_loss": "ppo_clip",
    "loss_agg_mode": "seq-mean-token-mean",
    "prompt_weighting": "sample",
    "beta": 0.0,
    "kl_in": "loss",
}

# Settings that only mean something together with another one: what they default to when the
# deciding field differs from the preset's.
DEPENDENT_DEFAULTS: Mapping[str, Mapping[Any, Mapping[str, Any]]] = {
    "adv_estimator": {
        "grpo": {"scale_rewards": "group"},
        "rloo": {"scale_rewards": "none"},
        "reinforce_plus_plus": {"scale_rewards": "none"},
        "reinforce_plus_plus_baseline": {"scale_rewards": "none"},
        "raft": {"scale_rewards": "none"},
        "reinforce_rej": {"scale_rewards": "none"},
        "tree": {"scale_rewards": "group", "loss_agg_mode": "token-mean"},
    },
    "policy_loss": {
        "ppo_clip": {"epsilon": 0.2, "epsilon_high": None, "delta": None},
        "cispo": {"epsilon": None, "epsilon_high": 4.0, "delta": None},
        "reinforce": {"epsilon": None, "epsilon_high": None, "delta": None},
        "unclipped": {"epsilon": None, "epsilon_high": None, "delta": None},
    },
    "kl_in": {"loss": {"kl_estimator": "k3"}, "reward": {"kl_estimator": "k1"}},
}


TREE_DEFAULTS: Mapping[str, Any] = {
    "fuse": "child_mean",
    "advantage": "depth",
    "scope": "tree",
    "weight": "depth_mean",
    "drop_zero": False,
}
LIKELIHOOD_DEFAULTS: Mapping[str, Any] = {
    "estimator": "count_strat",
    "num_mc_samples": 16,
    "prompt_mask_prob": 0.0,
    "fresh_masks": False,
    "kl_to": "reference",
}
TREE_COMPAT: Mapping[str, Mapping[str, Any]] = {
    "rlalign": {},
    "paper": {"fuse": "path_softmax", "weight": "edge_mean"},
    "official": {"fuse": "leaf_mean", "weight": "edge_mean"},
}


def names() -> list[str]:
    """The built-in algorithms, sorted."""
    return sorted(_builtin())


def get(name: str) -> Algorithm:
    """The algorithm called `name`, one of its aliases, or an import path `package.module:NAME`.

    Raises AlgoError with the nearest name when there is none.
    """
    if ":" in name:
        return _imported(name)
    known = _builtin()
    by_alias = {alias: algorithm for algorithm in known.values() for alias in algorithm.aliases}
    found = known.get(name) or by_alias.get(name)
    if found is None:
        near = difflib.get_close_matches(name, [*known, *by_alias], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise AlgoError(
            f"algo.loss_type={name!r} is no algorithm; {hint}There are {', '.join(sorted(known))}; "
            "one of your own is named by its import path, package.module:ALGORITHM"
        )
    return found


def expansion(name: str) -> list[tuple[str, Any]]:
    """What the preset fills in, field by field, for printing; then any decision it overrides."""
    algorithm = get(name)
    preset = _preset(algorithm, {})
    rows: list[tuple[str, Any]] = [(key, preset[key]) for key in PRESET_FIELDS]
    rows.append(("allocation.allocator", algorithm.allocator))
    if preset["adv_estimator"] == "tree":
        rows += [(f"tree.{key}", value) for key, value in _tree_preset(algorithm).items()]
    rows += [(f"likelihood.{key}", value) for key, value in algorithm.likelihood.items()]
    for decision in ("credit", "loss", "pass_loss", "estimate_loss"):
        function = getattr(algorithm, decision)
        if function is not getattr(Algorithm, decision):
            rows.append((decision, f"{function.__module__}.{function.__qualname__}"))
    return rows


def resolve(cfg: AlgoConfig, *, engine_shares_parameters: bool | None = None) -> AlgoConfig:
    """A copy of `cfg` with every preset field filled and every alias spelled out.

    engine_shares_parameters decides `rollout_is=auto`: none for an engine that reads the trainer's
    own parameters, token for a separate one; None leaves it. Resolving twice changes nothing.
    Raises AlgoError for combinations that make no sense, warns AlgoWarning for those that work but
    do not do what their name says.
    """
    algorithm = get(cfg.loss_type)
    given = {key: getattr(cfg, key) for key in PRESET_FIELDS if getattr(cfg, key) is not None}
    filled = _preset(algorithm, given)
    sections = {
        "mismatch": _resolve_mismatch(cfg.mismatch, engine_shares_parameters),
        "allocation": _resolve_allocation(cfg, algorithm, filled["adv_estimator"]),
        "tree": _resolve_tree(cfg.tree, algorithm),
        "likelihood": _resolve_likelihood(cfg.likelihood, algorithm, filled["policy_loss"]),
    }
    resolved = dataclasses.replace(cfg, **filled, **sections)
    _check_fixed(algorithm, filled)
    check(resolved)
    return resolved


def compute_advantages(
    reward_B: Tensor,
    acc_B: Tensor,
    group_id_B: Tensor,
    mask_BT: Tensor,
    cfg: AlgoConfig,
    *,
    kl_BT: Tensor | None = None,
) -> Tensor:
    """Advantages as the configured algorithm gives credit: see advantage.compute_advantages."""
    return get(cfg.loss_type).credit(reward_B, acc_B, group_id_B, mask_BT, cfg, kl_BT=kl_BT)


def policy_loss(
    logp_BT: Tensor, batch: TrainBatch, cfg: AlgoConfig, *, entropy_BT: Tensor | None = None
) -> LossOutput:
    """Loss and metrics as the configured algorithm defines them: see loss.policy_loss."""
    return get(cfg.loss_type).loss(logp_BT, batch, cfg, entropy_BT=entropy_BT)


def estimate_loss(
    logp_BJT: Tensor, batch: TrainBatch, cfg: AlgoConfig, max_completion_length: int
) -> LossOutput:
    """Loss and metrics of log-probs under `batch.masks` (elbo.py), as the configured algorithm
    defines them: its own, or the one for log-probs, of their estimates."""
    algorithm = get(cfg.loss_type)
    if algorithm.estimate_loss is not None:
        return algorithm.estimate_loss(logp_BJT, batch, cfg, max_completion_length)
    masks = batch.masks
    assert masks is not None
    if batch.logp_old_BJT is not None:
        batch = batch.replace(logp_old_BT=combine(batch.logp_old_BJT, masks))
    output = algorithm.loss(combine(logp_BJT, masks), batch, cfg)
    if cfg.likelihood.estimator == "trace":  # the one that estimates what the sampler reported
        return output
    kept = {k: v for k, v in output.metrics.items() if not k.startswith("sampling/")}
    return LossOutput(output.loss, kept)


def pass_loss(cfg: AlgoConfig) -> PassLoss | None:
    """The loss of single passes, where it is a sum over them."""
    return None if cfg.likelihood.surrogate == "exact" else get(cfg.loss_type).pass_loss


def slopes_need_values(batch: TrainBatch, cfg: AlgoConfig) -> bool:
    """Whether the slopes of `estimate_loss` depend on the log-probs: not while the policy is the
    one that sampled, where every ratio is 1 with slope 1."""
    own = get(cfg.loss_type)
    ratios_only = own.loss is Algorithm.loss and not own.couples_rows and own.slopes_at_one
    return batch.logp_old_BJT is not None or has_kl(cfg) or not ratios_only


def couples_rows(cfg: AlgoConfig) -> bool:
    """Whether a row's loss depends on the current log-probs of its whole group."""
    return get(cfg.loss_type).couples_rows


def has_kl(cfg: AlgoConfig) -> bool:
    """Whether a KL can be other than 0: not to the policy that sampled, with one optimizer step per
    rollout."""
    one_step = cfg.num_iterations * cfg.num_minibatches == 1
    return bool(cfg.beta) and not (cfg.likelihood.kl_to == "old" and one_step)


def needs_reference(cfg: AlgoConfig) -> bool:
    """Whether reference log-probs are needed at all."""
    return bool(cfg.beta) and cfg.likelihood.kl_to != "old"


def has_sequence_ratio(cfg: AlgoConfig) -> bool:
    """Whether estimates are compared per completion, divided as `likelihood.norm` says."""
    algorithm = get(cfg.loss_type)
    return algorithm.pass_loss is not None or algorithm.estimate_loss is sequence_loss


def needs_old_estimates(cfg: AlgoConfig) -> bool:
    """Whether the policy that sampled must be asked for its log-probs under the masks of a batch:
    as `needs_old_logp`, but not where nothing compares with them."""
    compares = cfg.policy_loss != "reinforce" or cfg.use_bias_correction_kl
    return needs_old_logp(cfg) and (compares or (bool(cfg.beta) and cfg.likelihood.kl_to == "old"))


def likelihood_preset(cfg: AlgoConfig) -> LikelihoodConfig:
    """What `cfg.likelihood` is where a config says nothing of it; `cfg` is resolved."""
    return _resolve_likelihood(
        type(cfg.likelihood)(), get(cfg.loss_type), cfg.policy_loss or "ppo_clip"
    )


def silent_without_advantage(cfg: AlgoConfig) -> bool:
    """Whether a row of advantage 0 adds nothing to the gradient, whatever its log-probs."""
    own_loss = get(cfg.loss_type).loss is not Algorithm.loss or couples_rows(cfg)
    other_terms = cfg.entropy_coef > 0 or has_kl(cfg)
    return not (own_loss or other_terms or depends_on_split(cfg))


def needs_old_logp(cfg: AlgoConfig) -> bool:
    """Whether the trainer must compute `logp_old_BT` in a forward pass of its own.

    Not with a single optimizer step per rollout batch, where the old log-probs are the current
    ones, unless something needs them before that step: the KL in the reward, or weights that are
    normalised over the batch. In bypass mode the engine's log-probs take their place, and CoPG has
    no ratio.
    """
    if cfg.mismatch.bypass_mode:
        return False
    several_steps = cfg.num_iterations * cfg.num_minibatches > 1 and not couples_rows(cfg)
    kl_in_reward = needs_reference(cfg) and cfg.kl_in == "reward"
    return several_steps or kl_in_reward or needs_rollout_weights(cfg)


def needs_rollout_weights(cfg: AlgoConfig) -> bool:
    """Whether `TrainBatch.rollout_is_weight_BT` must be set with `rollout_weights`."""
    return corrects(cfg) and cfg.mismatch.rollout_is_batch_normalize


@functools.cache
def _builtin() -> dict[str, Algorithm]:
    found: dict[str, Algorithm] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        loaded = importlib.import_module(f"rlalign.algos.{module.name}")
        single = getattr(loaded, "ALGORITHM", None)
        family = getattr(loaded, "ALGORITHMS", () if single is None else (single,))
        found |= {algorithm.name: algorithm for algorithm in family}
    return found


@functools.cache
def _imported(path: str) -> Algorithm:
    module_name, _, attribute = path.partition(":")
    try:
        algorithm = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise AlgoError(
            f"algo.loss_type={path!r} cannot be imported: {error}. Put the folder of the module "
            "on PYTHONPATH and name the attribute after the colon"
        ) from error
    if not isinstance(algorithm, Algorithm):
        raise AlgoError(
            f"algo.loss_type={path!r} is {type(algorithm).__name__}, not an rlalign.algos.Algorithm"
        )
    return algorithm


def _preset(algorithm: Algorithm, given: Mapping[str, Any]) -> dict[str, Any]:
    """All PRESET_FIELDS: what was given, else the preset's, else the shared default."""
    own = {**SHARED_DEFAULTS, **algorithm.defaults}
    filled = {**own, **given}
    for decider, table in DEPENDENT_DEFAULTS.items():
        dependents = table.get(filled[decider], {})
        own_choice = filled[decider] == own[decider]
        for key, shared in dependents.items():
            preset_value = own.get(key, shared) if own_choice else shared
            filled[key] = given.get(key, preset_value)
    if filled["policy_loss"] == "ppo_clip" and filled["epsilon_high"] is None:
        filled["epsilon_high"] = filled["epsilon"]
    filled["kl_estimator"] = ALIASES.get(filled["kl_estimator"], filled["kl_estimator"])
    return {key: filled.get(key) for key in PRESET_FIELDS}


def _check_fixed(algorithm: Algorithm, filled: Mapping[str, Any]) -> None:
    preset = _preset(algorithm, {})
    for key in algorithm.fixed:
        if filled[key] != preset[key]:
            raise AlgoError(
                f"algo.{key}={filled[key]} has no effect with loss_type={algorithm.name}, which "
                "brings its own; leave it out"
            )


def _resolve_allocation(
    cfg: AlgoConfig, algorithm: Algorithm, adv_estimator: str
) -> AllocationConfig:
    given = cfg.allocation
    official = given.compat == "official"
    compares = adv_estimator in GROUP_BASELINES and cfg.singleton_advantage == "zero"
    return dataclasses.replace(
        given,
        allocator=given.allocator or algorithm.allocator,
        normalize_over=given.normalize_over or ("all" if official else "accepted"),
        group_size=given.group_size or (2 if compares and not official else 1),
        grad_params=given.grad_params or ("embed_tokens" if official else "lm_head"),
    )


def _tree_preset(algorithm: Algorithm, compat: str = "rlalign") -> dict[str, Any]:
    preset = {**TREE_DEFAULTS, **algorithm.tree}
    if algorithm.name == "branch_grpo":  # the one that `compat` is about
        preset |= TREE_COMPAT[compat]
    return preset


def _resolve_tree(given: TreeConfig, algorithm: Algorithm) -> TreeConfig:
    preset = _tree_preset(algorithm, given.compat)
    open_ = {name: value for name, value in preset.items() if getattr(given, name) is None}
    return dataclasses.replace(given, **open_)


def _resolve_likelihood(
    given: LikelihoodConfig, algorithm: Algorithm, policy_loss: str
) -> LikelihoodConfig:
    preset = {**LIKELIHOOD_DEFAULTS, **algorithm.likelihood}
    preset.setdefault("norm", "valid" if policy_loss == "ppo_clip" else "none")
    open_ = {name: value for name, value in preset.items() if getattr(given, name) is None}
    return dataclasses.replace(given, **open_)


def _resolve_mismatch(
    mismatch: MismatchConfig, engine_shares_parameters: bool | None
) -> MismatchConfig:
    level = mismatch.rollout_is or "none"
    if level == "auto" and mismatch.bypass_mode:
        level = "none"
    if level == "auto" and engine_shares_parameters is not None:
        level = "none" if engine_shares_parameters else "token"
    return dataclasses.replace(mismatch, rollout_is=level)
