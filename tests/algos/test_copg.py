"""CoPG's identities in float64, against the paper's formulas written out pair by pair."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign import algos
from rlalign.algos.copg import copg_advantages, copg_loss
from rlalign.config import AlgoConfig

BETA = 0.3
EXACT = {"rtol": 0, "atol": 1e-12}
VALUES = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))


def f64(values):
    return torch.as_tensor(values, dtype=torch.float64)


def value_and_gradient(rho, score, ref=None, **options):
    """Loss and its derivative in each log-prob, by the shipped code."""
    leaf_N = f64(rho).clone().requires_grad_(True)
    loss = copg_loss(leaf_N, ref, f64(score), **options).loss
    (gradient_N,) = torch.autograd.grad(loss, leaf_N)
    return loss.item(), gradient_N


def by_pairs(rho, score, group, beta, scale="rloo", source=None, weight=lambda i, j: 1.0):
    """Loss and gradient as sums over the pairs of each group, divided by the number of groups."""
    loss, gradient = 0.0, [0.0] * len(rho)
    for label in set(group):
        rows = [i for i, g in enumerate(group) if g == label]
        pairs = [
            (i, j)
            for i, j in itertools.combinations(rows, 2)
            if source is None or source[i] != source[j]
        ]
        if not pairs:
            continue
        factor = {
            "pair": 1.0,
            "rloo": 1 / (2 * len(pairs)),
            "command_a": 2 * beta / (len(rows) - 1),
        }[scale]
        for i, j in pairs:
            gap = (score[i] - beta * rho[i]) - (score[j] - beta * rho[j])
            loss += factor * weight(i, j) * gap**2 / (2 * beta)
            gradient[i] -= factor * weight(i, j) * gap
            gradient[j] += factor * weight(i, j) * gap
    number = len(set(group))
    return loss / number, [x / number for x in gradient]


@pytest.fixture
def policy():
    """Seven arms: logits with a graph, a reference, scores."""
    generator = torch.Generator().manual_seed(0)
    logits, ref, score = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(True), ref.log_softmax(0), score


def test_the_pair_loss_is_the_papers_objective_upside_down(policy):
    """Its l (eq. 5, to be maximised) is a constant minus L, and their gradients are opposite."""
    logits, ref, score = policy
    for i, j in itertools.combinations(range(7), 2):
        rho = logits.log_softmax(0) - ref
        half = score - BETA / 2 * rho
        paper = (half[i] - half[j]) * rho[i] + (half[j] - half[i]) * rho[j]
        rows = [i, j]
        ours = copg_loss(
            logits.log_softmax(0)[rows],
            ref[rows],
            score[rows],
            num_generations=2,
            beta=BETA,
            scale="pair",
        ).loss
        constant = (score[i] - score[j]) ** 2 / (2 * BETA)
        assert ours.item() == pytest.approx((constant - paper).item(), abs=1e-12)
        (up,) = torch.autograd.grad(paper, logits, retain_graph=True)
        (down,) = torch.autograd.grad(ours, logits)
        torch.testing.assert_close(down, -up, **EXACT)
        full = (score - BETA * rho).detach()
        (score_i,) = torch.autograd.grad(rho[i], logits, retain_graph=True)
        (score_j,) = torch.autograd.grad(rho[j], logits)
        torch.testing.assert_close(up, (full[i] - full[j]) * (score_i - score_j), **EXACT)


def test_on_policy_pairs_give_twice_the_policy_gradient(policy):
    """Every ordered pair of arms is a group, weighted with its probability under the policy."""
    logits, ref, score = policy
    logp = logits.log_softmax(0)
    objective = (logp.exp() * (score - BETA * (logp - ref))).sum()
    (exact,) = torch.autograd.grad(objective, logits, retain_graph=True)
    rows = torch.tensor(list(itertools.product(range(7), repeat=2))).flatten()
    chance = logp.exp().detach()[rows].view(-1, 2).prod(1).repeat_interleave(2)
    output = copg_loss(
        logp[rows],
        ref[rows],
        score[rows],
        num_generations=2,
        beta=BETA,
        scale="pair",
        group_weight_N=chance,
    )
    (ours,) = torch.autograd.grad(output.loss, logits)
    torch.testing.assert_close(-ours, 2 * exact, **EXACT)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(VALUES, VALUES, st.integers(-2, 2)), min_size=1, max_size=12),
    st.sampled_from(["rloo", "pair", "command_a"]),
    st.sampled_from(["square", "surrogate"]),
)
def test_any_groups_are_the_sum_over_their_pairs(rows, scale, loss_type):
    score, rho, group = (list(column) for column in zip(*rows, strict=True))
    loss, gradient = by_pairs(rho, score, group, BETA, scale)
    number = float(len(set(group)))
    ours, ours_N = value_and_gradient(
        rho,
        score,
        group_id_N=torch.tensor(group),
        beta=BETA,
        scale=scale,
        loss_type=loss_type,
        num_groups=number,
    )
    torch.testing.assert_close(ours_N, f64(gradient), **EXACT)
    if loss_type == "square":
        assert ours == pytest.approx(loss, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(VALUES, VALUES, st.integers(0, 2), st.integers(5, 7)), min_size=1, max_size=12
    ),
    st.sampled_from(["rloo", "pair"]),
    st.sampled_from(["square", "surrogate"]),
)
def test_with_sources_only_pairs_across_them_count(rows, scale, loss_type):
    score, rho, group, source = (list(column) for column in zip(*rows, strict=True))
    loss, gradient = by_pairs(rho, score, group, BETA, scale, source)
    ours, ours_N = value_and_gradient(
        rho,
        score,
        group_id_N=torch.tensor(group),
        source_id_N=torch.tensor(source),
        beta=BETA,
        scale=scale,
        loss_type=loss_type,
        num_groups=float(len(set(group))),
    )
    torch.testing.assert_close(ours_N, f64(gradient), **EXACT)
    if loss_type == "square":
        assert ours == pytest.approx(loss, abs=1e-12)


def test_two_sources_measure_their_variances_and_the_gap_between_their_means():
    rho, score = [0.3, -1.0, 2.0, 0.5, 0.1], [1.0, 0.2, -0.4, 0.7, 0.0]
    a = f64(score) - BETA * f64(rho)
    one, two = a[:2], a[2:]
    expected = one.var(correction=0) + two.var(correction=0) + (one.mean() - two.mean()) ** 2
    ours, _ = value_and_gradient(
        rho,
        score,
        num_generations=5,
        source_id_N=torch.tensor([0, 0, 1, 1, 1]),
        beta=BETA,
        scale="pair",
    )
    assert ours == pytest.approx(2 * 3 * expected.item() / (2 * BETA), abs=1e-12)


def test_the_example_by_hand():
    """k=3: a = (.8, .1, .45), s^2 = .1225, L = s^2 / (2 beta); the best score has beta rho = .2
    of its advantage spent."""
    score, rho = [1.0, 0.0, 0.5], [2.0, -1.0, 0.5]
    loss, gradient_N = value_and_gradient(rho, score, num_generations=3, beta=0.1)
    assert loss == pytest.approx(0.6125, abs=1e-12)
    torch.testing.assert_close(gradient_N, f64([-0.175, 0.175, 0.0]), **EXACT)
    raw, _ = value_and_gradient(rho, score, num_generations=3, beta=0.1, scale="command_a")
    assert raw == pytest.approx(0.3675, abs=1e-12)
    output = copg_loss(f64(rho), None, f64(score), num_generations=3, beta=0.1)
    torch.testing.assert_close(output.advantage_N, f64([0.525, -0.525, 0.0]), **EXACT)
    figures = algos.finalize_metrics(output.metrics)
    assert figures["copg/fit_r2"] == pytest.approx(0.51, abs=1e-12)
    assert figures["copg/reg_reward_std"] == pytest.approx(0.35, abs=1e-12)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_gradient_is_that_of_rloo_with_the_kl_in_the_reward(size):
    """The project's own leave-one-out estimator on the same rows, and -1/k sum A log pi."""
    rho, score = torch.randn(2, 2 * size, dtype=torch.float64)
    group_id_N = torch.arange(2 * size) % 2
    cfg = algos.resolve(AlgoConfig(loss_type="rloo", beta=BETA))
    rloo_N = algos.compute_advantages(
        score, score, group_id_N, torch.ones(2 * size, 1), cfg, kl_BT=rho[:, None]
    )[:, 0]
    ours_N = copg_advantages(rho, None, score, group_id_N=group_id_N, beta=BETA)
    torch.testing.assert_close(ours_N, rloo_N, **EXACT)
    _, gradient_N = value_and_gradient(rho, score, group_id_N=group_id_N, beta=BETA)
    torch.testing.assert_close(gradient_N, -rloo_N / size / 2, **EXACT)


def test_without_kl_it_is_reinforce_with_the_mean_of_the_others():
    score = f64([1.0, 0.0, 0.5, 0.25])
    _, gradient_N = value_and_gradient(
        [-3.0, -1.0, -2.0, -9.0], score, num_generations=4, beta=0.0, loss_type="surrogate"
    )
    expected = [-(r - (1.75 - r) / 3) / 4 for r in score.tolist()]
    torch.testing.assert_close(gradient_N, f64(expected), **EXACT)


@pytest.mark.parametrize("normalization", ["paper", "trainer"])
def test_scores_of_a_quarter_make_it_ipo(normalization):
    """Azar et al. 2023 with tau = beta, and as trainers write it; (chosen, rejected) rows. One
    step of gradient descent on a linear policy equals IPO's up to the documented constant."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    ref = torch.randn(6, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    rho = features @ weight - ref
    gap = rho[0::2] - rho[1::2]
    if normalization == "paper":
        ipo, constant = ((0.5 - BETA * gap) ** 2).mean(), 1 / (2 * BETA)
    else:
        ipo, constant = ((gap - 1 / (2 * BETA)) ** 2).mean(), BETA / 2
    (theirs,) = torch.autograd.grad(ipo, weight)
    score = f64([0.25, -0.25] * 3)
    output = copg_loss(features @ weight, ref, score, num_generations=2, beta=BETA, scale="pair")
    (ours,) = torch.autograd.grad(output.loss, weight)
    assert output.loss.item() == pytest.approx(constant * ipo.item(), abs=1e-12)
    torch.testing.assert_close(ours, constant * theirs, **EXACT)


def test_only_score_over_beta_and_only_differences_matter():
    rho, score = torch.randn(2, 6, dtype=torch.float64)
    loss, gradient_N = value_and_gradient(rho, score, num_generations=3, beta=BETA)
    shift = f64([7.0] * 3 + [-20.0] * 3)
    moved, moved_N = value_and_gradient(rho, score + shift, num_generations=3, beta=BETA)
    assert moved == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(moved_N, gradient_N, **EXACT)
    grown, grown_N = value_and_gradient(rho, 5 * score, num_generations=3, beta=5 * BETA)
    assert grown == pytest.approx(5 * loss, abs=1e-12)
    torch.testing.assert_close(grown_N, 5 * gradient_N, **EXACT)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_order_is_immaterial_and_copies_shrink_the_variance_as_they_must(size):
    rho, score = torch.randn(2, size, dtype=torch.float64)
    loss, gradient_N = value_and_gradient(rho, score, num_generations=size, beta=BETA)
    order = torch.randperm(size)
    moved, moved_N = value_and_gradient(rho[order], score[order], num_generations=size, beta=BETA)
    assert moved == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(moved_N, gradient_N[order], **EXACT)
    twice, _ = value_and_gradient(
        rho.repeat(2), score.repeat(2), num_generations=2 * size, beta=BETA
    )
    assert twice == pytest.approx(loss * 2 * (size - 1) / (2 * size - 1), abs=1e-12)


def test_a_group_of_weight_two_counts_as_if_it_stood_there_twice():
    rho, score = torch.randn(2, 5, dtype=torch.float64)
    group_id_N, weight_N = torch.tensor([4, 4, 1, 1, 1]), f64([2.0, 2.0, 1.0, 1.0, 1.0])
    weighted, _ = value_and_gradient(
        rho, score, group_id_N=group_id_N, beta=BETA, group_weight_N=weight_N
    )
    rows = [0, 1, 0, 1, 2, 3, 4]
    twice, _ = value_and_gradient(
        rho[rows], score[rows], group_id_N=torch.tensor([0, 0, 9, 9, 1, 1, 1]), beta=BETA
    )
    assert weighted == pytest.approx(twice, abs=1e-12)


@pytest.mark.parametrize("source", [None, [0, 0, 1, 1, 0, 0, 1]])
def test_pair_weights_multiply_their_pairs(source):
    """The fourth row, of group 1, is left out."""
    rho, score = torch.randn(2, 7, dtype=torch.float64)
    weight_NN = torch.rand(7, 7, dtype=torch.float64)
    weight_NN = weight_NN + weight_NN.T
    group = [3, 1, 3, 1, 1, 3, 8]
    loss, gradient = by_pairs(
        rho.tolist(),
        score.tolist(),
        group,
        BETA,
        "pair",
        source,
        weight=lambda i, j: 0.0 if 3 in (i, j) else weight_NN[i, j].item(),
    )
    ours, ours_N = value_and_gradient(
        rho,
        score,
        group_id_N=torch.tensor(group),
        source_id_N=None if source is None else torch.tensor(source),
        valid_N=torch.arange(7) != 3,
        beta=BETA,
        scale="pair",
        pair_weight_NN=weight_NN,
    )
    assert ours == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(ours_N, f64(gradient), **EXACT)


def test_equal_scores_leave_the_variance_of_rho():
    rho = [0.5, -1.0, 2.0]
    loss, gradient_N = value_and_gradient(rho, [0.7] * 3, num_generations=3, beta=BETA)
    variance = f64(rho).var().item()
    assert loss == pytest.approx(BETA / 2 * variance, abs=1e-12)
    expected = [BETA / 3 * (x - (1.5 - x) / 2) for x in rho]
    torch.testing.assert_close(gradient_N, f64(expected), **EXACT)


def test_tied_groups_can_be_skipped_and_still_count():
    rho, score = [0.5, -1.0, 2.0, 0.0], [0.7, 0.7, 1.0, 0.0]
    other, _ = value_and_gradient(rho[2:], score[2:], num_generations=2, beta=BETA)
    loss, gradient_N = value_and_gradient(
        rho, score, num_generations=2, beta=BETA, skip_tied_groups=True
    )
    assert loss == pytest.approx(other / 2, abs=1e-12)
    assert gradient_N[:2].tolist() == [0.0, 0.0] and (gradient_N[2:] != 0).all()
    output = copg_loss(
        f64(rho), None, f64(score), num_generations=2, beta=BETA, skip_tied_groups=True
    )
    mean_loss = algos.finalize_metrics(output.metrics)["copg/loss"]
    assert mean_loss == pytest.approx(other / 2, abs=1e-12)
