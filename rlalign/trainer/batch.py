"""From scored groups to the tensors an algorithm sees. Pure.

Shapes: B sequences, T the longest completion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlalign import algos
from rlalign.config import AlgoConfig, Config
from rlalign.errors import RlalignError
from rlalign.trainer import token_trees
from rlalign.trainer.token_trees import with_trees
from rlalign.types import FINISH_ABORT, FINISH_LENGTH, Group, Scores, TrainBatch


class StaleSampleError(RlalignError):
    """A sample was made by a policy version that the trainer did not publish."""


def check_versions(groups: Sequence[Group], published: set[int]) -> None:
    """Raise StaleSampleError for the first sample holding tokens of an unpublished policy
    version."""
    for group in groups:
        for sample in group.samples:
            strange = {span.version for span in sample.spans} - published
            if strange:
                raise StaleSampleError(
                    f"sample {sample.index} of prompt {sample.prompt_id!r} holds tokens of policy "
                    f"version {sorted(strange)}; published and allowed now: {sorted(published)}. "
                    "The engine runs other weights than the trainer sent; restart the engine."
                )


def oldest_version(groups: Sequence[Group], default: int) -> int:
    """The earliest policy version that made a token of `groups`; `default` where there is none."""
    samples = (sample for group in groups for sample in group.samples)
    return min((span.version for sample in samples for span in sample.spans), default=default)


def bare_batch(sequences: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> TrainBatch:
    """Rows whose log-probs are wanted and nothing else; the last `lengths[i]` tokens of row i are
    its completion."""
    length_B = torch.tensor(lengths, dtype=torch.long)
    mask_BT = (torch.arange(max(lengths, default=0)) < length_B[:, None]).float()
    return TrainBatch(
        sequences=tuple(sequences),
        completion_len_B=length_B,
        group_id_B=torch.zeros_like(length_B),
        mask_BT=mask_BT,
        reward_B=torch.zeros(len(length_B)),
        logp_rollout_BT=torch.zeros_like(mask_BT),
    )


def make_train_batch(groups: Sequence[Group], scores: Scores, algo: AlgoConfig) -> TrainBatch:
    """Lay the samples of `groups` out as rows, in order; group i becomes group id i.

    `scores` hold one entry per sample in that order. Tokens of samples that could not be scored,
    were aborted, or (with `mask_truncated_completions`) were cut off carry no gradient: mask 0. For
    samples that are leaves of trees see token_trees.py.
    """
    rows = [(i, group, sample) for i, group in enumerate(groups) for sample in group.samples]
    if len(rows) != len(scores.reward_B):
        raise ValueError(f"{len(rows)} samples but {len(scores.reward_B)} rewards")
    length_B = torch.tensor([len(sample.token_ids) for _, _, sample in rows], dtype=torch.long)
    width = int(length_B.max()) if rows else 0
    logp_BT = torch.zeros(len(rows), width)
    for b, (_, _, sample) in enumerate(rows):
        logp_BT[b, : len(sample.logp)] = torch.tensor(sample.logp)
    finish = [sample.finish_reason for _, _, sample in rows]
    aborted_B = torch.tensor([reason == FINISH_ABORT for reason in finish], dtype=torch.bool)
    reward_B = scores.reward_B.float().masked_fill(aborted_B, float("nan"))
    mask_BT = torch.arange(width)[None, :] < length_B[:, None]
    truncated_B = torch.tensor([reason == FINISH_LENGTH for reason in finish], dtype=torch.bool)
    sources = [sample.source_id for _, _, sample in rows]
    batch = TrainBatch(
        sequences=tuple(group.prompt.token_ids + sample.token_ids for _, group, sample in rows),
        completion_len_B=length_B,
        group_id_B=torch.tensor([i for i, _, _ in rows], dtype=torch.long),
        mask_BT=algos.gradient_mask(mask_BT.float(), reward_B, truncated_B, algo),
        reward_B=reward_B,
        logp_rollout_BT=logp_BT,
        group_weight_B=_weights([group.weight for _, group, _ in rows]),
        source_id_B=torch.tensor(sources) if any(sources) else None,
        step_BT=_steps([sample.steps for _, _, sample in rows], width),
    )
    if any(group.tree is not None for group in groups):
        return with_trees(batch, groups, algo)
    return batch


def _steps(steps: Sequence[tuple[int, ...]], width: int) -> torch.Tensor | None:
    """None where no sampler said when it decided a token."""
    if not all(steps) or not steps:
        return None
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in steps])


def _weights(weights: Sequence[float]) -> torch.Tensor | None:
    """None where all count the same."""
    return None if all(weight == 1 for weight in weights) else torch.tensor(weights)


def with_weights(minibatch: TrainBatch, config: Config, share: float = 1.0) -> TrainBatch:
    """Attach each token's part of the loss over this minibatch of all processes, times `share`."""
    if minibatch.tree is not None:
        return token_trees.with_weights(minibatch, config.algo)
    return algos.attach_weights(
        minibatch,
        config.algo,
        max_completion_length=config.rollout.max_completion_length,
        share=share,
    )
