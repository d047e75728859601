"""Drafts that stand or fall leave the fused distribution as it is."""

from __future__ import annotations

import pytest
import torch

from rlalign.config.testtime import FusionConfig
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.sampling import keep_likeliest, sample
from rlalign.testtime.fusion_draw import fuse_and_draw, verify

ROWS, VOCAB = 40_000, 7
GRID = [0.0, 0.5, 1.0, 1.5, 2.0]


def share(tokens, vocab=VOCAB):
    return torch.bincount(tokens, minlength=vocab) / len(tokens)


def assert_drawn_from(tokens, probability, sigmas=5.0):
    """Each token's share within what chance allows."""
    spread = (probability * (1 - probability) / len(tokens)).sqrt()
    found = share(tokens, len(probability))
    assert ((found - probability).abs() <= sigmas * spread + 1e-9).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_what_is_written_is_distributed_as_the_fusion_says(temperature, top_p):
    """At a place with a draft and at one without."""
    rng = torch.Generator().manual_seed(3)
    fused_V, expert_V = 1.5 * torch.randn(2, VOCAB, generator=rng)
    cfg = FusionConfig(temperature=temperature, top_p=top_p)
    seeds_3N = torch.randint(0, 2**62, (3, ROWS), generator=rng)
    step_N = torch.zeros(ROWS, dtype=torch.long)
    expert_NV, fused_NV = expert_V.expand(ROWS, -1), fused_V.expand(ROWS, -1)
    draft_N, _ = sample(expert_NV, seeds_3N[1], step_N, SamplingParams(1, temperature, top_p))
    want = keep_likeliest(fused_V[None] / temperature, 0, top_p).softmax(-1)[0]
    assert (share(draft_N) - want).abs().max() > 0.05  # drafts alone are something else
    for has_draft in (True, False):
        is_draft_N = torch.full((ROWS,), has_draft)
        stands_N, token_N = verify(fused_NV, expert_NV, draft_N, is_draft_N, seeds_3N, step_N, cfg)
        written_N = torch.where(stands_N, draft_N, token_N)
        assert_drawn_from(written_N, want)
        assert stands_N.any() == has_draft


def test_a_draft_from_the_same_distribution_always_stands():
    rng = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(500, VOCAB, generator=rng)
    seeds_3N = torch.randint(0, 2**62, (3, 500), generator=rng)
    step_N = torch.arange(500)
    draft_N, _ = sample(logits_NV, seeds_3N[1], step_N, SamplingParams(1, 0.8))
    is_draft_N = torch.ones(500, dtype=torch.bool)
    cfg = FusionConfig(temperature=0.8)
    stands_N, _ = verify(logits_NV, logits_NV, draft_N, is_draft_N, seeds_3N, step_N, cfg)
    assert stands_N.all()


def test_two_places_in_a_row_are_distributed_as_one_after_the_other():
    """The first two tokens of a small Markov chain, one of them drafted, against their product."""
    rng = torch.Generator().manual_seed(8)
    large, small, expert = 1.2 * torch.randn(3, 4, 4, generator=rng)  # after token v: row v
    rows, cfg = 20_000, FusionConfig(temperature=1.0)
    seeds_B3 = torch.randint(0, 2**62, (rows, 3), generator=rng)
    step_B = torch.zeros(rows, dtype=torch.long)
    first_B4 = expert[0].expand(rows, -1)
    draft_B, _ = sample(first_B4, seeds_B3[:, 1], step_B, SamplingParams(1))
    logits = torch.stack(
        [torch.stack([x[0].expand(rows, -1), x[draft_B]], 1) for x in (large, small, expert)]
    )
    places = fuse_and_draw(logits, draft_B[:, None].tolist(), seeds_B3, step_B, cfg, GRID)
    stands = torch.tensor(places.stands_BD)[:, 0]
    token_BK = torch.tensor(places.token_BK)
    first = torch.where(stands, draft_B, token_BK[:, 0])

    def fused(v):
        one = torch.stack([x[v] for x in (large, small, expert)])[:, None, None]
        alpha = fuse_and_draw(one, [[]], seeds_B3[:1], step_B[:1], cfg, GRID).alpha_BK[0][0]
        return (large[v] + alpha * (expert[v] - small[v])).softmax(-1)

    assert_drawn_from(first, fused(0))
    for v in range(4):
        assert_drawn_from(token_BK[stands & (draft_B == v), 1], fused(v))


def test_greedily_a_draft_stands_where_it_is_the_likeliest():
    logits = torch.zeros(3, 1, 3, VOCAB)
    logits[:, 0, :, 4] = 3.0
    seeds, step = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    places = fuse_and_draw(logits, [[4, 2]], seeds, step, FusionConfig(), GRID)
    assert places.stands_BD == [[True, False]] and places.token_BK == [[4, 4, 4]]
    assert places.odd_BK == [[-1, -1, -1]]


@pytest.mark.parametrize("model", [0, 1, 2])
def test_the_model_whose_logits_break_is_named(model):
    logits = torch.randn(3, 2, 1, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[model, 1, 0, 3] = torch.nan
    seeds, step = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    for cfg in (FusionConfig(), FusionConfig(temperature=1.0, top_p=0.9)):
        places = fuse_and_draw(logits, [[], []], seeds, step, cfg, GRID)
        assert places.odd_BK == [[-1], [model]]
