"""Requests of searches on their way to the engine process and back: nothing changes on the way."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlalign.algos.latent import Ascent, LatentState
from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.limits import Limits
from rlalign.rollout.search import Ascend, Ascended, Choose, Draw, Drawn, Latents
from rlalign.rollout.server import search_messages as messages

LIMITS = Limits(vocab=100, max_len=20)


def sent(message):
    """As the other process has it."""
    return json.loads(json.dumps(message))


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 2**32),
)
def test_a_tensor_is_the_same_to_the_bit(dtype, shape, seed):
    rng = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=rng) * 100).to(dtype)
    again = messages.unpack(sent(messages.pack(tensor)))
    assert again.dtype == dtype and again.shape == tensor.shape
    assert torch.equal(again, tensor)


def test_what_is_no_number_and_what_is_not_contiguous_arrives_too():
    tensor_23 = torch.tensor([[1.0, torch.inf], [torch.nan, -torch.inf], [-0.0, 3.0]]).T
    again_23 = messages.unpack(sent(messages.pack(tensor_23)))
    assert torch.equal(again_23.view(torch.int32), tensor_23.contiguous().view(torch.int32))


def test_a_tensor_that_is_not_whole_is_an_error():
    packed = messages.pack(torch.zeros(3, 4))
    with pytest.raises(EngineError, match="did not come whole"):
        messages.unpack({**packed, "b64": packed["b64"][:20]})


def state(num_steps: int = 3) -> LatentState:
    return LatentState(torch.randn(2, 4), torch.randn(2, 4), torch.rand(2, 4), num_steps)


def same(a: LatentState, b: LatentState) -> bool:
    names = ("latent_ND", "first_ND", "second_ND")
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
    return tensors and a.num_steps == b.num_steps


def test_an_ascent_is_asked_for_whole():
    """Every field of the request and of how it climbs."""
    how = Ascent(**{
        field.name: (0.7, 0.9) if field.name == "betas"
        else f"other {field.name}" if isinstance(field.default, str) else 0.5
        for field in dataclasses.fields(Ascent)
    })  # fmt: skip
    request = Ascend(state(), torch.tensor([4, 9]), -0.25, how, seed=77)
    message, tokens = messages.message_of(request, LIMITS)
    again = messages.ascend_of(sent(message))
    assert again.how == how and same(again.state, request.state)
    assert torch.equal(again.tokens_N, request.tokens_N) and again.tokens_N.dtype == torch.int64
    assert (again.reward, again.seed, tokens) == (-0.25, 77, 2)


def test_replies_are_read_as_they_were_meant():
    moved = Ascended(state(5), torch.tensor([1, 2]), torch.tensor([3, 4]), True)
    ascend = Ascend(state(), torch.tensor([4, 9]), 1.0, Ascent())
    got = messages.reply_of(ascend, sent(messages.ascended(moved)))
    assert same(got.state, moved.state) and got.is_still
    assert (got.tokens_N.tolist(), got.before_N.tolist()) == ([1, 2], [3, 4])

    done = {"ids": [5, 6], "logp": [-0.5, -1.0], "finish": "stop", "spans": [[2, 0]]}
    params = SamplingParams(4)
    assert messages.reply_of(Draw((3,), params), sent(done)) == Drawn((5, 6), (-0.5, -1.0), "stop")
    top = [[(7, -0.1), (8, -2.5)], [(9, -0.2)]]
    drawn = messages.reply_of(Draw((3,), params), sent({**done, "top": top}))
    assert drawn.top == (((7, -0.1), (8, -2.5)), ((9, -0.2),))
    assert messages.reply_of(Choose((3,), (4, 5)), sent({"logp": [-1.0, -torch.inf]})) == (
        -1.0, -float("inf"),
    )  # fmt: skip
    latent_ND = torch.randn(3, 8)
    reply = messages.reply_of(Latents((3, 4), 1, 2), sent({"latent": messages.pack(latent_ND)}))
    assert torch.equal(reply, latent_ND)


def test_what_a_request_costs():
    params = SamplingParams(6, num_top=3)
    message, tokens = messages.message_of(Draw((3, 4), params, 9), LIMITS)
    assert tokens == 8 and message["seed"] == 9
    assert SamplingParams(**{**sent(message)["params"], "stop_token_ids": ()}) == params
    assert messages.message_of(Choose((3, 4), (5,)), LIMITS)[1] == 3
    assert messages.message_of(Latents((3, 4, 5), 1, 3), LIMITS)[1] == 3


@pytest.mark.parametrize(
    "request_, reason",
    [
        (Draw((3,), SamplingParams(20)), "longest sequence of 20"),
        (Draw((100,), SamplingParams(2)), "token ids"),
        (Draw((), SamplingParams(2)), "no tokens"),
        (Draw((3,), SamplingParams(2, temperature=5.0)), "temperature"),
        (Draw((3,), SamplingParams(2), seed=-1), "seed"),
        (Choose((3,), (100,)), "options"),
        (Choose(tuple(range(20)), (1,)), "longest sequence"),
        (Latents((3, 4), 0, 2), "the first token has none"),
        (Latents((3, 4), 1, 3), "latents of tokens 1 to 3 of 2"),
    ],
)
def test_what_the_engine_cannot_serve_is_not_sent(request_, reason):
    with pytest.raises(EngineError, match=reason):
        messages.message_of(request_, LIMITS)
