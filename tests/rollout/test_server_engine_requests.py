"""What the engine process makes of a search's requests, over a stream that is a fake."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlalign.algos.latent import Ascent, Head, LatentState
from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.limits import Limits
from rlalign.rollout.search import Ascend, Choose, Draw, Latents
from rlalign.rollout.search_answers import climb
from rlalign.rollout.server import engine_requests
from rlalign.rollout.server.engine_main import Engine, Running
from rlalign.rollout.server.search_messages import message_of, reply_of
from rlalign.types import PolicyVersion

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)

LIMITS = Limits(vocab=11, max_len=20)
HEAD = Head(torch.randn(11, 6, generator=torch.Generator().manual_seed(1)))
ADAPTED = Head(torch.randn(11, 6, generator=torch.Generator().manual_seed(5)))


class Stream:
    """Takes what it is given and gives nothing."""

    limits, unfinished = LIMITS, 0
    version = PolicyVersion(0, "")

    def __init__(self) -> None:
        self.added: list[tuple[list[int], Any]] = []

    def sampling(self, params: SamplingParams, seed: int) -> Any:
        return SimpleNamespace(params=params, seed=seed)

    def add(self, name: str, ids: Any, params: Any, adapter: Any) -> None:
        self.added.append((list(ids), params))

    def head(self, adapter: Any) -> Head:
        return HEAD if adapter is None else ADAPTED

    def check_usable(self) -> None: ...


class Wire:
    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


def message(request: Any) -> dict[str, Any]:
    return {**message_of(request, LIMITS)[0], "job": "a", "seq": 4}


@pytest.mark.parametrize("num_top, want", [(0, [5, 6, 7, 8]), (3, [5, 6])])
def test_a_draw_goes_on_after_an_interruption_unless_its_likeliest_tokens_are_lost(num_top, want):
    stream = Stream()
    engine = Engine(Wire(), stream, None)
    running = Running(message(Draw((5, 6), SamplingParams(6, num_top=num_top), 9)), None)
    running.take_in([7, 8], [-1.0, -2.0], version=0)
    engine._add(4, running)
    [(ids, asked)] = stream.added
    assert ids == want
    assert asked.params.max_completion_length == 6 - (len(want) - 2)
    assert (asked.seed == 9) == bool(num_top)  # anew: as if nothing had been
    assert len(running.ids) == running.before == len(want) - 2


def test_what_vllm_is_given():
    stream = Stream()
    ids, params = engine_requests.for_vllm(stream, message(Choose((3, 4), (7, 2))), [])
    assert list(ids) == [3, 4] and params.logprob_token_ids == [7, 2]
    ids, params = engine_requests.for_vllm(stream, message(Latents((3, 4, 5, 6), 2, 3)), [])
    assert list(ids) == [3, 4]  # what predicts token 2 is the last of them
    assert params.max_tokens == 1
    ids, _ = engine_requests.for_vllm(stream, {"kind": "score", "ids": [3, 4, 5]}, [])
    assert list(ids) == [3, 4]
    with pytest.raises(EngineError, match="longest sequence"):
        engine_requests.for_vllm(stream, {"kind": "choose", "ids": [3] * 20, "options": [1]}, [])


def ascent() -> Ascend:
    rng = torch.Generator().manual_seed(2)
    state = LatentState.start(torch.randn(3, 6, generator=rng), Ascent())
    return Ascend(state, torch.tensor([1, 2, 3]), -0.5, Ascent(lr=0.5), seed=3)


def test_latents_climb_in_the_engine_as_they_do_here():
    wire = Wire()
    Engine(wire, Stream(), None)._take(message(ascent()))
    [done] = wire.sent
    assert (done["kind"], done["seq"]) == ("done", 4)
    got, want = reply_of(ascent(), done), climb(ascent(), HEAD, torch.device("cpu"))
    assert torch.equal(got.state.latent_ND, want.state.latent_ND)
    assert torch.equal(got.tokens_N, want.tokens_N) and torch.equal(got.before_N, want.before_N)
    assert (got.state.num_steps, got.is_still) == (1, False)


def test_latents_climb_under_the_head_that_the_jobs_adapter_makes():
    wire, adapter = Wire(), SimpleNamespace()
    engine = Engine(wire, Stream(), None)
    engine._adapters["a"] = adapter
    engine._take(message(ascent()))
    [done] = wire.sent
    got, want = reply_of(ascent(), done), climb(ascent(), ADAPTED, torch.device("cpu"))
    assert torch.equal(got.state.latent_ND, want.state.latent_ND)
    plain = climb(ascent(), HEAD, torch.device("cpu"))
    assert not torch.equal(got.state.latent_ND, plain.state.latent_ND)
