from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.models.masked_diffusion import Canvas
from rlalign.rollout.engine import EngineError
from rlalign.rollout.sampling import uniform
from rlalign.rollout.unmask import MAX_EDIT_STEPS, UnmaskParams, unmask
from rlalign.rollout.unmask_order import ORDERS, PROBABILITIES, SCHEDULED, STEP_BITS
from tests.rollout.masked_fakes import EOS, MASK, VOCAB, Bag, masked_llama

PROMPT = [3, 7, 2]


def canvas_of(*rows):
    """Rows of token ids, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]).bool()
    return Canvas(ids, None if bool(real.all()) else real)


def masks(count, prompt=PROMPT):
    return [*prompt, *[MASK] * count]


def seeds(*values):
    return torch.tensor(values)


def by_hand(model, ids, params, seed, start=0):
    """One token a step, one row, no batch: (ids, log-probs, steps) as plain lists."""
    ids, logps, steps = list(ids), [0.0] * len(ids), [-1] * len(ids)
    size = model.block_size or params.block_size or len(ids)
    start = start if params.block_size and not model.block_size else 0
    for step in range(ids.count(MASK)):
        block = min((i - start) // size for i, token in enumerate(ids) if token == MASK)
        logits = model.row(torch.tensor(ids))
        best = None
        for i, token in enumerate(ids):
            if token != MASK or (i - start) // size != block:
                continue
            p = (logits[i].double() / (params.temperature or 1)).softmax(0)
            if params.temperature:
                u = float(uniform(seeds(seed), seeds((step << STEP_BITS) | i)))
                drawn = next(v for v in range(VOCAB) if float(p[: v + 1].sum()) > u)
            else:
                drawn = int(p.argmax())
            sure = float(logits[i].double().softmax(0)[drawn])
            if best is None or sure > best[0]:
                best = sure, i, drawn, float(p[drawn].log())
        _, i, ids[i], logps[i] = best
        steps[i] = step
    return ids, logps, steps


# --- the rule


@pytest.mark.parametrize("block_size", [0, 3, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_one_token_a_step_is_the_loop_written_out(block_size, temperature):
    model = Bag()
    params = UnmaskParams(99, block_size, temperature)
    rows = [masks(9), masks(9, [5]), [3, MASK, 2, MASK, MASK, 8, MASK, 1, 1, MASK, 5, 5]]
    filled = unmask(model, canvas_of(*rows), params, seeds(11, 12, 13), start=3)
    for b, row in enumerate(rows):
        pad = 12 - len(row)
        ids, logps, steps = by_hand(model, row, params, 11 + b, start=3 - pad)
        assert filled.ids_BT[b, pad:].tolist() == ids
        assert filled.step_BT[b, pad:].tolist() == steps
        torch.testing.assert_close(filled.logp_BT[b, pad:], torch.tensor(logps))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_with_blocks_is_filled_by_them_and_a_prompt_may_end_within_one(temperature):
    model = Bag(block_size=4)
    params = UnmaskParams(99, 4, temperature)
    rows = [masks(9), masks(9, [5]), masks(8, [5, 6, 7, 8]), masks(7, [2, 3, 4, 5, 6])]
    filled = unmask(model, canvas_of(*rows), params, seeds(1, 2, 3, 4))
    for b, row in enumerate(rows):
        ids, _, steps = by_hand(model, row, params, 1 + b)
        assert filled.ids_BT[b, -len(row) :].tolist() == ids
        assert filled.step_BT[b, -len(row) :].tolist() == steps


def test_tokens_of_a_block_are_shared_out_evenly_over_its_steps():
    canvas = canvas_of(masks(8), masks(8, [5]), [MASK, MASK, MASK, 4, 4, 4, 4, MASK, 1, 1, 1])
    filled = unmask(Bag(), canvas, UnmaskParams(3), seeds(1, 2, 3))
    for b, expected in enumerate([[3, 3, 2], [3, 3, 2], [2, 1, 1]]):
        assert filled.step_BT[b][filled.step_BT[b] >= 0].bincount().tolist() == expected
    blocks = unmask(Bag(), canvas_of(masks(8)), UnmaskParams(2, 5), seeds(1), start=3)
    assert blocks.step_BT[0, 3:].bincount().tolist() == [3, 2, 2, 1]
    assert int(blocks.step_BT[0, 3:8].max()) == 1  # the first block's steps are 0 and 1


def test_the_surest_tokens_go_first():
    """By the model's own probabilities at temperature 1, whatever the sampling temperature."""
    model, canvas = Bag(), canvas_of(masks(8))
    for temperature in (0.0, 0.4, 2.0):
        filled = unmask(model, canvas, UnmaskParams(2, 0, temperature), seeds(5))
        first = filled.step_BT[0] == 0
        logits_TV = model.row(canvas.ids_BT[0])
        prob = logits_TV.softmax(-1).gather(-1, filled.ids_BT.T)[:, 0]
        torch.testing.assert_close(filled.confidence_BT[0, first], prob[first])
        scaled = (logits_TV / (temperature or 1)).log_softmax(-1).gather(-1, filled.ids_BT.T)[:, 0]
        torch.testing.assert_close(filled.logp_BT[0, first], scaled[first])


# --- what always holds


ROWS = st.lists(
    st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=10), min_size=1, max_size=4
)
PARAMS = st.builds(
    UnmaskParams,
    steps=st.integers(1, 12),
    block_size=st.sampled_from([0, 1, 3, 4]),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    order=st.sampled_from(ORDERS),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 4]),
    threshold=st.sampled_from([None, 0.3, 0.9]),
    factor=st.sampled_from([None, 0.5]),
    cfg_scale=st.sampled_from([0.0, 1.5]),
    suppress_ids=st.sampled_from([(), (2, 5)]),
    eos_ids=st.just((EOS, 4)),
    eos_confidence=st.booleans(),
    alg_temp=st.sampled_from([0.0, 0.5]),
).map(lambda params: replace(params, **allowed(params)))


def allowed(params):
    """What an order cannot do, left out."""
    rules = {} if params.order in PROBABILITIES else {"threshold": None, "factor": None}
    if params.order not in SCHEDULED or params.threshold or params.factor:
        rules["alg_temp"] = 0.0
    return rules | ({"eos_confidence": True} if params.order == "origin" else {})


@settings(max_examples=120, deadline=None)
@given(ROWS, PARAMS, st.integers(-(2**63), 2**63 - 10))
def test_invariants(rows, params, seed):
    model, canvas = Bag(), canvas_of(*rows)
    seed_B = torch.tensor([seed + i for i in range(len(rows))])
    filled = unmask(model, canvas, params, seed_B)
    given_BT = (canvas.ids_BT != MASK) | ~(
        torch.ones_like(canvas.ids_BT).bool() if canvas.real_BT is None else canvas.real_BT
    )
    assert torch.equal(filled.ids_BT[given_BT], canvas.ids_BT[given_BT])
    assert (filled.step_BT[given_BT] == -1).all()
    assert not (filled.ids_BT[~given_BT] == MASK).any()
    assert not torch.isin(filled.ids_BT[~given_BT], torch.tensor(params.suppress_ids)).any()
    assert (filled.logp_BT[~given_BT] <= 0).all() and filled.logp_BT.isfinite().all()
    for b, row in enumerate(rows):
        step_T = filled.step_BT[b][~given_BT[b]]
        # Every step commits something, and there are no others.
        assert sorted(set(step_T.tolist())) == list(range(int(filled.forwards_B[b])))
        pad = canvas.ids_BT.shape[1] - len(row)
        alone = unmask(model, canvas_of(row), params, seed_B[b : b + 1], start=-pad)
        assert torch.equal(alone.ids_BT[0], filled.ids_BT[b, pad:])
        assert torch.equal(alone.logp_BT[0], filled.logp_BT[b, pad:])
        assert torch.equal(alone.step_BT[0], filled.step_BT[b, pad:])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.sampled_from([1, 3, 4]), st.sampled_from(ORDERS[:-1]))
def test_as_many_steps_as_tokens_are_as_many_forward_passes(length, block_size, order):
    model = Bag()
    params = UnmaskParams(block_size, block_size, 1.0, order)
    filled = unmask(model, canvas_of(masks(length)), params, seeds(1), start=3)
    assert model.calls == [1] * length
    assert int(filled.forwards_B) == length
    assert sorted(filled.step_BT[0, 3:].tolist()) == list(range(length))


def test_a_full_canvas_costs_nothing_and_rows_that_are_done_leave():
    model = Bag()
    full = unmask(model, canvas_of(PROMPT, [4]), UnmaskParams(3), seeds(1, 2))
    assert model.calls == [] and full.forwards_B.tolist() == [0, 0]
    canvas = canvas_of([3, MASK, MASK, MASK], [3, 4, 5, MASK], [3, 4, 5, 6])
    filled = unmask(model, canvas, UnmaskParams(99), seeds(1, 2, 3))
    assert model.calls == [2, 1, 1]
    assert filled.forwards_B.tolist() == [3, 1, 0]
    empty = Canvas(torch.zeros(0, 5, dtype=torch.long))
    assert unmask(model, empty, UnmaskParams(3), seeds()).ids_BT.shape == (0, 5)


def test_rows_whose_logits_do_not_fit_are_read_in_parts(monkeypatch):
    canvas, params = canvas_of(*[masks(4, [2 + i]) for i in range(5)]), UnmaskParams(2, 0, 1.0)
    whole = unmask(Bag(), canvas, params, torch.arange(5))
    monkeypatch.setattr("rlalign.rollout.unmask.LOGITS_BYTES", 2 * 4 * 4 * VOCAB)
    model = Bag()
    parts = unmask(model, canvas, params, torch.arange(5))
    assert model.calls[:3] == [2, 2, 1]
    assert torch.equal(parts.ids_BT, whole.ids_BT) and torch.equal(parts.step_BT, whole.step_BT)
    assert torch.equal(parts.logp_BT, whole.logp_BT)


def test_padding_is_not_filled():
    canvas = Canvas(torch.tensor([[MASK, 3, MASK]]), torch.tensor([[False, True, True]]))
    filled = unmask(Bag(), canvas, UnmaskParams(3), seeds(1))
    assert filled.ids_BT[0, :2].tolist() == [MASK, 3] and int(filled.forwards_B) == 1


def test_tokens_have_the_probabilities_of_the_softmax():
    """Chi-square of two positions filled at the first step, and of a third at the second."""
    model, count = Bag(scale=2.0), 4000
    canvas = canvas_of(masks(3)).rows(torch.zeros(count, dtype=torch.long))
    params = UnmaskParams(1, 0, 0.7)
    filled = unmask(model, canvas, params, torch.arange(count))
    probs_TV = (model.row(canvas.ids_BT[0]).double() / 0.7).softmax(-1)
    for i in (3, 4, 5):
        drawn_V = filled.ids_BT[:, i].bincount(minlength=VOCAB)
        assert chi_square(drawn_V, probs_TV[i]) < 5
    pair = filled.ids_BT[:, 3] * VOCAB + filled.ids_BT[:, 4]
    joint = (probs_TV[3, :, None] * probs_TV[4]).flatten()  # no noise is used twice
    assert chi_square(pair.bincount(minlength=VOCAB**2), joint) < 5


def test_a_second_step_has_noise_of_its_own():
    model, count = Bag(scale=2.0), 3000
    canvas = canvas_of([MASK, 4, MASK]).rows(torch.zeros(count, dtype=torch.long))
    filled = unmask(model, canvas, UnmaskParams(1, 1, 1.0), torch.arange(count))
    probs_V = model.row(torch.tensor([MASK, 4, MASK]))[0].double().softmax(-1)
    joint_VV = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for v in range(VOCAB - 1):
        joint_VV[v] = probs_V[v] * model.row(torch.tensor([v, 4, MASK]))[2].double().softmax(-1)
    pair = filled.ids_BT[:, 0] * VOCAB + filled.ids_BT[:, 2]
    assert chi_square(pair.bincount(minlength=VOCAB**2), joint_VV.flatten()) < 5


def chi_square(observed, probs):
    """Standard deviations above the mean of the chi-square distribution; rare cells are one."""
    expected = probs * int(observed.sum())
    common = expected >= 5
    cells_o = torch.cat([observed[common].double(), observed[~common].sum()[None].double()])
    cells_e = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = cells_e > 0
    statistic = ((cells_o - cells_e)[keep] ** 2 / cells_e[keep]).sum()
    freedom = int(keep.sum()) - 1
    assert freedom >= 2
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


# --- many tokens at a step


def test_a_threshold_lets_sure_tokens_through_and_never_stalls():
    model, canvas = Bag(scale=14.0), canvas_of(masks(12))
    one = unmask(model, canvas, UnmaskParams(99), seeds(1))
    for threshold in (0.3, 0.5, 0.9):
        fast = unmask(model, canvas, UnmaskParams(99, threshold=threshold), seeds(1))
        for step in range(int(fast.forwards_B)):
            at_step = fast.confidence_BT[0][fast.step_BT[0] == step]
            assert len(at_step) == 1 or bool((at_step >= threshold).all())
        assert int(fast.forwards_B) <= int(one.forwards_B)
    everything = unmask(model, canvas, UnmaskParams(99, threshold=1e-9), seeds(1))
    assert everything.forwards_B.tolist() == [1]
    nothing = unmask(model, canvas, UnmaskParams(99, threshold=1.0), seeds(1))
    assert torch.equal(nothing.step_BT, one.step_BT)


def test_a_quota_is_the_least_that_a_threshold_gives():
    filled = unmask(Bag(), canvas_of(masks(12)), UnmaskParams(4, threshold=1.0), seeds(1))
    assert filled.step_BT[0, 3:].bincount().tolist() == [3, 3, 3, 3]


# --- the end of a text


def likes_eos(block=0):
    model = Bag(block_size=block)
    model.table[..., EOS] += 6
    return model


def test_end_tokens_can_be_made_to_wait():
    model, canvas = likes_eos(), canvas_of(masks(8))
    params = UnmaskParams(99, eos_ids=(EOS,))
    competing = unmask(model, canvas, params, seeds(1))
    assert int(competing.ids_BT[0][competing.step_BT[0] == 0]) == EOS
    waiting = unmask(model, canvas, replace(params, eos_confidence=False), seeds(1))
    likeliest_T = model.row(canvas.ids_BT[0])[3:].argmax(-1)
    assert 0 < int((likeliest_T == EOS).sum()) < 8  # there is something to wait for
    first = int(waiting.step_BT[0].tolist().index(0))
    assert int(waiting.ids_BT[0, first]) == int(likeliest_T[first - 3]) != EOS
    # Where nothing else is wanted, it is not held up.
    model.table[..., EOS] += 100
    ends = unmask(model, canvas, replace(params, eos_confidence=False, threshold=0.5), seeds(1))
    assert set(ends.ids_BT[0, 3:].tolist()) == {EOS} and int(ends.forwards_B) == 8


def test_after_a_block_with_an_end_the_rest_is_filled_without_the_model():
    model, canvas = likes_eos(), canvas_of(masks(12), masks(12, [5]))
    params = UnmaskParams(99, 4, eos_ids=(EOS,))
    whole = unmask(model, canvas, params, seeds(1, 2), start=3)
    early = unmask(model, canvas, replace(params, eos_early_stop=True), seeds(1, 2), start=3)
    assert whole.forwards_B.tolist() == [12, 12]
    for b in range(2):
        block = int((early.ids_BT[b, 3:] == EOS).nonzero()[0]) // 4
        stop = 3 + 4 * (block + 1)
        assert int(early.forwards_B[b]) == 4 * (block + 1) < 12
        assert torch.equal(early.ids_BT[b, :stop], whole.ids_BT[b, :stop])
        assert set(early.ids_BT[b, stop:].tolist()) == {EOS}
        assert set(early.step_BT[b, stop:].tolist()) == {-1}
        assert float(early.logp_BT[b, stop:].abs().sum()) == 0


def test_an_end_token_of_the_prompt_ends_nothing():
    canvas = canvas_of([EOS, 3, *[MASK] * 8])
    params = UnmaskParams(99, 4, suppress_ids=(EOS,), eos_ids=(EOS,), eos_early_stop=True)
    assert unmask(Bag(), canvas, params, seeds(1), start=2).forwards_B.tolist() == [8]


# --- guidance, editing


def test_guidance_moves_the_logits_away_from_those_without_the_prompt():
    model, scale = Bag(), 1.5
    canvas = canvas_of(masks(4))
    filled = unmask(model, canvas, UnmaskParams(1, 0, 1.0, cfg_scale=scale), seeds(3))
    cond = model.row(canvas.ids_BT[0])[3:]
    bare = model.row(torch.full_like(canvas.ids_BT[0], MASK))[3:]
    guided = (bare + (scale + 1) * (cond - bare))[:, :-1].double().log_softmax(-1)
    expected = guided.gather(-1, filled.ids_BT[0, 3:, None])[:, 0].float()
    torch.testing.assert_close(filled.logp_BT[0, 3:], expected)
    assert model.calls == [1, 1]


class Fickle(Bag):
    """Wants token 2 everywhere, and once a 2 is there token 3, surely."""

    def row(self, ids_R):
        logits_RV = torch.zeros(len(ids_R), VOCAB)
        logits_RV[:, 2] = 1.0
        if (ids_R == 2).any():
            logits_RV[:, 3] = 9.0
        logits_RV[:, MASK] = -torch.inf
        return logits_RV


def test_decided_tokens_of_the_block_yield_to_surer_ones():
    canvas = canvas_of([2 + 7, MASK, MASK, MASK, MASK])
    plain = unmask(Fickle(), canvas, UnmaskParams(2), seeds(1))
    assert plain.ids_BT[0].tolist() == [9, 2, 2, 3, 3]
    edited = unmask(Fickle(), canvas, UnmaskParams(2, edit_threshold=0.9), seeds(1))
    assert edited.ids_BT[0].tolist() == [9, 3, 3, 3, 3]
    assert edited.step_BT[0].tolist() == [-1, 1, 1, 1, 1]
    # Two steps fill it; the third finds nothing to edit.
    assert edited.forwards_B.tolist() == [3]
    high = unmask(Fickle(), canvas, UnmaskParams(2, edit_threshold=0.9999), seeds(1))
    assert high.ids_BT[0].tolist() == plain.ids_BT[0].tolist()


class Restless(Bag):
    """Wants every token to be the next one."""

    def row(self, ids_R):
        logits_RV = torch.full((len(ids_R), VOCAB), -20.0)
        logits_RV[torch.arange(len(ids_R)), (ids_R + 1) % (VOCAB - 1)] = 20.0
        logits_RV[:, MASK] = -torch.inf
        return logits_RV


def test_editing_ends():
    canvas = canvas_of([4, 5, MASK, MASK, MASK, MASK])
    params = UnmaskParams(2, 2, edit_threshold=0.5)
    filled = unmask(Restless(), canvas, params, seeds(1), start=2)
    assert filled.forwards_B.tolist() == [2 * (2 + MAX_EDIT_STEPS)]
    assert filled.ids_BT[0, :2].tolist() == [4, 5]  # the prompt is not edited


# --- real networks, and what is refused


def test_rows_of_a_transformer_do_not_see_their_company():
    lm = masked_llama()
    rows = [masks(9), masks(9, [5]), masks(9, [2, 2, 3, 4, 5, 6, 7])]
    params = UnmaskParams(2, 4, 1.0, threshold=0.8)
    filled = unmask(lm, canvas_of(*rows), params, seeds(1, 2, 3), start=7)
    for b, row in enumerate(rows):
        alone = unmask(lm, canvas_of(row), params, seeds(1 + b), start=len(row) - 9)
        assert torch.equal(alone.ids_BT[0], filled.ids_BT[b, -len(row) :])
        torch.testing.assert_close(alone.logp_BT[0], filled.logp_BT[b, -len(row) :])
    assert not any(p.grad is not None for p in lm.parameters())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature):
    model = Bag()
    model.table[3] = torch.nan
    with pytest.raises(EngineError, match=r"not finite.*learning rate"):
        unmask(model, canvas_of(masks(4)), UnmaskParams(2, 0, temperature), seeds(1))


def test_settings_that_make_no_sense_are_refused():
    canvas = canvas_of(masks(4))
    for params, message in (
        (UnmaskParams(0), "steps is 0"),
        (UnmaskParams(1, order="best"), "'best'.*low_confidence"),
        (UnmaskParams(1, order="entropy", threshold=0.5), "order=entropy.*topk_margin"),
        (UnmaskParams(1, order="random", factor=0.5), "order=random.*topk_margin"),
        (UnmaskParams(1, alg_temp=0.5), "alg_temp.*order=low_confidence"),
        (UnmaskParams(1, order="topk_margin", alg_temp=0.5, threshold=0.5), "alg_temp.*threshold"),
        (UnmaskParams(1, order="origin", eos_confidence=False), "order=origin"),
    ):
        with pytest.raises(EngineError, match=message):
            unmask(Bag(), canvas, params, seeds(1))
    with pytest.raises(EngineError, match=r"block_size 3.*4"):
        unmask(Bag(block_size=4), canvas, UnmaskParams(1, 3), seeds(1))
