"""Masked-diffusion models: padding changes nothing, blocks hide what is later, the mask token has
no probability, adapters and caches agree with the plain model.

The reference of log-probs is the softmax, in float64, of logits that the model's own matrices give.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlalign.config.schema import LoraConfig, ModelConfig
from rlalign.models.errors import ModelError
from rlalign.models.lora import attach_lora
from rlalign.models.masked_diffusion import Canvas, MaskedDiffusionLM, logprob_without
from rlalign.models.masked_load import load_masked_lm
from rlalign.models.masked_random import KINDS, write_random_masked

DECODERS = ("llada", "dream", "sdar", "native")
MASK = 262
ROW = [5, MASK, 201, 33, MASK, MASK, 90, 14, MASK]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: str(write_random_masked(tmp_path_factory.mktemp(kind), kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def models(folders):
    return {kind: load_masked_lm(ModelConfig(path=folders[kind])) for kind in KINDS}


def fresh(folders, kind, **options):
    return load_masked_lm(ModelConfig(path=folders[kind], **options))


def padded(left, right, row=ROW):
    ids = torch.tensor([[0] * left + row + [0] * right])
    real = torch.zeros_like(ids, dtype=torch.bool)
    real[:, left : left + len(row)] = True
    return Canvas(ids, real)


def largest(difference):
    finite = difference.detach().nan_to_num(0.0)  # the mask token's is -inf - -inf
    return max([0.0, *finite.abs().flatten().tolist()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_row_gives_what_it_gives_alone(models, kind, attention):
    model = models[kind]
    model.model.set_attn_implementation(attention)
    alone = model.logits(Canvas(torch.tensor([ROW])))[0]
    place = torch.arange(len(ROW))
    target = torch.arange(20, 20 + len(ROW))
    logp = model.logp(Canvas(torch.tensor([ROW])), 0 * place, place, target, 0.7)
    for left, right in ((3, 0), (0, 4), (2, 1)):
        other = padded(left, right, row=[8, 9, 10])
        wide = padded(left, right)
        canvas = Canvas(  # beside a shorter row, padded differently
            torch.cat([wide.ids_BT, nn.functional.pad(other.ids_BT, (6, 0))]),
            torch.cat([wide.real_BT, nn.functional.pad(other.real_BT, (6, 0))]),
        )
        logits = model.logits(canvas, left, left + len(ROW))[0]
        assert largest(logits - alone) < 2e-5
        shifted = model.logp(canvas, 0 * place, place + left, target, 0.7)
        torch.testing.assert_close(shifted, logp, atol=2e-5, rtol=1e-5)
    model.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_between_prompt_and_answer_counts_no_positions(models, kind):
    ids = torch.tensor([[*ROW[:3], 0, 0, *ROW[3:]]])
    real = torch.ones_like(ids, dtype=torch.bool)
    real[:, 3:5] = False
    logits = models[kind].logits(Canvas(ids, real))[0]
    alone = models[kind].logits(Canvas(torch.tensor([ROW])))[0]
    assert largest(torch.cat([logits[:3], logits[5:]]) - alone) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_some_columns_are_those_of_all(models, kind):
    canvas = padded(2, 1)
    whole = models[kind].logits(canvas)
    assert torch.equal(models[kind].logits(canvas, 4, 7), whole[:, 4:7])
    assert (whole[..., MASK] == -math.inf).all()
    assert whole.dtype == torch.float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [0, 3])
def test_a_change_in_a_block_reaches_that_and_later_ones_only(models, attention, left):
    """Blocks of 4 counted from the row's first token: 0-3, 4-7, 8."""
    model = models["sdar"]
    model.model.set_attn_implementation(attention)
    before = model.logits(padded(left, 0))[0, left:]
    for changed in range(len(ROW)):
        row = ROW.copy()
        row[changed] = 111
        moved = (model.logits(padded(left, 0, row))[0, left:] - before).nan_to_num(0).abs().amax(-1)
        first = 4 * (changed // 4)
        assert (moved[:first] == 0).all()
        assert (moved[first:] > 1e-4).all()
    model.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", ["llada", "dream", "native", "bert", "modernbert"])
def test_without_blocks_a_change_reaches_every_position(models, kind):
    before = models[kind].logits(Canvas(torch.tensor([ROW])))[0]
    after = models[kind].logits(Canvas(torch.tensor([[*ROW[:-1], 111]])))[0]
    assert ((after - before).nan_to_num(0).abs().amax(-1) > 1e-4).all()


def eager_logp(hidden, weight, bias, target, temperature, scale=1.0):
    z = (hidden.double() @ weight.double().T + bias.double()) * scale / temperature
    keep = [v for v in range(len(weight)) if v != 3]  # token 3 is left out of the sum
    return z.gather(1, target[:, None])[:, 0] - z[:, keep].logsumexp(1)


@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("p_mask", [0.001, 0.5, 0.999, 1 - 1e-7])
def test_log_probs_without_the_mask_token_are_exact_however_likely_it_is(backend, p_mask):
    """Value and gradient against float64. 1 - p_mask from rounded numbers would be wrong in the
    third digit at .999 already and nothing at all beyond."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*n, generator=generator) for n in ((6, 8), (11, 8)))
    bias = torch.zeros(11)
    z = hidden @ weight.T
    z[:, 3] = -math.inf
    others = z.logsumexp(1).mean()
    weight[3] = 0.01 * weight[3]
    bias[3] = others + math.log(p_mask / (1 - p_mask))
    target = torch.tensor([0, 1, 2, 4, 9, 10])
    upstream = torch.randn(6, generator=generator)
    results = []
    for function in ("ours", "reference"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        h, w, b = leaves
        if function == "ours":
            logp = logprob_without(3, h, w, target, bias=b, temperature=0.8, backend=backend)
        else:
            logp = eager_logp(h, w, b, target, 0.8)
        (logp * upstream.to(logp.dtype)).sum().backward()
        results.append((logp.detach(), *(x.grad for x in leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), atol=2e-6, rtol=1e-6)
    assert (results[0][2][3] == 0).all() and results[0][3][3] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_logp_and_its_gradient_are_those_of_the_logits(folders, kind):
    model = fresh(folders, kind)
    canvas = padded(2, 1)
    row, column = torch.tensor([0, 0, 0, 0]), torch.tensor([2, 3, 6, 10])
    target = torch.tensor([8, 50, 201, 17])
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    model.double()
    (model.logp(canvas, row, column, target, 0.9) * weight).sum().backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model.logits(canvas)[row, column].double() / 0.9
    expected = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(
        model.logp(canvas, row, column, target, 0.9).double(), expected, atol=1e-5, rtol=1e-6
    )
    (expected * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == grads.keys() and len(grads) > 10
    for name, grad in grads.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-5, rtol=1e-4)


def test_no_places_cost_no_error_and_reach_the_graph(models):
    none = torch.zeros(0, dtype=torch.long)
    logp = models["llada"].logp(Canvas(torch.tensor([ROW])), none, none, none, 1.0)
    assert logp.shape == (0,) and logp.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_train_mode_is_not_random_and_checkpointing_changes_no_gradient(folders, kind):
    canvas = padded(2, 0)
    place, target = torch.tensor([3, 6]), torch.tensor([8, 9])
    grads, runs = [], []
    for recompute in (False, True):
        model, count = fresh(folders, kind).train(), []
        if recompute:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        linear = next(m for m in layers[0].modules() if isinstance(m, nn.Linear))
        linear.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model.logp(canvas, 0 * place, place, target, 1.0).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        runs.append(len(count))
    assert runs == [1, 2]
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def trained(model, targets="all-linear"):
    """With adapters that do something."""
    model.attach_lora(LoraConfig(rank=2, alpha=8, target_modules=targets), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_and_are_saved_merged(folders, kind, tmp_path):
    model = fresh(folders, kind)
    canvas = padded(2, 0)
    base = model.logits(canvas).detach()
    trained(model)
    adapted = model.logits(canvas)
    assert largest(adapted - base) > 0.05
    place = torch.tensor([3, 6])
    logp = model.logp(canvas, 0 * place, place, torch.tensor([8, 9]), 1.0)
    logp.sum().backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None]
    assert moved and all(".lora_" in name for name in moved)
    model.save_pretrained(tmp_path)
    again = load_masked_lm(ModelConfig(path=str(tmp_path)))
    assert largest(again.logits(canvas) - adapted) < 5e-5
    assert largest(model.logits(canvas) - adapted) == 0  # the model itself stays as it was


@pytest.mark.parametrize("kind", ["llada", "modernbert"])
def test_an_adapter_on_the_head_is_followed_or_refused(folders, kind, tmp_path):
    targets = {"llada": r".*(lm_head|q_proj)", "modernbert": r".*(decoder|Wqkv)"}[kind]
    canvas, place, target = padded(2, 0), torch.tensor([3, 6]), torch.tensor([8, 9])
    model = trained(fresh(folders, kind), targets)
    logp = model.logp(canvas, 0 * place, place, target, 1.0)
    expected = model.logits(canvas)[0, place].log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = load_masked_lm(ModelConfig(path=str(tmp_path)))
    torch.testing.assert_close(again.logp(canvas, 0 * place, place, target, 1.0), logp)

    behind = fresh(folders, kind)
    attach_lora(behind.model, LoraConfig(rank=2, alpha=8, target_modules=targets), 0)
    with pytest.raises(ModelError, match=r"MaskedDiffusionLM\.attach_lora"):
        behind.logp(canvas, 0 * place, place, target, 1.0)


RAGGED = st.lists(st.integers(0, 5), min_size=1, max_size=3)  # padding of rows of 13 columns


def ragged(lefts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, MASK, (len(lefts), 13), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.4
    real = torch.arange(13) >= torch.tensor(lefts)[:, None]
    return Canvas(torch.where(masked, MASK, ids), real)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@settings(max_examples=25, deadline=None)
@given(lefts=RAGGED, stop=st.integers(0, 12), width=st.integers(1, 6))
def test_cached_logits_by_blocks_are_exact_where_the_prefix_stays(
    models, attention, lefts, stop, width
):
    """Whatever is written from `stop` on after the prefill, and with rows chosen anew."""
    model = models["sdar"]
    model.model.set_attn_implementation(attention)
    before, after = ragged(lefts), ragged(lefts, seed=1)
    kv = model.prefill(before, stop)
    assert stop - 4 < len(kv) <= stop
    ids = torch.cat([before.ids_BT[:, :stop], after.ids_BT[:, stop:]], 1)
    canvas = before.with_ids(ids)
    end = min(13, stop + width)

    def error(canvas, kv, start, stop):  # what padding says is nobody's business
        difference = model.logits_cached(canvas, kv, start, stop) - model.logits(
            canvas, start, stop
        )
        return largest(difference[canvas.real_BT[:, start:stop]])

    assert error(canvas, kv, stop, end) < 1e-5
    order = torch.arange(len(lefts)).flip(0)
    assert error(canvas.rows(order), kv.rows(order), stop, end) < 1e-5
    longer = model.prefill(canvas, end, kv)
    assert len(longer) == len(model.prefill(canvas, end)) >= len(kv)
    assert end == 13 or error(canvas, longer, end, 13) < 1e-5
    model.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", ["llada", "dream", "native"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lefts", [None, [0, 4, 2]])
def test_cached_logits_of_an_unchanged_canvas_are_exact_with_full_attention(
    models, kind, attention, lefts
):
    model = models[kind]
    model.model.set_attn_implementation(attention)
    canvas = ragged(lefts or [0, 0])
    canvas = canvas if lefts else Canvas(canvas.ids_BT)
    for stop in (0, 1, 5, 12):
        kv = model.prefill(canvas, stop)
        assert len(kv) == stop
        for start, end in ((stop, 13), (stop, stop + 1), (max(0, stop - 2), 13)):
            actual = model.logits_cached(canvas, kv, start, end)
            assert largest(actual - model.logits(canvas, start, end)) < 1e-5
            assert not actual.requires_grad
    model.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_a_cache_with_full_attention_is_stale_in_the_prefix_and_fresh_behind(models, kind):
    """What the prefix holds is of the canvas that filled it; a token changed behind it shows in the
    cached columns' logits only through the columns that are run."""
    model = models[kind]
    before, after = ragged([0, 0]), ragged([0, 0], seed=1)
    canvas = before.with_ids(torch.cat([before.ids_BT[:, :6], after.ids_BT[:, 6:]], 1))
    stale = model.logits_cached(canvas, model.prefill(before, 6), 6)
    exact = model.logits(canvas, 6)
    assert largest(stale - exact) > 1e-3
    assert largest(model.logits_cached(canvas, model.prefill(canvas, 6), 6) - exact) < 1e-5


def test_a_prefill_under_checkpointing_in_train_mode_keeps_keys(folders):
    model = fresh(folders, "native").train()
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    canvas = ragged([0, 3])
    kv = model.prefill(canvas, 6)
    assert largest(model.logits_cached(canvas, kv, 6) - model.logits(canvas, 6)) < 1e-5
    assert model.model.training


def test_a_cached_step_runs_only_the_columns_it_needs(models):
    model, seen = models["sdar"], []
    embedding = model.model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    canvas = Canvas(ragged([0, 0]).ids_BT)
    kv = model.prefill(canvas, 8)
    model.logits_cached(canvas, kv, 8, 10)
    model.prefill(canvas, 12, kv)
    handle.remove()
    assert seen == [8, 4, 4]  # the prefix, the block of columns 8 and 9, the block


def test_what_cannot_be_run_is_refused(folders, models):
    with pytest.raises(ModelError, match="BertForMaskedLM keeps no keys and values"):
        models["bert"].prefill(Canvas(torch.tensor([ROW])), 3)
    with pytest.raises(ModelError, match="BertForMaskedLM cannot attend by blocks of 4"):
        MaskedDiffusionLM(models["bert"].model, MASK, block_size=4)
    for mask_id in (263, -1):
        with pytest.raises(ModelError, match=f"mask token {mask_id} is not in the vocabulary"):
            MaskedDiffusionLM(models["llada"].model, mask_id)


def test_rows_of_a_canvas():
    canvas = Canvas(torch.arange(6).view(3, 2), torch.ones(3, 2) > 0, {"x": torch.arange(3)})
    rows = canvas.rows(torch.tensor([2, 2, 0]))
    assert rows.ids_BT.tolist() == [[4, 5], [4, 5], [0, 1]] and len(rows) == 3
    assert rows.cond is not None and rows.cond["x"].tolist() == [2, 2, 0]
    assert rows.real_BT is not None and rows.real_BT.shape == (3, 2)
    assert torch.equal(rows.with_ids(torch.zeros(3, 2)).ids_BT, torch.zeros(3, 2))
