"""A random model, rewards and records for the tests of LatentSeek."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from rlalign.config.schema import ModelConfig
from rlalign.models.load import load_causal_lm, load_tokenizer
from rlalign.models.random import write_random_model
from rlalign.rollout.search import (
    Ascend,
    Ascended,
    Draw,
    Drawn,
    Latents,
    Rate,
)
from rlalign.rollout.search_hf import HFSearch
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Prompt, make_prompt
from rlalign.testtime.result import Result
from rlalign.testtime.run import greedy
from tests.testtime.scripted import ScriptedEngine

PROMPTS = ["abc", "12+3=?", "hello", "7", "zzzz", "Q: why?"]  # the first is answered briefly
BOLD = {"lr": 0.5, "rho": 0.5, "max_new_tokens": 20, "max_steps": 6}  # moves on random models


def open_random(folder: Path, **shape: int) -> HFSearch:
    write_random_model(folder, "qwen2", **{"hidden": 32, "layers": 2, "max_positions": 64} | shape)
    config = ModelConfig(path=str(folder), dtype="float32")
    return HFSearch(load_causal_lm(config, 0, "cpu"), load_tokenizer(config))


class Recorder:
    """An engine that remembers what it was asked and what it said."""

    def __init__(self, engine: HFSearch) -> None:
        self.inner, self.tokenizer = engine, engine.tokenizer
        self.eos_ids, self.limits = engine.eos_ids, engine.limits
        self.log: list[tuple[object, object]] = []

    def answer(self, requests):
        replies = self.inner.answer(requests)
        self.log += zip(requests, replies, strict=True)
        return replies

    def of(self, kind: type) -> list:
        return [(request, reply) for request, reply in self.log if isinstance(request, kind)]


class Scored:
    """A `Reward` of a function of the text, that counts its calls."""

    def __init__(self, score) -> None:
        self.score, self.texts = score, []

    def __call__(self, prompt: Prompt, response: str, ledger: Ledger):
        [value] = yield from ledger.ask([Rate(self, prompt, response)])
        return value

    def rate(self, items):
        self.texts += [text for _, text in items]
        return [self.score(text) for _, text in items]


def hashed(text: str) -> float:
    """Some reward in [-1, -0.25], for texts of any kind."""
    return -1 + (sum(map(ord, text)) % 7) / 8


def bad(text: str) -> float:
    return -1.0


def same(a: Result, b: Result) -> bool:
    return dataclasses.replace(a, wall_s=0.0) == dataclasses.replace(b, wall_s=0.0)


def greedy_ids(engine: HFSearch, text: str, length: int = 20) -> tuple[int, ...]:
    prompt = make_prompt(engine.tokenizer, text)
    [drawn] = engine.answer([Draw(prompt.ids, greedy(length))])
    return drawn.ids


class Ending:
    """A script for a search: greedy dots, then latents whose tokens are `moves`, step by step;
    before the first step, `off` of them look as if they were another token."""

    def __init__(self, moves: list[str], off: int = 0) -> None:
        base = ScriptedEngine()
        self.tokenizer, self.eos_ids, self.limits = base.tokenizer, base.eos_ids, base.limits
        self.moves = [self.tokenizer(move)["input_ids"] for move in moves]
        self.off, self.requests = off, []

    def answer(self, requests):
        self.requests += requests
        return [self._reply(request) for request in requests]

    def _reply(self, request):
        if isinstance(request, Draw):
            num = request.params.max_completion_length
            [dot] = self.tokenizer(".")["input_ids"]
            return Drawn((dot,) * num, (0.0,) * num, "length")
        if isinstance(request, Latents):
            return torch.zeros(request.stop - request.start, 2)
        assert isinstance(request, Ascend)
        before_N = request.tokens_N.clone()
        before_N[: self.off] += 1
        return Ascended(request.state, torch.tensor(self.moves.pop(0)), before_N, False)
