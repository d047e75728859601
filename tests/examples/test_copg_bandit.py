"""Where CoPG and its rivals end, on problems whose answer is known in closed form."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from rlalign.algos.copg import copg_loss

PATH = Path(__file__).resolve().parents[2] / "examples" / "copg_bandit.py"
spec = importlib.util.spec_from_file_location("copg_bandit", PATH)
assert spec is not None and spec.loader is not None
bandit = importlib.util.module_from_spec(spec)
sys.modules["copg_bandit"] = bandit  # dataclasses look their module up
spec.loader.exec_module(bandit)

SCORE, FIRST, SECOND, BETA = (2.5, 2.0, 1.0), (0.1, 0.2, 0.7), (0.05, 0.05, 0.9), 0.5
ARMS = range(3)


def value(policy):
    """E[R] - beta KL(policy, uniform)."""
    return sum(p * (r - BETA * math.log(3 * p)) for p, r in zip(policy, SCORE, strict=True))


def softmax(logits):
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


BEST = softmax([r / BETA for r in SCORE])


@pytest.fixture(scope="module")
def three_arms():
    return bandit.three_arms()


@pytest.fixture(scope="module")
def sequences():
    return bandit.sequences()


def ipo_optimum():
    """The least squares of (log pi_w - log pi_l) against 1 / (2 beta), weighted with the chance
    that w beats l: normal equations, the last logit fixed at 0."""
    normal, right = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for i, j in itertools.permutations(ARMS, 2):
        win = 1 / (1 + math.exp(SCORE[j] - SCORE[i]))
        weight = win * (FIRST[i] * SECOND[j] + FIRST[j] * SECOND[i])
        for row, sign in ((i, 1), (j, -1)):
            normal[row, i] += sign * weight
            normal[row, j] -= sign * weight
            right[row] += sign * weight / (2 * BETA)
    logits = torch.linalg.solve(normal[:2, :2], right[:2])
    return softmax([*logits.tolist(), 0.0])


def policy_gradient_optimum(baseline):
    """Plain ascent along sum_y mu(y) (R - beta rho - b) grad log pi(y) until it stands still."""
    logits = [0.0] * 3
    for _ in range(20_000):
        p = softmax(logits)
        gain = [SCORE[i] - BETA * math.log(3 * p[i]) for i in ARMS]
        b = baseline(p, gain)
        pull = [(FIRST[i] + SECOND[i]) * (gain[i] - b) for i in ARMS]
        logits = [x + 0.2 * (pull[i] - p[i] * sum(pull)) for i, x in enumerate(logits)]
    return softmax(logits)


OPTIMA = {
    "CoPG": lambda: BEST,
    "IPO": ipo_optimum,
    "policy gradient, b = 0": lambda: policy_gradient_optimum(lambda p, gain: 0.0),
    "policy gradient, b = E[R]": lambda: policy_gradient_optimum(
        lambda p, gain: sum(p[i] * SCORE[i] for i in ARMS)
    ),
    "policy gradient, b = E[R - beta rho]": lambda: policy_gradient_optimum(
        lambda p, gain: sum(p[i] * gain[i] for i in ARMS)
    ),
}


@pytest.mark.parametrize("name", bandit.METHODS)
def test_every_method_ends_where_its_expected_gradient_vanishes(three_arms, name):
    found, expected = three_arms[name], OPTIMA[name]()
    assert found.logp_K.exp().tolist() == pytest.approx(expected, abs=1e-4)
    assert found.regrets[-1] == pytest.approx(value(BEST) - value(expected), abs=1e-4)
    assert found.regrets[-1] == pytest.approx(bandit.LIMITS[name], abs=1e-4)


def test_every_method_starts_at_the_reference(three_arms):
    """J(pi*) = beta log mean exp(R / beta), and J(uniform) is the mean score: 0.2919 apart."""
    best = BETA * math.log(sum(math.exp(r / BETA) for r in SCORE) / 3)
    for found in three_arms.values():
        assert found.regrets[0] == pytest.approx(best - sum(SCORE) / 3, abs=1e-12)
    assert best - sum(SCORE) / 3 == pytest.approx(0.2919, abs=5e-5)


def test_copg_is_there_to_the_last_digit(three_arms):
    assert abs(three_arms["CoPG"].regrets[-1]) < 1e-14


@pytest.mark.parametrize("name", ["exact", "sampled groups of 4"])
def test_sequences_reach_the_closed_form_also_from_samples(sequences, name):
    tree = bandit.random_tree()
    assert len(bandit.COMPLETIONS) == 15 and len(bandit.PREFIXES) == 7
    found = sequences[name]
    weight = [
        math.exp(logp + score / tree.beta)
        for logp, score in zip(tree.ref_logp_K.tolist(), tree.score_K.tolist(), strict=True)
    ]
    expected = [w / sum(weight) for w in weight]
    assert found.logp_K.exp().tolist() == pytest.approx(expected, abs=1e-9)
    assert abs(found.regrets[-1]) < 1e-9


def test_an_arm_without_data_does_not_disturb_the_others():
    _, found = bandit.support_hole()
    assert bandit.log_ratio(found.logp_K, 1, 3) == pytest.approx(1.5 / BETA, abs=1e-6)


def test_islands_are_right_within_and_stay_where_they_were_across():
    _, found = bandit.two_islands()
    assert bandit.log_ratio(found.logp_K, 1, 2) == pytest.approx(1.0, abs=1e-9)
    assert bandit.log_ratio(found.logp_K, 3, 4) == pytest.approx(1.0, abs=1e-9)
    start = bandit.FOUR_LOGITS
    before = start[:2].sum() - start[2:].sum()
    after = found.logp_K[:2].sum() - found.logp_K[2:].sum()
    assert after.item() == pytest.approx(before.item(), abs=1e-12)


def minimise(loss, logits):
    """Full-batch L-BFGS; returns the logits."""
    leaf = logits.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [leaf],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        result = loss(leaf)
        result.backward()
        return result

    optimizer.step(closure)
    return leaf.detach()


@pytest.mark.parametrize("seed", range(3))
def test_positive_pair_weights_leave_the_optimum(seed):
    weight_KK = 0.05 + torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)).double()
    arms = bandit.THREE_ARMS

    def loss(logits):
        return copg_loss(
            logits.log_softmax(0),
            arms.ref_logp_K,
            arms.score_K,
            num_generations=3,
            beta=arms.beta,
            scale="pair",
            pair_weight_NN=weight_KK + weight_KK.T,
        ).loss

    logits = minimise(loss, torch.zeros(3, dtype=torch.float64))
    assert softmax(logits.tolist()) == pytest.approx(BEST, abs=1e-6)


def test_a_mean_over_tokens_has_an_optimum_of_its_own():
    """pi = pi_ref exp(|y| (R / beta + c)), c such that it adds up to 1 (found by bisection)."""
    tree = bandit.random_tree(seed=1)
    length = [len(y) for y in bandit.COMPLETIONS]

    def loss(logits):
        return copg_loss(
            bandit.sequence_logp(logits),
            tree.ref_logp_K,
            tree.score_K,
            num_generations=len(length),
            beta=tree.beta,
            length_normalization="mean",
            length_N=torch.tensor(length),
        ).loss

    logits = minimise(loss, torch.zeros(7, 3, dtype=torch.float64))
    rows = list(zip(tree.ref_logp_K.tolist(), tree.score_K.tolist(), length, strict=True))

    def policy(c):
        return [math.exp(logp + n * (score / tree.beta + c)) for logp, score, n in rows]

    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(policy(middle)) < 1 else (low, middle)
    found = bandit.sequence_logp(logits).exp().tolist()
    assert found == pytest.approx(policy(low), abs=1e-5)
    assert max(abs(x - y) for x, y in zip(found, tree.best_logp_K.exp(), strict=True)) > 0.05


def test_noisy_scores_are_averaged():
    """Noise of half a point on every score: the policy fits their mean."""
    arms, generator = bandit.THREE_ARMS, torch.Generator().manual_seed(0)

    def loss(logp_K):
        rows = torch.multinomial(arms.first_K, 256, replacement=True, generator=generator)
        noise = 0.5 * torch.randn(256, generator=generator, dtype=torch.float64)
        return copg_loss(
            logp_K[rows],
            arms.ref_logp_K[rows],
            arms.score_K[rows] + noise,
            num_generations=4,
            beta=arms.beta,
        ).loss

    start = torch.zeros(3, dtype=torch.float64)
    found = bandit.fit(arms, loss, start, steps=600, rate=0.05).logp_K.exp().tolist()
    assert sum(abs(x - y) for x, y in zip(found, BEST, strict=True)) / 2 < 2e-2
