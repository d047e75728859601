"""The loop that LatentSeek is measured against takes the same path, at the cost it is said to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rlalign.bench import FOLDER
from rlalign.rollout.search import run_searches
from rlalign.testtime.latent_seek import latent_seek
from rlalign.testtime.ledger import Ledger
from rlalign.testtime.prompt import Prompt
from tests.testtime.scripted import ScriptedEngine

sys.path.insert(0, str(Path(FOLDER)))
import _testtime_latent as bench
from _latent_literal import literal_seek


@pytest.mark.parametrize("length", [12, 40])
def test_both_sides_take_the_same_path(length):
    engine, model = bench.endless(hidden=32, layers=1)
    options = {"rho": 0.4, "lr": 0.3, "max_steps": 4, "max_new_tokens": length}
    for text in ("2+3?", "hello"):
        prompt = tuple(engine.tokenizer(text)["input_ids"])
        [ours] = latent_seek(engine, [prompt], bench.Never(), select="last", **options)
        theirs = literal_seek(
            model,
            prompt,
            lambda answer: -1.0,
            eos_ids=engine.eos_ids,
            dtype=torch.float32,
            **options,
        )
        assert len(theirs.answers) == 5 and len(set(theirs.answers)) > 2
        assert ours.token_ids == theirs.answers[-1]
        distinct = [
            a for a, b in zip(theirs.answers, [(), *theirs.answers], strict=False) if a != b
        ]
        decode = engine.tokenizer.decode
        assert [step["text"] for step in ours.trace["steps"]] == [*map(decode, distinct)]
        num, size = int(0.4 * length), len(prompt)
        first = sum(size + t for t in range(length))
        later = sum(size + t for t in range(num, length))
        assert theirs.token_forwards == first + 4 * later
        assert theirs.generated == length + 4 * (length - num)


def test_an_accepted_answer_ends_the_loop():
    engine, model = bench.endless(hidden=32, layers=1)
    prompt = tuple(engine.tokenizer("2+3?")["input_ids"])
    options = {"rho": 0.4, "lr": 0.3, "max_steps": 4, "max_new_tokens": 12}
    found = literal_seek(model, prompt, lambda answer: 0.0, eos_ids=engine.eos_ids, **options)
    assert len(found.answers) == 1 and found.token_forwards == sum(4 + t for t in range(12))


def test_agreement_is_the_share_of_votes_less_one():
    said: dict[int, str] = {}

    def say(text: str, seed: int) -> str:
        said[seed] = f"<answer>{7 if len(said) < 3 else 8}</answer>"
        return said[seed]

    engine, ledger = ScriptedEngine(say), Ledger()
    reward = bench.Agreement(engine)
    prompt = Prompt("p", (5,), "?")

    def of(text: str) -> float:
        return run_searches(engine, [reward(prompt, text, ledger)])[0]

    assert of("so <answer>7</answer>") == pytest.approx(-0.25)
    assert of("so <answer>8</answer>") == pytest.approx(-0.75)
    assert of("no answer") == -1 and ledger.num_engine_calls == bench.VOTERS == 4
