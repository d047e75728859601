"""CoPG on four problems so small that the right answer is known.

    python examples/copg_bandit.py                       a table, in ten seconds
    python examples/copg_bandit.py --plot copg.png       and a picture (needs matplotlib)

The question: completions were written by somebody else (people, older models), and each has a
score R. Which policy maximises E[R] - beta KL(policy, reference)? The answer has a formula,

    pi*(y) ~ reference(y) exp(R(y) / beta),

so how far a method ends from it, its regret, can be measured to the last digit.

1. A bandit with three arms, whose data prefer the worst arm: CoPG arrives at pi*. IPO, which sees
   only which of two arms won, and policy gradients whose baseline is not the regularised reward,
   stop elsewhere, however long they train.
2. Sequences: fifteen completions of at most three tokens. Exact expectations and small random
   groups both arrive; the noise of sampling dies out, because at pi* every pair costs nothing.
3. An arm that the data never show: CoPG gets the ratios of all others right and says nothing of it.
4. Pairs that never meet: ratios are right within {1, 2} and {3, 4}; across, nothing is learned.

Legend: K arms or completions, T tokens.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlalign.algos.copg import copg_loss, sequence_logratio

Loss = Callable[[Tensor], Tensor]  # from the log-probs of all arms to a scalar


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Bandit:
    """One prompt with K completions. `first_K` and `second_K` are the chances with which the data
    show an arm as the first and the second of a pair."""

    score_K: Tensor
    ref_logp_K: Tensor
    first_K: Tensor
    second_K: Tensor
    beta: float

    @property
    def best_logp_K(self) -> Tensor:
        """log pi*."""
        return (self.ref_logp_K + self.score_K / self.beta).log_softmax(0)

    @property
    def pair_chance_KK(self) -> Tensor:
        """How often the data hold a pair, in either order."""
        chance_KK = torch.outer(self.first_K, self.second_K)
        return chance_KK + chance_KK.T

    def regularised(self, logp_K: Tensor) -> Tensor:
        """R - beta log(policy / reference) of each arm."""
        return self.score_K - self.beta * (logp_K - self.ref_logp_K)

    def regret(self, logp_K: Tensor) -> float:
        """What is missing to the largest E[R] - beta KL: at least 0, and 0 only at pi*."""
        value, best = (
            float((logp.exp() * self.regularised(logp)).sum())
            for logp in (logp_K.detach(), self.best_logp_K)
        )
        return best - value


THREE_ARMS = Bandit(
    score_K=f64(2.5, 2.0, 1.0),
    ref_logp_K=f64(1, 1, 1).log_softmax(0),
    first_K=f64(0.1, 0.2, 0.7),
    second_K=f64(0.05, 0.05, 0.9),
    beta=0.5,
)


@dataclass
class Fit:
    """Where training ended: the log-probs, the logits, and the regret after every step."""

    logp_K: Tensor
    logits: Tensor
    regrets: list[float] = field(default_factory=list)


def fit(
    bandit: Bandit,
    loss: Loss,
    logits: Tensor,
    *,
    steps: int,
    rate: float,
    policy: Callable[[Tensor], Tensor] = lambda logits: logits.log_softmax(-1),
) -> Fit:
    """Minimise with Adam at a rate that falls linearly to 0, starting from `logits`."""
    logits = logits.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    regrets = []
    for _ in range(steps):
        logp_K = policy(logits)
        regrets.append(bandit.regret(logp_K))
        optimizer.zero_grad()
        loss(logp_K).backward()
        optimizer.step()
        schedule.step()
    logp_K = policy(logits.detach())
    return Fit(logp_K, logits.detach(), [*regrets, bandit.regret(logp_K)])


# --- 1. three arms -------------------------------------------------------------------------------


def copg(bandit: Bandit) -> Loss:
    """All arms are one group, each pair weighted with how often the data hold it."""

    def loss(logp_K: Tensor) -> Tensor:
        return copg_loss(
            logp_K,
            bandit.ref_logp_K,
            bandit.score_K,
            num_generations=len(logp_K),
            beta=bandit.beta,
            scale="pair",
            pair_weight_NN=bandit.pair_chance_KK,
        ).loss

    return loss


def ipo(bandit: Bandit) -> Loss:
    """IPO is CoPG with scores +1/4 for the winner and -1/4 for the loser of a pair. The better arm
    wins only with chance sigmoid(R - R'), so how much better it is reaches the loss blurred."""
    num_arms = len(bandit.score_K)
    win_KK = torch.sigmoid(bandit.score_K[:, None] - bandit.score_K) * bandit.pair_chance_KK
    games = list(itertools.permutations(range(num_arms), 2))  # (winner, loser)
    chance = torch.stack([win_KK[game] for game in games])
    rows = torch.tensor(games).flatten()

    def loss(logp_K: Tensor) -> Tensor:
        return copg_loss(
            logp_K[rows],
            bandit.ref_logp_K[rows],
            f64(0.25, -0.25).repeat(len(games)),
            num_generations=2,
            beta=bandit.beta,
            scale="pair",
            group_weight_N=chance.repeat_interleave(2),
        ).loss

    return loss


def policy_gradient(bandit: Bandit, baseline: Callable[[Tensor, Tensor], Tensor | float]) -> Loss:
    """-(R - beta rho - baseline) log pi over the data, as if the policy had sampled them."""

    def loss(logp_K: Tensor) -> Tensor:
        fixed_K = logp_K.detach()
        advantage_K = bandit.regularised(fixed_K) - baseline(fixed_K.exp(), fixed_K)
        return -((bandit.first_K + bandit.second_K) * advantage_K * logp_K).sum()

    return loss


METHODS: dict[str, Callable[[Bandit], Loss]] = {
    "CoPG": copg,
    "IPO": ipo,
    "policy gradient, b = 0": lambda t: policy_gradient(t, lambda p, _: 0.0),
    "policy gradient, b = E[R]": lambda t: policy_gradient(t, lambda p, _: (p * t.score_K).sum()),
    "policy gradient, b = E[R - beta rho]": lambda t: policy_gradient(
        t, lambda p, logp: (p * t.regularised(logp)).sum()
    ),
}
# Regret where a method's expected gradient is 0; the tests solve for these points in other ways.
LIMITS = dict(zip(METHODS, (0.0, 0.1525, 0.6378, 0.0148, 0.0), strict=True))


def three_arms(steps: int = 800) -> dict[str, Fit]:
    """Every method from the uniform policy, in full expectation over the data."""
    start = torch.zeros(3, dtype=torch.float64)
    return {
        name: fit(THREE_ARMS, method(THREE_ARMS), start, steps=steps, rate=0.05)
        for name, method in METHODS.items()
    }


# --- 2. sequences --------------------------------------------------------------------------------

END, MAX_TOKENS = "E", 3
COMPLETIONS = [
    "".join(tokens)
    for length in range(1, MAX_TOKENS + 1)
    for tokens in itertools.product("abE", repeat=length)
    if END not in tokens[:-1] and (tokens[-1] == END or length == MAX_TOKENS)
]
PREFIXES = sorted({y[:t] for y in COMPLETIONS for t in range(len(y))})
# Where a token's log-prob stands in the table of 7 prefixes x 3 tokens; 0 where there is no token.
CELL_KT = torch.tensor(
    [
        [
            3 * PREFIXES.index(y[:t]) + "abE".index(y[t]) if t < len(y) else 0
            for t in range(MAX_TOKENS)
        ]
        for y in COMPLETIONS
    ]
)
MASK_KT = torch.tensor([[t < len(y) for t in range(MAX_TOKENS)] for y in COMPLETIONS])


def sequence_logp(logits: Tensor) -> Tensor:
    """Log-prob of each completion from one row of logits per prefix: [15]."""
    logp_KT = logits.log_softmax(-1).flatten()[CELL_KT]
    return sequence_logratio(logp_KT, torch.zeros_like(logp_KT), MASK_KT)


def random_tree(seed: int = 0) -> Bandit:
    """A random reference policy, normal scores, and data from a third distribution."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reference = sequence_logp(normal(len(PREFIXES), 3))
    data_K = (0.7 * normal(len(COMPLETIONS))).softmax(0)
    return Bandit(normal(len(COMPLETIONS)), reference, data_K, data_K, beta=0.4)


def sampled_groups(tree: Bandit, *, num_groups: int = 64, size: int = 4, seed: int = 0) -> Loss:
    """CoPG as it is used: each step sees some groups that the data happen to hold."""
    generator = torch.Generator().manual_seed(seed)

    def loss(logp_K: Tensor) -> Tensor:
        rows = torch.multinomial(
            tree.first_K, num_groups * size, replacement=True, generator=generator
        )
        return copg_loss(
            logp_K[rows],
            tree.ref_logp_K[rows],
            tree.score_K[rows],
            num_generations=size,
            beta=tree.beta,
        ).loss

    return loss


def sequences(steps: int = 1200) -> dict[str, Fit]:
    """Exact expectations and random groups, from the uniform policy."""
    tree = random_tree()
    start = torch.zeros(len(PREFIXES), 3, dtype=torch.float64)
    losses = {"exact": copg(tree), "sampled groups of 4": sampled_groups(tree)}
    return {
        name: fit(tree, loss, start, steps=steps, rate=0.1, policy=sequence_logp)
        for name, loss in losses.items()
    }


# --- 3. and 4. what the data do not show ---------------------------------------------------------


def support_hole(steps: int = 400) -> tuple[Bandit, Fit]:
    """The data never show the second of the three arms."""
    bandit = Bandit(
        THREE_ARMS.score_K,
        THREE_ARMS.ref_logp_K,
        f64(0.1, 0.0, 0.9),
        f64(0.05, 0.0, 0.95),
        THREE_ARMS.beta,
    )
    start = torch.zeros(3, dtype=torch.float64)
    return bandit, fit(bandit, copg(bandit), start, steps=steps, rate=0.05)


FOUR_LOGITS = f64(0.3, -0.2, 0.5, 0.1)


def two_islands(steps: int = 400) -> tuple[Bandit, Fit]:
    """Four arms; the data compare 1 with 2 and 3 with 4, as groups of two."""
    uniform_K = f64(1, 1, 1, 1).log_softmax(0)
    bandit = Bandit(f64(2.5, 2.0, 1.0, 0.5), uniform_K, uniform_K.exp(), uniform_K.exp(), 0.5)

    def loss(logp_K: Tensor) -> Tensor:
        return copg_loss(
            logp_K, bandit.ref_logp_K, bandit.score_K, num_generations=2, beta=bandit.beta
        ).loss

    return bandit, fit(bandit, loss, FOUR_LOGITS, steps=steps, rate=0.05)


# --- report --------------------------------------------------------------------------------------


def log_ratio(logp_K: Tensor, one: int, other: int) -> float:
    """log pi(one) / pi(other), arms counted from 1."""
    return float(logp_K[one - 1] - logp_K[other - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", metavar="PNG", help="where to save a picture of it")
    plot = parser.parse_args().plot
    torch.set_num_threads(1)  # tensors this small are faster on one

    arms = three_arms()
    print(f"{'1. three arms: regret in the limit':<40}    found    known   policy")
    print(f"   {'at the start':<37} {arms['CoPG'].regrets[0]:8.4f}   0.2919")
    for name, found in arms.items():
        policy = " ".join(f"{p:.4f}" for p in found.logp_K.exp().tolist())
        print(f"   {name:<37} {found.regrets[-1]:8.4f} {LIMITS[name]:8.4f}   {policy}")

    tree, trees = random_tree(), sequences()
    print(f"{'2. sequences: largest |pi - pi*|':<40}    found    known   regret")
    for name, found in trees.items():
        gap = float((found.logp_K.exp() - tree.best_logp_K.exp()).abs().max())
        print(f"   {name:<37} {gap:8.0e}        0   {abs(found.regrets[-1]):.0e}")

    hole, islands = support_hole(), two_islands()
    compare("3. an arm without data: log-ratios", *hole, (1, 3), (2, 3))
    compare("4. pairs {1, 2}, {3, 4}: log-ratios", *islands, (1, 2), (3, 4), (1, 3))
    if plot:
        draw(plot, arms, trees, hole, islands)
        print(f"saved {plot}")


def compare(title: str, bandit: Bandit, found: Fit, *pairs: tuple[int, int]) -> None:
    """Print log pi(y) / pi(y') beside that of pi*; the last pair is one that the data lack."""
    print(f"{title:<40}    found    known")
    for pair in pairs:
        name = f"log pi({pair[0]}) / pi({pair[1]})" + ", not in the data" * (pair == pairs[-1])
        ours, best = (log_ratio(logp, *pair) for logp in (found.logp_K, bandit.best_logp_K))
        print(f"   {name:<37} {ours:8.4f} {best:8.4f}")


def draw(
    path: str, arms: dict[str, Fit], trees: dict[str, Fit], *partial: tuple[Bandit, Fit]
) -> None:
    """One panel for each of the four problems."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    titles = ("three arms", "fifteen sequences", "an arm without data", "pairs that never meet")
    for panel, title in zip(panels.flat, titles, strict=True):
        panel.set_title(title)
    for panel, fits in zip(panels[0], (arms, trees), strict=True):
        for name, found in fits.items():
            panel.semilogy([max(regret, 1e-16) for regret in found.regrets], label=name)
        panel.set(xlabel="step", ylabel="regret, reward units")
        panel.legend(fontsize="small")
    for panel, (bandit, found) in zip(panels[1], partial, strict=True):
        arm = range(1, len(bandit.score_K) + 1)
        panel.bar([a - 0.2 for a in arm], bandit.best_logp_K.exp().tolist(), 0.4, label="pi*")
        panel.bar([a + 0.2 for a in arm], found.logp_K.exp().tolist(), 0.4, label="CoPG")
        panel.set(xlabel="arm", ylabel="probability", xticks=list(arm), yscale="log")
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
