"""Weight publishing with a receipt and a check, so that a silent sync failure ends the run at once.

Three things must agree after every update: the digest of what was sent and the digest the engine
computed of what it received, the version it now stamps on samples, and the log-probs of one check
sequence under engine and trainer. The last catches what digests cannot: weights that arrived whole
and were then not used (a stale packed copy of a tied head, a prefix cache of the old policy).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from rlalign.errors import RlalignError
from rlalign.rollout.digest import WeightDigest
from rlalign.rollout.engine import RolloutEngine
from rlalign.types import PolicyVersion


class WeightSyncError(RlalignError):
    """Engine and trainer do not hold the same weights; the message names both sides' figures."""


def publish(
    engine: RolloutEngine, parameters: Iterable[tuple[str, torch.Tensor]], version: int
) -> PolicyVersion:
    """Send `parameters` to `engine` as `version` and compare its receipt with what was sent.

    Raises WeightSyncError when digest or version differ.
    """
    sent = WeightDigest()
    receipt = engine.update_weights(_digested(parameters, sent), version)
    if receipt != PolicyVersion(version, sent.hexdigest()):
        raise WeightSyncError(
            f"sent policy version {version} with digest {sent.hexdigest()}, the engine holds "
            f"version {receipt.version} with digest {receipt.digest}. Nothing sampled from it may "
            "train; restart the run with --resume."
        )
    return receipt


def _digested(
    parameters: Iterable[tuple[str, torch.Tensor]], digest: WeightDigest
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in parameters:
        digest.add(name, tensor)
        yield name, tensor


def check_engine(
    engine: RolloutEngine,
    sequence: Sequence[int],
    trainer_logp: torch.Tensor,
    tolerance: float,
) -> float:
    """Compare the engine's log-probs of `sequence` at temperature 1 with `trainer_logp` ([len -
    1]).

    Returns the largest absolute difference, nats; raises WeightSyncError above `tolerance`.
    """
    [engine_logp] = engine.score([sequence])
    difference = float((engine_logp.cpu() - trainer_logp.cpu()).abs().max())
    if not difference <= tolerance:
        base = (
            " It took an adapter only: is the model that it serves the very one this run started "
            "from (model.path, and seed for a model built here)?"
            if engine.capabilities.adapter_only
            else ""
        )
        raise WeightSyncError(
            f"after the update to policy version {engine.version.version} engine and trainer "
            f"differ by {difference:.3g} nats on the check sequence (rollout.logp_tolerance = "
            f"{tolerance:g}): the engine does not use the weights it received.{base} Raise the "
            "tolerance only if the dtypes of the two sides explain the gap."
        )
    return difference
