"""The closed-form gradient on latents against autograd, differences and whole enumerations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.algos import latent
from rlalign.algos.latent import (
    Ascent,
    Head,
    LatentState,
    ascend,
    gradient,
    likeliest,
    wander,
)

KINDS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 2.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 3.0},
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def make_head(V: int, D: int, *, bias: bool = False, scale: float = 1.0, softcap: float = 0.0):
    return Head(normal(V, D, seed=1), normal(V, seed=2) if bias else None, scale, softcap)


def log_pi(z_ND: torch.Tensor, head: Head) -> torch.Tensor:
    """log pi(v | z_t), written out with no help of the module."""
    logits_NV = torch.einsum("nd,vd->nv", z_ND, head.weight_VD)
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V
    logits_NV = head.scale * logits_NV
    if head.softcap:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    return logits_NV - logits_NV.exp().sum(1, keepdim=True).log()


def objective(z_ND: torch.Tensor, tokens_N: torch.Tensor, head: Head) -> torch.Tensor:
    return log_pi(z_ND, head)[torch.arange(len(tokens_N)), tokens_N].sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reward", [-1.0, 0.7])
def test_the_gradient_is_that_of_autograd_and_of_central_differences(kind, reward):
    head, z_ND = make_head(7, 4, **KINDS[kind]), normal(5, 4)
    tokens_N = torch.tensor([0, 3, 6, 3, 1])
    found_ND = gradient(z_ND, tokens_N, reward, head)
    leaf_ND = z_ND.clone().requires_grad_()
    (reward * objective(leaf_ND, tokens_N, head)).backward()
    torch.testing.assert_close(found_ND, leaf_ND.grad, rtol=1e-10, atol=1e-12)
    step = 1e-5
    for n, d in itertools.product(range(5), range(4)):
        shift_ND = torch.zeros_like(z_ND)
        shift_ND[n, d] = step
        up, down = (objective(z_ND + s * shift_ND, tokens_N, head) for s in (1, -1))
        assert found_ND[n, d] == pytest.approx(float(reward * (up - down) / (2 * step)), abs=1e-8)


def test_its_mean_over_all_prefixes_is_the_gradient_of_the_expected_reward():
    head, z_ND = make_head(3, 4), normal(2, 4)
    rewards = normal(9, seed=5)
    leaf_ND = z_ND.clone().requires_grad_()
    p_NV = log_pi(leaf_ND, head).exp()
    prefixes = list(itertools.product(range(3), repeat=2))
    expected = sum(r * p_NV[0, a] * p_NV[1, b] for r, (a, b) in zip(rewards, prefixes, strict=True))
    expected.backward()
    mean_ND = torch.zeros_like(z_ND)
    for r, prefix in zip(rewards.tolist(), prefixes, strict=True):
        share = math.prod(float(p_NV[n, v].detach()) for n, v in enumerate(prefix))
        mean_ND += share * gradient(z_ND, torch.tensor(prefix), r, head)
    torch.testing.assert_close(mean_ND, leaf_ND.grad, rtol=0, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000), st.sampled_from(sorted(KINDS)), st.sampled_from([-1.0, -0.25, 0.5, 2.0])
)
def test_a_small_plain_step_moves_the_tokens_by_the_sign_of_their_reward(seed, kind, reward):
    head, z_ND = make_head(6, 3, **KINDS[kind]), normal(4, 3, seed=seed)
    how = Ascent(lr=1e-4, optimizer="sgd", dtype="float64")
    tokens_N = likeliest(z_ND, head)
    before = objective(z_ND, tokens_N, head)
    state = ascend(LatentState.start(z_ND, how), gradient(z_ND, tokens_N, reward, head), how)
    after = objective(state.latent_ND, tokens_N, head)
    assert (after > before) if reward > 0 else (after < before)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_reward_of_zero_leaves_every_bit_of_the_latents(optimizer):
    head, z_ND = make_head(6, 3), normal(4, 3).float()
    z_ND[0, 0] = math.inf
    how = Ascent(optimizer=optimizer)
    grad_ND = gradient(z_ND, torch.tensor([1, 2, 3, 4]), 0.0, head)
    moved = ascend(LatentState.start(z_ND, how), grad_ND, how)
    assert torch.equal(moved.latent_ND, z_ND) and moved.num_steps == 1


def test_the_first_step_of_adam_knows_only_the_sign_of_the_reward():
    head, z_ND, tokens_N = make_head(11, 8), normal(5, 8).float(), torch.tensor([3, 1, 4, 1, 5])
    how = Ascent(lr=0.03)
    start = LatentState.start(z_ND, how)

    def step(reward: float) -> torch.Tensor:
        return ascend(start, gradient(z_ND, tokens_N, reward, head), how).latent_ND - z_ND

    torch.testing.assert_close(step(-1.0), step(-1 / 6), rtol=1e-5, atol=3e-7)
    torch.testing.assert_close(step(0.5), -step(-1.0), rtol=1e-5, atol=3e-7)
    torch.testing.assert_close(step(-1.0).abs(), torch.full((5, 8), 0.03), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_steps_are_those_of_torchs_adam(dtype, clip):
    head, z_ND, tokens_N = make_head(9, 6), 3 * normal(4, 6), torch.tensor([3, 1, 4, 1])
    how = Ascent(lr=0.1, grad_clip=clip, dtype=dtype)
    state = LatentState.start(z_ND, how)
    leaf_ND = z_ND.to(getattr(torch, dtype)).clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf_ND], lr=0.1)
    for reward in (-1.0, -0.5, -0.5, 0.25):
        leaf_ND.grad = -gradient(leaf_ND.detach(), tokens_N, reward, head)
        if clip:
            torch.nn.utils.clip_grad_norm_([leaf_ND], clip)
        optimizer.step()
        grad_ND = gradient(state.latent_ND, tokens_N, reward, head)
        state = ascend(state, grad_ND, how)
        slack = 1e-6 if dtype == "float32" else 0.07
        torch.testing.assert_close(state.latent_ND, leaf_ND.detach(), rtol=slack, atol=slack)
    assert state.num_steps == 4 and state.latent_ND.dtype == getattr(torch, dtype)


def test_bfloat16_loses_a_small_step_on_a_large_coordinate():
    how = Ascent(lr=0.03, optimizer="sgd", dtype="bfloat16")
    state = LatentState.start(torch.tensor([[8.0, 1.0]]), how)
    moved = ascend(state, torch.ones(1, 2, dtype=torch.bfloat16), how).latent_ND
    assert float(moved[0, 0]) == 8.0 and float(moved[0, 1]) > 1.0


def test_a_position_knows_nothing_of_the_others():
    head, z_ND, tokens_N = make_head(5, 4), normal(3, 4), torch.tensor([1, 2, 0])
    other_ND = z_ND.clone()
    other_ND[1] += 5 * normal(4, seed=8)
    same = [0, 2]
    grads = [gradient(x, tokens_N, -1.0, head)[same] for x in (z_ND, other_ND)]
    assert torch.equal(*grads)
    assert torch.equal(likeliest(z_ND, head)[same], likeliest(other_ND, head)[same])
    assert not torch.equal(likeliest(z_ND, head), likeliest(other_ND, head))


def test_chunks_change_nothing(monkeypatch):
    head, z_ND = make_head(6, 3, **KINDS["all"]), normal(7, 3)
    tokens_N = torch.tensor([1, 2, 3, 4, 5, 0, 1])
    whole = gradient(z_ND, tokens_N, -1.0, head), likeliest(z_ND, head)
    monkeypatch.setattr(latent, "CHUNK_BYTES", 2 * 4 * 6)
    assert latent.rows_at_once(head) == 2
    torch.testing.assert_close(gradient(z_ND, tokens_N, -1.0, head), whole[0])
    assert torch.equal(likeliest(z_ND, head), whole[1])


def test_no_position_has_no_gradient():
    head, none_ND = make_head(6, 3), torch.zeros(0, 3)
    assert gradient(none_ND, torch.zeros(0, dtype=torch.long), -1.0, head).shape == (0, 3)
    assert likeliest(none_ND, head).tolist() == []


def test_of_equally_likely_tokens_the_first_is_taken():
    head = Head(torch.tensor([[0.0], [1.0], [1.0]], dtype=torch.float64))
    assert likeliest(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), head).tolist() == [1, 0]


def test_random_signs_go_as_far_as_adams_first_step_and_depend_on_the_seed_alone():
    how = Ascent(lr=0.25)
    state = LatentState.start(normal(40, 50), how)
    moves = [wander(state, seed, how).latent_ND - state.latent_ND for seed in (1, 1, 2)]
    assert torch.equal(moves[0], moves[1]) and not torch.equal(moves[0], moves[2])
    torch.testing.assert_close(moves[0].abs(), torch.full((40, 50), 0.25), rtol=1e-5, atol=1e-6)
    assert abs(float(moves[0].sign().mean())) < 0.1
