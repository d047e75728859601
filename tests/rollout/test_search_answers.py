"""What is the same for every engine of searches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlalign.algos.latent import Ascent, Head, LatentState
from rlalign.rollout.engine import EngineError
from rlalign.rollout.search import Ascend, Latents
from rlalign.rollout.search_answers import check_options, check_span, climb

N, D, V = 6, 4, 9
CPU = torch.device("cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


HEAD = Head(torch.randn(V, D, generator=rng(1)))


def request(how: Ascent, reward: float = 1.0, seed: int = 0) -> Ascend:
    latent_ND = torch.randn(N, D, generator=rng(2))
    tokens_N = torch.randint(V, (N,), generator=rng(3))
    return Ascend(LatentState.start(latent_ND, how), tokens_N, reward, how, seed)


@pytest.mark.parametrize("options", [(), (-1, 3), (3, V), (V + 5,)])
def test_options_that_are_no_tokens_are_refused(options):
    with pytest.raises(EngineError, match="a choice among"):
        check_options(options, V)
    check_options((0, V - 1, 0), V)


def test_only_tokens_with_a_predecessor_have_latents():
    for start, stop in ((1, 2), (1, 4), (3, 4)):
        check_span(Latents((5, 6, 7, 8), start, stop))
    for start, stop in ((0, 2), (2, 2), (3, 2), (1, 5), (-1, 2)):
        with pytest.raises(EngineError, match=f"tokens {start} to {stop} of 4"):
            check_span(Latents((5, 6, 7, 8), start, stop))


def test_a_step_climbs_and_tells_tokens_before_and_after():
    asked = request(Ascent(lr=3.0, optimizer="sgd"))
    got = climb(asked, HEAD, CPU)
    logits_NV = asked.state.latent_ND @ HEAD.weight_VD.T
    assert torch.equal(got.before_N, logits_NV.argmax(-1))
    after_NV = got.state.latent_ND @ HEAD.weight_VD.T
    assert torch.equal(got.tokens_N, after_NV.argmax(-1))
    assert not torch.equal(got.tokens_N, got.before_N)
    before, after = (
        x_NV.log_softmax(-1).gather(1, asked.tokens_N[:, None]).sum()
        for x_NV in (logits_NV, after_NV)
    )
    assert after > before
    assert (got.state.num_steps, got.is_still) == (1, False)


def test_nothing_is_still_that_moves():
    how = Ascent()
    assert climb(request(how, reward=0.0), HEAD, CPU).is_still
    moving = climb(request(how), HEAD, CPU).state
    again = climb(replace(request(how, reward=0.0), state=moving), HEAD, CPU)
    assert not again.is_still  # by what Adam remembers
    assert not climb(request(Ascent(proposal="random_signs"), reward=0.0), HEAD, CPU).is_still


def test_what_is_drawn_is_keyed_by_the_seed_and_the_position():
    how = Ascent(tokens="categorical")
    got = [climb(request(how, seed=seed), HEAD, CPU).tokens_N.tolist() for seed in range(200)]
    assert climb(request(how, seed=3), HEAD, CPU).tokens_N.tolist() == got[3]
    state = climb(request(how), HEAD, CPU).state
    probs_NV = (state.latent_ND @ HEAD.weight_VD.T).softmax(-1)
    for n in range(N):
        share_V = torch.bincount(torch.tensor([tokens[n] for tokens in got]), minlength=V) / 200
        # Four standard deviations of a share of 200.
        assert float((share_V - probs_NV[n]).abs().max()) < 4 * (0.25 / 200) ** 0.5
    # Equal latents at two positions draw apart.
    latent_ND = torch.zeros(N, D)
    flat = replace(request(how, reward=0.0), state=LatentState.start(latent_ND, how))
    assert len(set(climb(flat, HEAD, CPU).tokens_N.tolist())) > 1
