"""A diffusion language model small enough for float64, batches for it, and its gradient by autograd
over all passes at once: what the trainer's own, taken one pass at a time, must equal.

Legend: B rows, J passes, T completion tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rlalign
from rlalign.algos import AlgoWarning
from rlalign.config import Config
from rlalign.models.masked_diffusion import MaskedDiffusionLM
from rlalign.models.random import init_model, small_config
from rlalign.trainer.batch import make_train_batch, with_weights
from rlalign.trainer.distributed import World
from rlalign.trainer.elbo import ElboLikelihood, temperature
from rlalign.trainer.engine import StepResult
from rlalign.trainer.masked_policy import MaskedPolicy
from rlalign.trainer.update import minibatches, rows_with_gradient
from rlalign.types import Group, Prompt, Sample, Scores, TrainBatch
from tests.support import ROOT

VOCAB, EOS, MASK = 12, 10, 11
WORLD = World()


def tiny_lm(seed: int = 0, dtype: torch.dtype = torch.float64) -> MaskedDiffusionLM:
    """Far from uniform, so that a mistake shows."""
    config = small_config(
        "llama",
        vocab=VOCAB,
        hidden=32,
        layers=2,
        heads=4,
        kv_heads=4,
        mlp=64,
        max_positions=64,
        tied=True,
        init_std=0.25,
        eos_token_id=EOS,
        is_causal=False,
    )
    return MaskedDiffusionLM(init_model(config, seed).to(dtype), MASK)


class CountingEngine:
    """Forward and backward of a policy in this process; remembers how many passes there were."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy, self.world = policy, WORLD
        self.passes = {"now": 0, "without gradient": 0, "reference": 0}

    def forward(self, passes: Any, temperature: float, reference: bool = False) -> Tensor:
        kind = "now" if torch.is_grad_enabled() else "without gradient"
        self.passes["reference" if reference else kind] += len(passes.canvas)
        return self.policy(passes, temperature, reference)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> StepResult:
        return StepResult(0.0, False)

    def gradient(self) -> dict[str, Tensor]:
        return {n: p.grad.clone() for n, p in self.policy.named_parameters() if p.grad is not None}


def settings(*overrides: str, loss_type: str = "bgpo") -> Config:
    """configs/bgpo/mini.yaml with overrides, in which `length` is the longest completion."""
    base = ["algo.likelihood.num_mc_samples=null", "algo.num_generations=4"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlgoWarning)
        return rlalign.load_config(
            ROOT / "configs/bgpo/mini.yaml", [f"algo.loss_type={loss_type}", *base, *overrides]
        )


def make_groups(
    lengths: Sequence[Sequence[int]] = ((6, 4, 6, 1), (5, 6, 2)), *, seed: int = 0
) -> list[Group]:
    """Prompts of 4, 3, ... tokens with completions of these lengths; random steps of a sampler."""
    rng = torch.Generator().manual_seed(seed)
    groups = []
    for g, sizes in enumerate(lengths):
        prompt = tuple(torch.randint(0, EOS, (4 - g % 3,), generator=rng).tolist())
        samples = []
        for i, size in enumerate(sizes):
            ids = tuple(torch.randint(0, EOS, (size,), generator=rng).tolist())
            steps = tuple((torch.randperm(size, generator=rng) // 2).tolist())
            samples.append(Sample(f"p{g}", i, ids, (-1.0,) * size, "stop", (), steps=steps))
        groups.append(Group(Prompt(f"p{g}", prompt, ""), tuple(samples)))
    return groups


class Case:
    """A batch that is ready to train on, for a policy that has moved since (`moved`)."""

    def __init__(
        self,
        config: Config,
        groups: Sequence[Group] | None = None,
        reward: Sequence[float] | None = None,
        *,
        moved: float = 0.0,
        lm: MaskedDiffusionLM | None = None,
    ) -> None:
        self.config = config
        self.groups = make_groups() if groups is None else list(groups)
        size = sum(len(group.samples) for group in self.groups)
        rewards = [1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 0.0][:size] if reward is None else reward
        reward_B = torch.tensor(rewards)
        scores = Scores(reward_B, reward_B.nan_to_num())
        self.policy = MaskedPolicy(lm or tiny_lm(), tiny_lm(seed=1))
        self.engine = CountingEngine(self.policy)
        self.likelihood = ElboLikelihood(self.policy, frozenset({EOS}))
        batch = make_train_batch(self.groups, scores, config.algo)
        self.batch = self.likelihood.prepare(
            self.engine, batch, self.groups, scores.acc_B, config, WORLD, 0
        )
        if moved:
            move(self.policy.lm, moved)

    def minibatch(self, iteration: int = 0) -> TrainBatch:
        """The rows with a gradient of the only step of `iteration`."""
        [rows] = [r for i, r in minibatches(self.batch, self.config, 0) if i == iteration]
        batch = self.likelihood.of_iteration(self.batch, iteration, self.config).rows(rows)
        batch = with_weights(batch, self.config)
        return batch.rows(rows_with_gradient(batch, self.config))

    def gradient(self, iteration: int = 0) -> dict[str, Tensor]:
        """As the trainer takes it; its figures are in `self.metrics`."""
        self.policy.zero_grad(set_to_none=True)
        self.metrics: list = []
        self.likelihood.accumulate(
            self.engine, self.minibatch(iteration), self.config, WORLD, self.metrics
        )
        return self.engine.gradient()

    def naive_gradient(
        self, loss: Callable[[Tensor, TrainBatch], Tensor], iteration: int = 0
    ) -> dict[str, Tensor]:
        """Of `loss(logp_BJT, batch)`, one autograd call through every pass."""
        batch = self.minibatch(iteration)
        self.policy.zero_grad(set_to_none=True)
        loss(naive_logp(self.policy.lm, batch, temperature(self.config)), batch).backward()
        return self.engine.gradient()


def move(lm: MaskedDiffusionLM, distance: float, seed: int = 3) -> None:
    """Every weight by normal noise of that standard deviation."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
            parameter += distance * noise


def naive_logp(lm: MaskedDiffusionLM, batch: TrainBatch, temperature: float = 1.0) -> Tensor:
    """Log-prob of every scored token with its graph, a forward pass per mask, token by token:
    [B, J, T], 0 elsewhere."""
    assert batch.masks is not None
    masks = batch.masks
    rows = []
    for b, sequence in enumerate(batch.sequences):
        start = len(sequence) - int(batch.completion_len_B[b])
        passes = []
        for j in range(masks.weight_BJT.shape[1]):
            seen = list(sequence)
            for t in range(len(sequence) - start):
                if masks.hidden_BJT[b, j, t]:
                    seen[start + t] = MASK
            if masks.prompt_hidden_BJP is not None:
                for t in range(start):
                    if masks.prompt_hidden_BJP[b, j, t]:
                        seen[t] = MASK
            values = [torch.zeros((), dtype=torch.float64)] * masks.weight_BJT.shape[2]
            if bool((masks.weight_BJT[b, j] != 0).any()):
                logits_TV = lm.model(torch.tensor([seen])).logits[0].double()
                logits_TV[:, MASK] = -torch.inf
                logp_TV = (logits_TV / temperature).log_softmax(-1)
                for t in range(len(sequence) - start):
                    if masks.weight_BJT[b, j, t] != 0:
                        values[t] = logp_TV[start + t, sequence[start + t]]
            passes.append(torch.stack(values))
        rows.append(torch.stack(passes))
    return torch.stack(rows)


def relative_error(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm."""
    assert one.keys() == other.keys()
    gap = sum(float((one[n] - other[n]).double().square().sum()) for n in one) ** 0.5
    return gap / sum(float(other[n].double().square().sum()) for n in other) ** 0.5


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    a, b = (torch.cat([g[n].flatten().double() for n in sorted(g)]) for g in (one, other))
    return float(a @ b / a.norm() / b.norm())
