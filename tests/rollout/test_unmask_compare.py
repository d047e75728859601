import pytest
import torch

from rlalign.models.masked_diffusion import Canvas
from rlalign.rollout.unmask import UnmaskParams, unmask
from rlalign.rollout.unmask_compare import compare
from tests.rollout.masked_fakes import MASK, masked_llama


def test_ways_of_filling_are_set_against_the_first():
    lm, seeds = masked_llama(), torch.arange(4)
    canvas = Canvas(torch.tensor([[3, i + 2, *[MASK] * 8] for i in range(4)]))
    ways = {
        "one": UnmaskParams(4, 4, 1.0),
        "again": UnmaskParams(4, 4, 1.0),
        "two": UnmaskParams(2, 4, 1.0),
        "cached": UnmaskParams(4, 4, 1.0, cache="dual"),
    }
    fills = compare(lm, canvas, ways, seeds, lambda ids_BT: ids_BT[:, 2] > 5, start=2)
    filled = {
        name: unmask(lm, canvas, params, seeds, start=2).ids_BT for name, params in ways.items()
    }
    for name, fill in fills.items():
        differing = sum(
            a != b
            for row, other in zip(filled[name].tolist(), filled["one"].tolist(), strict=True)
            for a, b in zip(row, other, strict=True)
        )
        assert fill.tokens == 32 and fill.disagreement == differing / 32
        assert fill.accuracy == sum(row[2] > 5 for row in filled[name].tolist()) / 4
        assert fill.seconds > 0
    assert [fill.forwards for fill in fills.values()] == [32, 32, 16, 32]
    assert fills["two"].tokens_per_forward == 2
    assert fills["one"].disagreement == fills["again"].disagreement == 0
    assert fills["cached"].disagreement > 0


def test_a_full_canvas_has_nothing_to_compare():
    canvas = Canvas(torch.tensor([[3, 4]]))
    [fill] = compare(
        masked_llama(), canvas, {"one": UnmaskParams(1)}, torch.arange(1), lambda ids: ids[:, 0] * 0
    ).values()
    assert (fill.tokens, fill.forwards, fill.disagreement) == (0, 0, 0)
    assert fill.tokens_per_forward == pytest.approx(0)
