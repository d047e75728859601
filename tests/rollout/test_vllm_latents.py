"""The tap on vLLM's runners, on hand-written ones: a batch is read in pieces, in any order of rows,
and the runner's memory is used again. On a real vLLM: test_search_vllm.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.rollout.engine import EngineError
from rlalign.rollout.vllm_latents import LatentTap

D = 3
Piece = tuple[str, int, int]  # a request's tokens from one position to another


def hidden(name: str, first: int, stop: int) -> torch.Tensor:
    """What request `name` has at these positions, [tokens, D]."""
    number = 1000.0 * ord(name[0])
    return number + torch.arange(first, stop)[:, None] + torch.arange(D) / 10


class First:
    """What the tap needs of vLLM's first runner."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.memory = torch.zeros(64, D)

    def _get_prompt_logprobs_dict(self, hidden_states: Any, num_scheduled_tokens: Any) -> str:
        self.asked.append(num_scheduled_tokens)
        return "theirs"

    def step(self, *pieces: Piece) -> Any:
        counts = [stop - first for _, first, stop in pieces]
        starts = np.cumsum([0, *counts])
        self.memory[: starts[-1]] = torch.cat([hidden(*piece) for piece in pieces])
        self.query_start_loc = SimpleNamespace(np=starts)
        names = [name for name, _, _ in pieces]
        self.input_batch = SimpleNamespace(req_id_to_index={n: i for i, n in enumerate(names)})
        self.requests = {n: SimpleNamespace(num_computed_tokens=first) for n, first, _ in pieces}
        return self._get_prompt_logprobs_dict(
            self.memory[: starts[-1]], dict(zip(names, counts, strict=True))
        )


class Second:
    """What it needs of the second."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.memory = torch.zeros(64, D)
        self.prompt_logprobs_worker = SimpleNamespace(compute_prompt_logprobs=self._theirs)

    def _theirs(self, logits_fn: Any, hidden_states: Any, batch: Any, *rest: Any) -> str:
        self.asked.append((logits_fn, *rest))
        return "theirs"

    def step(self, *pieces: Piece) -> Any:
        counts = [stop - first for _, first, stop in pieces]
        starts = np.cumsum([0, *counts])
        self.memory[: starts[-1]] = torch.cat([hidden(*piece) for piece in pieces])
        batch = SimpleNamespace(
            req_ids=[name for name, _, _ in pieces],
            query_start_loc_np=starts,
            num_scheduled_tokens=np.array(counts),
            num_computed_prefill_tokens_np=np.array([first for _, first, _ in pieces]),
        )
        worker = self.prompt_logprobs_worker
        return worker.compute_prompt_logprobs("logits", self.memory, batch, "ids", "counts")


@pytest.fixture(params=[First, Second])
def runner(request) -> Any:
    return request.param()


@pytest.fixture
def tap(runner) -> LatentTap:
    tap = LatentTap()
    tap.install(runner)
    return tap


def test_rows_are_those_of_the_request_from_its_first_wanted_token_on(runner, tap):
    tap.follow("mine", "b", 4, 9)
    tap.follow("other", "c", 0, 2)
    assert runner.step(("a", 7, 8), ("b", 0, 9), ("c", 0, 2)) == "theirs"
    assert torch.equal(tap.take("mine"), hidden("b", 4, 9))
    assert torch.equal(tap.take("other"), hidden("c", 0, 2))
    assert len(runner.asked) == 1


@pytest.mark.parametrize("cuts", [(3,), (4,), (5,), (2, 4, 6), (6, 7)])
def test_pieces_of_a_prompt_are_put_together(runner, tap, cuts):
    tap.follow("mine", "b", 4, 9)
    for first, stop in zip((0, *cuts), (*cuts, 9), strict=True):
        runner.step(("b", first, stop), ("a", stop, stop + 1))
        runner.step(("a", stop, stop + 1))
    assert torch.equal(tap.take("mine"), hidden("b", 4, 9))


@pytest.mark.parametrize("lost_at", [3, 5, 7])
def test_a_prompt_that_lost_its_cache_is_read_anew(runner, tap, lost_at):
    tap.follow("mine", "b", 4, 9)
    runner.step(("b", 0, lost_at))
    runner.step(("b", 0, 6))
    runner.step(("b", 6, 9))
    assert torch.equal(tap.take("mine"), hidden("b", 4, 9))


def test_a_token_drawn_after_the_prompt_is_not_kept(runner, tap):
    tap.follow("mine", "b", 4, 9)
    runner.step(("b", 0, 9))
    runner.step(("b", 9, 10))
    assert torch.equal(tap.take("mine"), hidden("b", 4, 9))


def test_what_was_taken_or_forgotten_is_gone(runner, tap):
    tap.follow("mine", "b", 0, 2)
    tap.follow("left", "c", 0, 2)
    runner.step(("b", 0, 2), ("c", 0, 2))
    tap.take("mine")
    tap.forget("left")
    tap.forget("never there")
    for name in ("mine", "left"):
        with pytest.raises(KeyError):
            tap.take(name)


def test_latents_that_are_not_finite_are_refused(tap, runner):
    tap.follow("mine", "b", 0, 3)
    runner.step(("b", 0, 2))
    [part] = tap._kept["mine"].parts
    part[1, 2] = torch.inf
    with pytest.raises(EngineError, match="not finite"):
        tap.take("mine")
