"""`patch_model`: log-probs from an HF model's forward, against the model's own logits."""

from __future__ import annotations

import pytest
import torch

from rlalign.models.errors import ModelError
from rlalign.models.patch import patch_model
from tests.models.test_head import FAMILIES, VOCAB, adapt, make_model

IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_models_logits(family):
    model = make_model(family, **FAMILIES[family]).requires_grad_()
    labels = IDS.clone()
    labels[0, :4] = labels[1, 7:] = -100
    logits = model(IDS).logits[:, :-1] / 0.7
    want = logits.log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    want = torch.where(labels[:, 1:] == -100, 0, want)
    parameters = list(model.parameters())
    want_grads = torch.autograd.grad(want.square().sum(), parameters)
    got = patch_model(model)(IDS, labels=labels, fused_head=True, temperature=0.7)
    assert got.shape == IDS.shape and (got[:, 0] == 0).all()
    torch.testing.assert_close(got[:, 1:].double(), want, atol=1e-9, rtol=0)
    got_grads = torch.autograd.grad(got.square().sum(), parameters)
    for x, y in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-6)


def test_padding_is_masked_as_the_model_masks_it():
    model = patch_model(make_model())
    alone = model(IDS[:1, :5], labels=IDS[:1, :5], fused_head=True)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, :5]], 1)
    mask = (torch.arange(8) >= 3).long()[None]
    inside = model(padded, attention_mask=mask, labels=padded, fused_head=True)
    torch.testing.assert_close(inside[:, 4:], alone[:, 1:])


def test_without_the_flag_the_model_is_as_it_was():
    model = make_model()
    want = model(IDS, labels=IDS)
    got = patch_model(model)(IDS, labels=IDS)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)


def test_an_adapter_on_the_head_counts():
    model = make_model()
    plain = patch_model(model)(IDS, labels=IDS, fused_head=True)
    adapt(model)
    want = model(IDS).logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    got = patch_model(model)(IDS, labels=IDS, fused_head=True)
    torch.testing.assert_close(got[:, 1:], want, atol=1e-9, rtol=0)
    assert (got - plain).abs().max() > 0.1


def test_what_cannot_be_scored_is_named():
    model = patch_model(make_model())
    with pytest.raises(ValueError, match="pass labels"):
        model(IDS, fused_head=True)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 8\)"):
        model(IDS, labels=IDS[:, 1:], fused_head=True)
    odd = make_model()
    body = odd.lm_head.forward
    odd.lm_head.forward = lambda hidden: body(hidden) ** 2
    with pytest.raises(ModelError, match="differ from its own"):
        patch_model(odd)
