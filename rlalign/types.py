"""The values that travel between layers: frozen dataclasses, no behaviour beyond slicing.

Shapes: B sequences of one optimizer batch, T padded completion length. Tensors carry their shape
as a suffix. Token ids are the truth from the moment a prompt is tokenised; text is only for people
and rewards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

FINISH_STOP = "stop"  # an end-of-sequence token was sampled; it is the last completion token
FINISH_LENGTH = "length"  # max_completion_length was reached: the completion is truncated
FINISH_ABORT = "abort"  # the engine gave up; such samples never train


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set, tokenised.

    >>> Prompt(id="gsm8k/17", token_ids=(3, 9, 4), source="2+2=?", answer="4")
    """

    id: str
    token_ids: tuple[int, ...]
    source: Any  # the `prompt` column as written: a string or a list of chat messages
    answer: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # every further column, for rewards


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """A counter and a digest of the weights, computed by whoever RECEIVED them.

    >>> PolicyVersion(version=12, digest="9f2c41d0a1b2c3d4")
    """

    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """`num_tokens` consecutive completion tokens made by policy `version`."""

    num_tokens: int
    version: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion.

    `token_ids` include the end-of-sequence token when one was sampled. `logp` are the behaviour
    policy's log-probs of those tokens at the sampling temperature (same length). `spans` say which
    policy version made which tokens and add up to the same length. A completion that the data
    brought along (`source_id` above 0) has zeros for `logp`, which nobody knows, and no spans.
    `steps` are given where a sampler decides tokens in an order of its own (masked diffusion).
    `top`, where it was asked for, has the likeliest tokens of each step with their log-probs,
    likeliest first.

    >>> Sample("gsm8k/17", 0, (5, 1), (-0.1, -0.02), "stop", (VersionSpan(2, 12),), text="4")
    """

    prompt_id: str
    index: int
    token_ids: tuple[int, ...]
    logp: tuple[float, ...]
    finish_reason: str
    spans: tuple[VersionSpan, ...]
    text: str = ""
    parent: str | None = None  # id of the node this sample continues, for trees
    source_id: int = 0  # 0: sampled in this run; from 1 on: which source of the data wrote it
    steps: tuple[int, ...] = ()  # the sampler's step that decided each token; same length, or none
    top: tuple[tuple[tuple[int, float], ...], ...] = ()  # same length, or none


ROOT, POLICY, ENV, ODE = range(4)  # what led into a node of a tree; only POLICY has a log-prob


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """Rollouts that share their beginnings: trees of token segments, or of denoising steps.

    A forest of N nodes, parents before children, as parallel tensors. An edge carries the id of its
    child: a token tree's edge is a segment of tokens, a denoising tree's one step of the sampler.
    Leaves are finished samples. `group_N` is the prompt occurrence, which may have several trees.
    `logp_N` is the behaviour policy's log-prob of the edge per action (token, or latent dimension),
    of which it has `num_actions_N`; both are 0 for a root. `reward_N` counts at leaves only (NaN:
    unscorable).

    >>> # one tree: a root, two children, and one of them with two children of its own
    >>> # parent_N=[-1, 0, 0, 1, 1], depth_N=[0, 1, 1, 2, 2], tree_N=group_N=[0, 0, 0, 0, 0]
    >>> # kind_N=[ROOT, POLICY, POLICY, POLICY, POLICY], reward_N=[nan, nan, 0., 1., 0.]
    """

    parent_N: torch.Tensor  # int64, -1: a root
    depth_N: torch.Tensor  # int64, 0: a root
    tree_N: torch.Tensor  # int64
    group_N: torch.Tensor  # int64
    kind_N: torch.Tensor  # int64: ROOT, POLICY, ENV (forced tokens) or ODE (a deterministic step)
    reward_N: torch.Tensor  # float32
    logp_N: torch.Tensor  # float32
    num_actions_N: torch.Tensor  # int64

    def __len__(self) -> int:
        return len(self.parent_N)

    def replace(self, **changes: torch.Tensor) -> Tree:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt occurrence; ragged sizes are normal, an allocator may give none.

    `weight` is how much the group counts beside the others of its batch. Samples that share their
    beginnings are the leaves of `tree`, whose `group_N` is 0, with rewards still to come: sample i
    is the tokens of the nodes `paths[i]`, from below a root to a leaf.

    >>> # the tree of the example above: its leaves are nodes 2, 3 and 4
    >>> # samples=(a, b, c), paths=((2,), (1, 3), (1, 4))
    """

    prompt: Prompt
    samples: tuple[Sample, ...]
    weight: float = 1.0
    tree: Tree | None = None
    paths: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards of B samples, in the order of the samples.

    `reward_B` is the weighted sum after shaping; NaN marks a sample that could not be scored.
    `acc_B` is the unshaped correctness in [0, 1] that dynamic sampling filters on. `by_function`
    maps a reward's name to its own B values (NaN: does not apply or failed); `errors` counts
    verdicts other than ok by kind.
    """

    reward_B: torch.Tensor  # float32
    acc_B: torch.Tensor  # float32
    by_function: Mapping[str, torch.Tensor] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Under which masks a diffusion language model's log-probs are taken: J forward passes of each
    of B completions, and what a token's log-prob then counts in the estimate (0: it is not scored,
    and a pass without a scored token is not run). How they are drawn: algos/elbo.py.

    >>> # two passes over three tokens that mask one and two of them, the estimator `count`:
    >>> # hidden_BJT=[[[0, 1, 0], [1, 0, 1]]], weight_BJT=[[[0, 1.5, 0], [.75, 0, .75]]]
    """

    hidden_BJT: torch.Tensor  # bool: the model sees a mask there
    weight_BJT: torch.Tensor  # float32
    prompt_hidden_BJP: torch.Tensor | None = None  # bool, from the first token; None: no prompt is

    def rows(self, index: torch.Tensor, width: int) -> Masks:
        """Those of rows `index`, cut to `width` tokens."""
        prompt_BJP = self.prompt_hidden_BJP
        return Masks(
            self.hidden_BJT[index][..., :width],
            self.weight_BJT[index][..., :width],
            None if prompt_BJP is None else prompt_BJP[index],
        )

    def passes(self, start: int, stop: int) -> Masks:
        """Passes `start` to `stop` of every row."""
        prompt_BJP = self.prompt_hidden_BJP
        return Masks(
            self.hidden_BJT[:, start:stop],
            self.weight_BJT[:, start:stop],
            None if prompt_BJP is None else prompt_BJP[:, start:stop],
        )


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """The sequences of one optimizer step, or any subset of their rows.

    `sequences[i]` is prompt plus completion; its last `completion_len_B[i]` tokens are the
    completion, which occupies columns 0 .. completion_len-1 of every [B, T] tensor. `mask_BT` is 1
    on completion tokens that may carry gradient. `weight_BT` is each token's share of the global
    loss (see algos/aggregate.py), so a loss is a plain weighted sum and cannot depend on how the
    batch is split. Leaves of trees are rows too, and a token that several share is inside the mask
    of one of them (trainer/token_trees.py).

    >>> # a prompt of 2 and a completion of 3 tokens, truncated to T = 4 columns
    >>> # sequences=((7, 8, 1, 2, 3),), mask_BT=[[1, 1, 1, 0]], logp_rollout_BT=[[-.1, -.2, -.3, 0]]
    """

    sequences: tuple[tuple[int, ...], ...]
    completion_len_B: torch.Tensor  # int64
    group_id_B: (
        torch.Tensor
    )  # int64; one id for a prompt occurrence; ragged and non-contiguous is normal
    mask_BT: torch.Tensor  # float32, 0 or 1
    reward_B: torch.Tensor  # float32, NaN: unscorable
    logp_rollout_BT: torch.Tensor  # float32, by the engine
    advantage_BT: torch.Tensor | None = None  # float32, detached
    weight_BT: torch.Tensor | None = None  # float32
    logp_old_BT: torch.Tensor | None = (
        None  # by the trainer at rollout time; None: the current log-probs, detached
    )
    logp_ref_BT: torch.Tensor | None = None  # by the reference model; None: no KL
    # engine/trainer weights, only where they need the whole batch (algos/mismatch.py)
    rollout_is_weight_BT: torch.Tensor | None = None
    group_weight_B: torch.Tensor | None = None  # float32, that of the row's group; None: all 1
    # float32; the share of the policy's term where it is not that of the KL and the entropy
    policy_weight_BT: torch.Tensor | None = None
    source_id_B: torch.Tensor | None = None  # int64, as in Sample; None: all sampled in this run
    tree: Tree | None = None  # of all groups, whichever rows there are; None: no trees
    node_BT: torch.Tensor | None = None  # int64, the node of `tree` a token belongs to; -1: none
    step_BT: torch.Tensor | None = None  # int64, as `Sample.steps`; -1: unknown
    masks: Masks | None = None  # with which log-probs are estimated; None: the model has them
    logp_old_BJT: torch.Tensor | None = None  # as `logp_old_BT`, under each of the masks
    logp_ref_BJT: torch.Tensor | None = None  # the same by the reference model

    def __len__(self) -> int:
        return len(self.sequences)

    def replace(self, **changes: Any) -> TrainBatch:
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> TrainBatch:
        """The batch with every tensor on `device`, but those of `tree` and `masks`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tensors = {k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **tensors)

    def rows(self, index: Sequence[int]) -> TrainBatch:
        """The batch restricted to rows `index` (in that order), with columns cut to the longest of
        them."""
        at = torch.as_tensor(list(index), dtype=torch.long)
        width = int(self.completion_len_B[at].max()) if len(at) else 0
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        chosen: dict[str, Any] = {
            name: tensor[at][..., :width] if name.endswith("T") else tensor[at]
            for name, tensor in values.items()
            if isinstance(tensor, torch.Tensor)
        }
        if self.masks is not None:
            chosen["masks"] = self.masks.rows(at, width)
        return self.replace(sequences=tuple(self.sequences[i] for i in at.tolist()), **chosen)
