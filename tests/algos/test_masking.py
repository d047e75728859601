"""Masks under which log-probs are estimated: what their estimates mean, exactly and on average.

Legend: B rows, J passes, T tokens.
"""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign import algos
from rlalign.algos import AlgoError
from rlalign.algos.elbo import BOUND
from rlalign.config.likelihood import LikelihoodConfig
from tests.support import ROOT

LENGTH = 6
DRAWS = 400 * 16


def draw(length, estimator, passes, *, seeds=(0,), **options):
    cfg = LikelihoodConfig(
        estimator=estimator,
        num_mc_samples=passes,
        **{k: options.pop(k) for k in ("min_time", "prompt_mask_prob", "shrink") if k in options},
    )
    valid_BT = torch.ones(len(seeds), length, dtype=torch.bool)
    return algos.draw_masks(valid_BT, [3] * len(seeds), seeds, cfg, **options)


def table_model(length: int = LENGTH, seed: int = 0) -> dict[tuple[bool, ...], list[float]]:
    """log p(y_i | what is visible) of each token under each mask of a made-up model."""
    rng = torch.Generator().manual_seed(seed)
    return {
        hidden: (-3 * torch.rand(length, generator=rng, dtype=torch.float64)).tolist()
        for hidden in itertools.product((False, True), repeat=length)
    }


def exact_bound(table) -> float:
    """sum over l of 1/l times the mean over masks of l tokens of their summed log-probs."""
    length = len(next(iter(table)))
    total = 0.0
    for hidden, logp in table.items():
        count = sum(hidden)
        if count:
            inside = sum(logp[i] for i in range(length) if hidden[i])
            total += inside / count / math.comb(length, count)
    return total


def logp_of(masks, table) -> torch.Tensor:
    rows = [[table[tuple(hidden)] for hidden in row] for row in masks.hidden_BJT.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def estimates(estimator, passes, table, **options) -> torch.Tensor:
    masks = draw(LENGTH, estimator, passes, seeds=range(DRAWS), **options)
    return algos.combine(logp_of(masks, table), masks).sum(1)


def test_the_bound_is_the_mean_over_all_orders_and_below_the_likelihood():
    """720 orders and 64 masks: the same number; the log of the mean probability is above it."""
    table = table_model()
    by_order = []
    for order in itertools.permutations(range(LENGTH)):
        left, total = [True] * LENGTH, 0.0
        for token in order:
            total += table[tuple(left)][token]
            left[token] = False
        by_order.append(total)
    mean = sum(by_order) / len(by_order)
    assert exact_bound(table) == pytest.approx(mean, rel=1e-12)
    likelihood = math.log(sum(math.exp(total) for total in by_order) / len(by_order))
    assert exact_bound(table) < likelihood


@pytest.mark.parametrize("passes", [2, 16])
@pytest.mark.parametrize("estimator", BOUND)
def test_every_estimator_of_the_bound_has_it_as_its_mean(estimator, passes):
    table = table_model()
    found_B = estimates(estimator, passes, table, min_time=1e-4)
    error = float(found_B.mean()) - exact_bound(table)
    assert abs(error) < 4 * float(found_B.std()) / DRAWS**0.5


@pytest.mark.parametrize("estimator", ["count", "count_strat", "count_anti", "coupled"])
def test_every_token_has_its_mean_weight_of_one(estimator):
    masks = draw(5, estimator, 2, seeds=range(4000))
    weight_BT = masks.weight_BJT.sum(1)
    error_T = weight_BT.std(0) / len(weight_BT) ** 0.5
    assert bool(((weight_BT.mean(0) - 1).abs() < 4 * error_T).all())


@pytest.mark.parametrize("passes", [1, 2, 4, 8, 16, 32])
def test_spread_counts_are_uniform_whatever_the_length(passes):
    """Over all random starts each count comes equally often, also where passes/2 divides length."""
    from rlalign.algos import masking

    for length in range(1, 65):
        counts = torch.zeros(length, dtype=torch.int64)
        for first in range(length):
            count_J = (first + torch.arange(passes) * length // passes) % length + 1
            counts += torch.bincount(count_J - 1, minlength=length)
        assert counts.unique().tolist() == [passes]
        # and these are the counts that are drawn
        row = masking._count_strat(length, passes, torch.Generator().manual_seed(length), None)
        drawn = row.hidden_JL.sum(1)
        starts = (drawn[0] - 1 + torch.arange(passes) * length // passes) % length + 1
        assert drawn.tolist() == starts.tolist()


def test_spread_and_paired_counts_vary_less():
    """16 passes over 32 tokens whose log-probs grow with what is visible, as those of a model."""
    length, passes, rows = 32, 16, 400
    spread = {}
    for estimator in ("bernoulli", "count_strat", "count_anti"):
        masks = draw(length, estimator, passes, seeds=range(rows), min_time=1e-3)
        hidden_BJT = masks.hidden_BJT.double()
        share_BJ1 = hidden_BJT.mean(2, keepdim=True)
        logp_BJT = -2.0 * share_BJ1 - torch.linspace(0, 1, length, dtype=torch.float64)
        found_B = algos.combine(logp_BJT.expand(hidden_BJT.shape), masks).sum(1)
        spread[estimator] = float(found_B.std())
    assert spread["count_strat"] < 0.4 * spread["bernoulli"]
    assert spread["count_anti"] < 1.1 * spread["count_strat"]


def test_pairs_cover_a_completion():
    coupled = draw(7, "coupled", 4, seeds=range(50)).hidden_BJT
    assert bool((coupled[:, :2] ^ coupled[:, 2:]).all())
    anti = draw(7, "count_anti", 4, seeds=range(50)).hidden_BJT
    assert bool((anti[:, :2] | anti[:, 2:]).all())
    assert bool(((anti[:, :2] & anti[:, 2:]).sum(2) == 1).all())  # the token where they meet


def test_all_masked_and_complement_score_as_published():
    masks = draw(5, "all_masked", 1)
    assert masks.hidden_BJT.all() and masks.weight_BJT.unique().tolist() == [1.0]
    masks = draw(40, "complement", 2, seeds=range(200))
    assert bool(masks.hidden_BJT[:, 0].all())
    assert bool((masks.hidden_BJT[:, 1] ^ masks.hidden_BJT[:, 2]).all())
    assert bool((masks.weight_BJT[:, 0] == 0.5).all())
    for b in range(200):
        one = masks.weight_BJT[b, 1][masks.hidden_BJT[b, 1]].unique()
        other = masks.weight_BJT[b, 2][masks.hidden_BJT[b, 2]].unique()
        time = 0.5 / float(one)
        assert 0.2 <= time <= 0.8 and float(other) == pytest.approx(0.5 / (1 - time), rel=1e-4)
    share = masks.hidden_BJT[:, 1].double().mean(1)
    assert float(share.std()) > 0.15 and abs(float(share.mean()) - 0.5) < 0.05


def test_block_noise_masks_as_a_sampler_by_blocks_would():
    block_BT = (torch.arange(10) // 4).expand(300, 10)  # blocks of 4, 4 and 2
    options = {"seeds": range(300), "block_BT": block_BT, "prompt_mask_prob": 0.3}
    masks = draw(10, "block_noise", 3, **options)
    chosen, counts, noise = set(), [], []
    for b in range(300):
        visible = set()
        for hidden, weight in zip(masks.hidden_BJT[b], masks.weight_BJT[b], strict=True):
            assert float(weight.sum()) == pytest.approx(1 / 3)
            assert weight.bool().equal(hidden) and len(weight[hidden].unique()) == 1
            # the block is the last one that is not masked as a whole, or the first masked one
            whole = [bool(hidden[block_BT[b] == k].all()) for k in range(3)]
            block = next(
                k for k in range(3) if all(whole[k + 1 :]) and hidden[block_BT[b] == k].any()
            )
            visible.add(block)
            counts.append(int(hidden[block_BT[b] == block].sum()))
            noise += hidden[block_BT[b] < block].tolist()
        chosen.add(len(visible))
    assert 3 in chosen
    assert set(counts) == {1, 2, 3, 4}
    assert abs(sum(noise) / len(noise) - 0.3) < 0.05
    assert masks.prompt_hidden_BJP is not None
    assert abs(float(masks.prompt_hidden_BJP.float().mean()) - 0.3) < 0.05


def test_trace_shows_what_the_sampler_had_decided():
    step_BT = torch.tensor([[0, 1, 0, 2, 3, 3], [1, 0, -1, -1, 2, 0]])
    masks = draw(6, "trace", 1, seeds=(0, 1), step_BT=step_BT)
    assert masks.weight_BJT.shape == (2, 4, 6)
    expected = [[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert masks.hidden_BJT[0].int().tolist() == expected
    assert masks.weight_BJT[0].sum(0).tolist() == [1.0] * 6
    # tokens from elsewhere stay masked and are not scored
    assert masks.weight_BJT[1].sum(0).tolist() == [1, 1, 0, 0, 1, 1]
    assert bool(masks.hidden_BJT[1, :3, 2:4].all()) and not masks.weight_BJT[1, 3].any()


def test_trace_takes_several_steps_of_a_block_as_one():
    step_BT = torch.tensor([[0, 1, 2, 3, 4, 5]])
    block_BT = torch.tensor([[0, 0, 0, 1, 1, 1]])
    masks = draw(6, "trace", 1, step_BT=step_BT, block_BT=block_BT, shrink=2)
    assert masks.weight_BJT[0].tolist() == [
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],  # the block ends before its second pair is full
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([*BOUND, "all_masked", "complement", "block_noise"]),
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4),
    st.sampled_from([2, 4, 64]),
    st.integers(0, 2**63 - 1),
)
def test_only_valid_tokens_are_masked_and_scored(estimator, valid, passes, seed):
    """Any holes, none valid, more passes than masks: and a row depends on its seed alone."""
    valid_BT = torch.tensor(valid)
    seeds = [(seed + i) % 2**63 for i in range(len(valid))]
    cfg = LikelihoodConfig(estimator=estimator, num_mc_samples=passes, prompt_mask_prob=0.5)
    masks = algos.draw_masks(valid_BT, [2] * len(valid), seeds, cfg)
    assert not (masks.hidden_BJT & ~valid_BT[:, None]).any()
    assert not (masks.weight_BJT.bool() & ~masks.hidden_BJT).any()
    assert bool(masks.weight_BJT.isfinite().all())
    assert bool((algos.num_passes(masks) > 0).le(valid_BT.any(1)).all())
    alone = algos.draw_masks(valid_BT[-1:], [2], seeds[-1:], cfg)
    count = alone.weight_BJT.shape[1]
    assert alone.hidden_BJT[0].equal(masks.hidden_BJT[-1, :count])
    assert alone.prompt_hidden_BJP[0].equal(masks.prompt_hidden_BJP[-1, :count])


def test_prompts_are_masked_where_asked_only():
    assert draw(5, "count_strat", 4).prompt_hidden_BJP is None
    valid_BT = torch.ones(2, 3, dtype=torch.bool)
    cfg = LikelihoodConfig(estimator="all_masked", num_mc_samples=1, prompt_mask_prob=1.0)
    masks = algos.draw_masks(valid_BT, [4, 2], [0, 1], cfg)
    assert masks.prompt_hidden_BJP.int().tolist() == [[[1, 1, 1, 1]], [[1, 1, 0, 0]]]


def test_tokens_that_are_always_masked_are_not_scored():
    hidden_BT = torch.tensor([[False, False, True]])
    cfg = LikelihoodConfig(estimator="count_strat", num_mc_samples=4)
    masks = algos.draw_masks(~hidden_BT, [1], [5], cfg, always_hidden_BT=hidden_BT)
    assert bool(masks.hidden_BJT[..., 2].all()) and not masks.weight_BJT[..., 2].any()


DIGEST = """
import hashlib, torch
from rlalign import algos
from rlalign.config.likelihood import LikelihoodConfig
digest = hashlib.sha256()
for estimator in ("bernoulli", "count_strat", "count_anti", "coupled", "complement", "block_noise"):
    cfg = LikelihoodConfig(estimator=estimator, num_mc_samples=8, prompt_mask_prob=0.2)
    masks = algos.draw_masks(torch.ones(3, 33, dtype=torch.bool), [4, 9, 1], [7, 8, 2**62], cfg)
    for tensor in (masks.hidden_BJT, masks.weight_BJT, masks.prompt_hidden_BJP):
        digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""


def test_two_processes_draw_the_same_masks():
    outputs = [
        subprocess.run(
            [sys.executable, "-c", DIGEST], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1] and len(outputs[0]) == 64


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (LikelihoodConfig(estimator="coupled", num_mc_samples=3), "use an even number"),
        (LikelihoodConfig(estimator="trace", num_mc_samples=1), "needs the step that decided"),
        (LikelihoodConfig(), "rlalign.algos.resolve first"),
    ],
)
def test_what_cannot_be_drawn_is_refused(cfg, says):
    with pytest.raises(AlgoError, match=says):
        algos.draw_masks(torch.ones(1, 4, dtype=torch.bool), [1], [0], cfg)
