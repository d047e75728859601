"""A step on latents, as an engine takes it under its own head."""

from __future__ import annotations

import pytest
import torch

from rlalign.algos.latent import Ascent, Head, LatentState, likeliest
from rlalign.rollout import search_answers
from rlalign.rollout.search import Ascend
from rlalign.rollout.search_hf import climb

CPU = torch.device("cpu")
HEAD = Head(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], device="cpu"))


def step(latent_ND: torch.Tensor, seed: int = 0, reward: float = -1.0, **how: object):
    ascent = Ascent(**how)  # type: ignore[arg-type]
    tokens_N = torch.zeros(len(latent_ND), dtype=torch.long, device="cpu")
    return climb(
        Ascend(LatentState.start(latent_ND, ascent), tokens_N, reward, ascent, seed), HEAD, CPU
    )


def same_rows(count: int) -> torch.Tensor:
    return torch.tensor([[0.4, 0.6]], device="cpu").repeat(count, 1)


def test_drawn_tokens_are_distributed_as_the_moved_latents_say(monkeypatch):
    num = 20_000
    moved = step(same_rows(num), seed=5, lr=0.1, optimizer="sgd", tokens="categorical")
    share_V = torch.bincount(moved.tokens_N, minlength=3) / num
    wanted_V = (moved.state.latent_ND[0] @ HEAD.weight_VD.T).softmax(-1)
    torch.testing.assert_close(share_V, wanted_V, rtol=0, atol=0.012)
    assert (moved.before_N == likeliest(same_rows(1), HEAD)).all()
    monkeypatch.setattr(search_answers, "rows_at_once", lambda head: 77)
    chunked = step(same_rows(num), seed=5, lr=0.1, optimizer="sgd", tokens="categorical")
    assert torch.equal(chunked.tokens_N, moved.tokens_N)
    other = step(same_rows(num), seed=6, lr=0.1, optimizer="sgd", tokens="categorical")
    assert not torch.equal(other.tokens_N, moved.tokens_N)


def test_random_signs_use_neither_reward_nor_tokens():
    moves = [
        step(same_rows(50), seed=3, reward=r, proposal="random_signs").state.latent_ND
        for r in (-1.0, 0.0, 7.0)
    ]
    assert torch.equal(moves[0], moves[1]) and torch.equal(moves[0], moves[2])
    assert len(set(map(tuple, moves[0].tolist()))) == 4  # every pair of signs


@pytest.mark.parametrize(("reward", "still"), [(0.0, True), (-1.0, False), (0.5, False)])
def test_nothing_moves_without_a_gradient(reward, still):
    assert step(same_rows(2), reward=reward).is_still is still


def test_momentum_is_not_still():
    ascent = Ascent(lr=0.1)
    tokens_N = torch.tensor([0, 1], device="cpu")
    state = LatentState.start(same_rows(2), ascent)
    first = climb(Ascend(state, tokens_N, -1.0, ascent), HEAD, CPU)
    second = climb(Ascend(first.state, tokens_N, 0.0, ascent), HEAD, CPU)
    assert not second.is_still
    assert not torch.equal(first.state.latent_ND, second.state.latent_ND)
