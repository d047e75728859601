"""The caches; guidance and suppressed tokens are in test_unmask.py."""

from contextlib import contextmanager

import pytest
import torch

from rlalign.models.masked_diffusion import Canvas
from rlalign.rollout.engine import EngineError
from rlalign.rollout.unmask import UnmaskParams, unmask
from tests.rollout.masked_fakes import MASK, Bag, masked_llama

LENGTH, WIDTH = 12, 7
PROMPTS = ([3, 7, 2], [5], [2, 2, 3, 4, 5, 6, 7])


def canvas(prompts=PROMPTS):
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    rows = [[0] * n + p + [MASK] * LENGTH for n, p in zip(pads, prompts, strict=True)]
    real = torch.tensor([[i >= n for i in range(width + LENGTH)] for n in pads])
    return Canvas(torch.tensor(rows), None if bool(real.all()) else real)


def fill(lm, cache, steps, block, temperature=1.0, **params):
    how = UnmaskParams(steps, block, temperature, cache=cache, **params)
    return unmask(lm, canvas(), how, torch.tensor([1, 2, 3]), start=WIDTH)


def assert_same(found, exact):
    assert torch.equal(found.ids_BT, exact.ids_BT)
    assert torch.equal(found.step_BT, exact.step_BT)
    torch.testing.assert_close(found.logp_BT, exact.logp_BT, atol=1e-4, rtol=0)


@contextmanager
def columns_run(lm):
    """How many columns each forward pass embeds, times its rows."""
    seen = []
    embedding = lm.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _m, args, _o: seen.append(args[0].numel()))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("shift", [False, True])
class TestExact:
    def test_where_a_cache_is_made_for_every_step(self, cache, cfg_scale, shift):
        lm = masked_llama(shift=shift)
        for steps, block in ((1, 1), (1, 4), (1, LENGTH), (1, 0)):
            found, exact = (fill(lm, c, steps, block, cfg_scale=cfg_scale) for c in (cache, "none"))
            assert_same(found, exact)

    def test_in_one_layer_whose_keys_depend_on_their_own_tokens_alone(
        self, cache, cfg_scale, shift
    ):
        lm = masked_llama(shift=shift, layers=1)
        for threshold in (None, 0.6):
            options = {"cfg_scale": cfg_scale, "threshold": threshold}
            found, exact = (fill(lm, c, 4, 4, **options) for c in (cache, "none"))
            assert_same(found, exact)

    def test_in_a_model_with_blocks(self, cache, cfg_scale, shift):
        lm = masked_llama(block_size=4, shift=shift)
        for threshold, edit in ((None, None), (0.3, None), (0.3, 0.5)):
            options = {"cfg_scale": cfg_scale, "threshold": threshold, "edit_threshold": edit}
            found, exact = (fill(lm, c, 4, 4, **options) for c in (cache, "none"))
            assert_same(found, exact)
            assert exact.forwards_B.tolist() != [12] * 3 or threshold is None


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_else_it_is_an_approximation(cache):
    found, exact = (fill(masked_llama(), c, 4, 4) for c in (cache, "none"))
    first = exact.step_BT == 0
    assert torch.equal(found.ids_BT[first], exact.ids_BT[first])
    assert float((found.logp_BT - exact.logp_BT).abs().max()) > 0.1


def test_what_is_kept_is_not_run_again():
    lm, width = masked_llama(), WIDTH + LENGTH
    expected = {
        "none": [3 * width] * 6,
        # A block of two steps: the whole, then twice from the block on; and the block alone.
        "prefix": [3 * n for low in (7, 11, 15) for n in (width, width - low, width - low)],
        "dual": [3 * n for _ in range(3) for n in (width, 4, 4)],
    }
    for cache, columns in expected.items():
        with columns_run(lm) as seen:
            fill(lm, cache, 2, 4)
        assert seen == columns


def test_blocks_of_the_model_are_run_once_when_they_are_full():
    lm = masked_llama(block_size=4)
    prompts = ([3, 7, 2, 2], [5, 5, 5, 5], [2] * 8)
    how = UnmaskParams(2, 4, 1.0, cache="prefix")
    with columns_run(lm) as seen:
        unmask(lm, canvas(prompts), how, torch.tensor([1, 2, 3]))
    # The prompt, then each block at its two steps; and when it is full, but for the last one.
    assert seen == [3 * n for n in (8, 4, 4, 4, 4, 4, 4, 4, 4)]


def test_rows_that_are_full_leave_a_cache_too():
    lm = masked_llama(block_size=4)
    ids = torch.tensor([[2, 3, 4, 5, *[MASK] * 8], [2, 3, 4, 5, 6, 7, 8, 8, 9, 9, 9, MASK]])
    with columns_run(lm) as seen:
        filled = unmask(lm, Canvas(ids), UnmaskParams(4, 4, cache="prefix"), torch.tensor([1, 2]))
    assert filled.forwards_B.tolist() == [8, 1]
    alone = unmask(lm, Canvas(ids[1:]), UnmaskParams(4, 4), torch.tensor([2]))
    assert torch.equal(alone.ids_BT[0], filled.ids_BT[1])
    assert seen[-1] == 4


def test_models_without_keys_and_values_are_refused():
    for cache, message in (("prefix", r"Bag.*cache=none"), ("all", "'all'.*prefix")):
        with pytest.raises(EngineError, match=message):
            fill(Bag(), cache, 1, 4)
