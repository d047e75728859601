"""`rlalign verify` holds for the shipped code, and fails for code that is subtly wrong."""

import io
import math

import pytest
import torch
from rich.console import Console

from rlalign import algos, verify
from rlalign.algos import (
    advantage,
    aggregate,
    bgpo,
    copg,
    elbo,
    kl,
    loss,
    masking,
    mismatch,
    segments,
    spg,
    surrogate,
    tree,
    tree_advantage,
    vrpo,
)
from rlalign.verify import table

CUSTOM = """
from rlalign.algos import Algorithm, advantage

def half(reward_B, acc_B, group_id_B, mask_BT, cfg, *, kl_BT=None):
    full_BT = advantage.compute_advantages(reward_B, acc_B, group_id_B, mask_BT, cfg, kl_BT=kl_BT)
    return full_BT / 2

def by_position(reward_B, acc_B, group_id_B, mask_BT, cfg, *, kl_BT=None):
    return mask_BT * reward_B.nan_to_num()[:, None].cumsum(0)

GOOD = Algorithm("half", "GRPO at half speed.", "here", {"epsilon_high": 0.3}, credit=half)
BAD = Algorithm("positional", "No groups.", "here", credit=by_position)
"""


@pytest.fixture(scope="module")
def checks():
    return verify.run()


def holds(name: str, algorithm: str) -> bool:
    """Whether the one property called `name` holds now."""
    (found,) = [p for p in verify.PROPERTIES if p.name == name]
    return found.measure(*([algorithm] if found.applies else [])) <= found.bound


def test_every_property_of_every_algorithm_holds(checks):
    assert [check for check in checks if not check.ok] == []
    assert {check.algorithm for check in checks} == {table.SHARED, *algos.names()}


def test_every_bound_is_tight_enough_to_notice_a_wrong_digit(checks):
    golden = {"E[k2] is not the KL: 0.712 against 0.594 on the toy": 5e-4}
    golden["without the tie guard the same twelve give |A| of 0.15 and 0.95"] = 0.01
    for check in checks:
        assert check.bound <= golden.get(check.name, 1e-5), check


def test_one_algorithm_is_checked_alone():
    labels = {check.algorithm for check in verify.run("reinforce++")}
    assert labels == {table.SHARED, "reinforce_plus_plus"}


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(algos.AlgoError, match="did you mean 'gspo'"):
        verify.run("gpso")


def _wrong_clip(ratio, advantage_BT, logp_BT, cfg):
    clipped = ratio.clamp(1 - cfg.epsilon, 1 + cfg.epsilon_high)
    return -clipped * advantage_BT, {}


def _rescaled(function, factor):
    return lambda *args, **kwargs: function(*args, **kwargs) * factor


def _mutate(monkeypatch, name: str) -> None:
    """One plausible mistake each."""
    if name == "clip without min":
        monkeypatch.setitem(surrogate.SURROGATES, "ppo_clip", _wrong_clip)
    elif name == "population std":
        stats = segments.group_stats

        def biased(value_B, group_id_B, valid_B, tie_tol):
            s = stats(value_B, group_id_B, valid_B, tie_tol)
            n_B = s.count_B.clamp(min=1)
            std_B = s.std_B * ((n_B - 1) / n_B).sqrt()
            return segments.GroupStats(s.count_B, s.mean_B, std_B, s.tied_B)

        for module in (advantage, tree_advantage):
            monkeypatch.setattr(module, "group_stats", biased)
    elif name == "no tie guard":
        stats = segments.group_stats

        def guardless(value_B, group_id_B, valid_B, tie_tol):
            s = stats(value_B, group_id_B, valid_B, tie_tol)
            std_B = s.std_B.clamp(min=1e-3)  # nor does a floor of the deviation help
            return segments.GroupStats(s.count_B, s.mean_B, std_B, s.count_B < 1)

        for module in (advantage, tree_advantage):
            monkeypatch.setattr(module, "group_stats", guardless)
    elif name == "k3 upside down":
        monkeypatch.setattr(loss, "estimate_kl", lambda a, b, e: kl.estimate_kl(-a, -b, e))
    elif name == "denominator off by one percent":
        monkeypatch.setattr(aggregate, "segment_sum", _rescaled(aggregate.segment_sum, 1.01))
    elif name == "correction is not the ratio":
        monkeypatch.setattr(
            mismatch, "_bounded", lambda w, cfg: torch.ones_like(w) * (w > 0) * 1.001
        )
    elif name == "beta of the objective in the gradient":
        whole = copg._regularised_reward
        monkeypatch.setattr(copg, "_regularised_reward", lambda rows, beta: whole(rows, beta / 2))
    elif name == "scores alone in the advantage":
        monkeypatch.setattr(
            copg, "_regularised_reward", lambda rows, beta: rows.centred(rows.score_N)
        )
    elif name == "a branch counts by its leaves":
        monkeypatch.setattr(tree, "sampling_weights", _share_of_leaves)
    elif name == "dead leaves count":
        monkeypatch.setattr(tree, "living", lambda t: torch.ones(len(t), dtype=torch.bool))
    elif name == "every tree has a prompt of its own":
        monkeypatch.setattr(tree, "merge_roots", lambda t: t)
    else:
        raise ValueError(name)


def _share_of_leaves(t):
    leaves_N = tree.sum_over_leaves(t, tree.living(t).double())
    of_group = [leaves_N[(t.parent_N < 0) & (t.group_N == g)].sum() for g in t.group_N]
    return leaves_N / torch.stack(of_group).clamp(min=1)


@pytest.mark.parametrize(
    ("mistake", "noticed_by"),
    [
        ("clip without min", "gradient = the closed form"),
        ("clip without min", "ppo_clip: gradient -A rho, or 0 exactly where the clip says so"),
        ("population std", "grpo: sum A = 0 and sum A^2 = n - 1 in every group"),
        ("population std", "advantages = the formula in float64 loops"),
        ("no tie guard", "equal rewards give exactly 0"),
        ("k3 upside down", "loss = the formula in float64 loops"),
        ("denominator off by one percent", "every mode and prompt weighting = float64 loops"),
        (
            "beta of the objective in the gradient",
            "copg: loss and gradient = the sum over pairs in loops",
        ),
        ("scores alone in the advantage", "copg: at pi* no pair pulls, whatever the data are"),
        ("correction is not the ratio", "ESS = (sum w)^2 / sum w^2 / n"),
    ],
)
def test_a_mistake_in_the_shipped_code_is_noticed(monkeypatch, mistake, noticed_by):
    assert holds(noticed_by, "grpo")
    _mutate(monkeypatch, mistake)
    assert not holds(noticed_by, "grpo")


RECURSION = "values and advantages of ragged trees = recursion in float64"


@pytest.mark.parametrize(
    ("mistake", "algorithm", "noticed_by"),
    [
        ("population std", "branch_grpo", RECURSION),
        ("every tree has a prompt of its own", "tree_rl", RECURSION),
        ("no tie guard", "spo", "equal leaves give exactly 0"),
        (
            "a branch counts by its leaves",
            "branch_grpo",
            "an edge's share of the loss = its definition in loops",
        ),
        (
            "dead leaves count",
            "branch_grpo",
            "an unscorable leaf: as if it had not been sampled",
        ),
    ],
)
def test_a_mistake_in_the_credit_of_trees_is_noticed(monkeypatch, mistake, algorithm, noticed_by):
    assert holds(noticed_by, algorithm)
    _mutate(monkeypatch, mistake)
    assert not holds(noticed_by, algorithm)


def _mutate_estimates(monkeypatch, name: str) -> None:
    """One plausible mistake each."""
    if name == "the other bound for bad completions":
        monkeypatch.setattr(bgpo, "pass_ratio", lambda d, a, cfg: 1 + d)
    elif name == "rounded counts":

        def rounded(length, n, g, cfg):
            first = int(torch.randint(0, length, (1,), generator=g))
            spacing = torch.linspace(0, (n - 1) * length / n, n, dtype=torch.float64)
            count_J = (first + spacing).round().long() % length + 1  # half to even
            return masking._of_counts(count_J, length, g)

        monkeypatch.setitem(masking.ESTIMATORS, "count_strat", rounded)
    elif name == "later tokens seen":
        whole = masking._trace

        def late(step_L, block_L, shrink):
            row = whole(step_L, block_L, shrink)
            return row._replace(hidden_JL=row.weight_JL > 0)

        monkeypatch.setattr(masking, "_trace", late)
    elif name == "the reference forgotten":
        gap = lambda logp_BJT, batch: elbo.combine(logp_BJT, batch.masks).sum(1)  # noqa: E731
        monkeypatch.setattr(vrpo, "reference_gap", gap)
        monkeypatch.setattr(elbo, "reference_gap", gap)
    elif name == "no share of masked tokens":
        whole_bound = spg.upper_bound

        def bare(logp_BJT, masks, length_B, power):
            return whole_bound(logp_BJT, masks, torch.ones_like(length_B), power)

        monkeypatch.setattr(spg, "upper_bound", bare)
    elif name == "another length":
        monkeypatch.setattr(
            elbo, "ratio_divisor", lambda batch, cfg, limit: torch.full((len(batch),), 7.0)
        )
    else:
        raise ValueError(name)


IN_LOOPS = "loss of all passes = the formula in float64 loops"


@pytest.mark.parametrize(
    ("mistake", "algorithm", "noticed_by"),
    [
        (
            "the other bound for bad completions",
            "bgpo",
            "bgpo: the bound is one on 10,000 random cases, clipped too, and as in loops",
        ),
        ("rounded counts", "bgpo", "count_strat: every number of masked tokens equally often"),
        ("later tokens seen", "tracerl", "trace: the sum is the log-prob of the sampler's choices"),
        ("the reference forgotten", "vrpo", IN_LOOPS),
        ("the reference forgotten", "espo", IN_LOOPS),
        ("no share of masked tokens", "spg", IN_LOOPS),
        ("another length", "bgpo", IN_LOOPS),
        ("another length", "espo", "slopes = differences of the formula in loops"),
    ],
)
def test_a_mistake_in_estimated_losses_is_noticed(monkeypatch, mistake, algorithm, noticed_by):
    assert holds(noticed_by, algorithm)
    _mutate_estimates(monkeypatch, mistake)
    assert not holds(noticed_by, algorithm)


def test_a_property_that_cannot_be_measured_does_not_hold():
    check = table._check(
        table.Property("p", "s", 1.0, lambda: math.nan, None), table.SHARED, math.nan
    )
    assert not check.ok


def test_an_algorithm_from_outside_is_held_to_the_general_properties(tmp_path, monkeypatch):
    (tmp_path / "outside_algorithms.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    good = [c for c in verify.run("outside_algorithms:GOOD") if c.algorithm == "half"]
    assert good and all(check.ok for check in good)
    # Its credit is its own, so the formula of the shared estimators is not its reference.
    assert "advantages = the formula in float64 loops" not in {check.name for check in good}
    permuting = "permuting rows, relabelling groups: nothing changes"
    assert holds(permuting, "outside_algorithms:GOOD")
    assert not holds(permuting, "outside_algorithms:BAD")


def test_the_table_names_the_failure_and_counts():
    lines = [
        table.Check("E[k1] = 0", table.SHARED, 0.0, 1e-9, True, "algebra"),
        table.Check("A = 0", "grpo", 0.5, 1e-9, False, "algebra"),
    ]
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(verify.render(lines))
    text = console.export_text()
    assert "E[k1] = 0" in text and "1 of 2 properties hold" in text
    assert [("FAILS" in line) for line in text.splitlines() if "A = 0" in line] == [True]
