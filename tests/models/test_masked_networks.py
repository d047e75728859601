"""Encoders of many families: their positions, what enters their output matrix, and where a row may
be padded, each against the model's own forward pass."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel

from rlalign.models.errors import ModelError
from rlalign.models.masked_networks import Decoder, Encoder, evaluating
from rlalign.models.random import init_model, small_config

SHAPE = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=48, max_position_embeddings=24, initializer_range=0.2)  # fmt: skip
EXTRAS = {
    "distilbert": dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "electra": dict(embedding_size=16),
    "albert": dict(embedding_size=16),
    "mobilebert": dict(embedding_size=16, intra_bottleneck_size=32, true_hidden_size=32),
    "modernbert": dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    | {"pad_token_id": 0},
    "fnet": {},
}
IDS = torch.tensor([[5, 9, 30, 11, 22, 6], [8, 31, 7, 7, 12, 19]])


def make(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SHAPE | EXTRAS.get(kind, {})))
    return AutoModelForMaskedLM.from_config(config).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "distilbert", "electra", "albert", "modernbert"]
)
def test_what_enters_the_output_matrix_gives_the_models_own_logits(kind):
    model = make(kind)
    encoder = Encoder(model)
    assert encoder.linear and encoder.sides == ["left", "right"]
    logits = model.get_output_embeddings()(encoder.states(IDS, None))
    torch.testing.assert_close(logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 0


@torch.no_grad()
def test_positions_are_counted_as_the_family_counts():
    assert Encoder(make("bert")).first_position == 0
    roberta = make("roberta")
    assert Encoder(roberta).first_position == 2  # behind the padding token 1
    ids = IDS.clone()
    ids[0, 2] = 1  # the padding token as an ordinary one: it has a position as any other
    states = Encoder(roberta).states(ids, torch.ones_like(ids, dtype=torch.bool))
    position_ids = torch.arange(2, 8)[None].expand(2, -1)
    own = roberta(ids, position_ids=position_ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(roberta.get_output_embeddings()(states), own, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_head_of_another_form_gives_its_own_logits():
    model = make("mobilebert")  # its matrix is two, side by side
    encoder = Encoder(model)
    assert not encoder.linear
    assert torch.equal(encoder.states(IDS, None), model(IDS).logits)


@torch.no_grad()
def test_something_behind_the_output_matrix_gives_its_own_logits():
    class Capped(BertForMaskedLM):
        def forward(self, input_ids, position_ids=None, attention_mask=None):
            out = super().forward(input_ids, attention_mask, position_ids=position_ids)
            out.logits = out.logits.tanh()
            return out

    encoder = Encoder(Capped(BertConfig(**SHAPE)).eval())
    assert not encoder.linear
    assert encoder.states(IDS, None).abs().max() <= 1


@pytest.mark.parametrize("kind", ["mobilebert", "fnet"])  # they read neighbours, or know no padding
def test_padding_that_would_be_read_is_refused(kind):
    encoder = Encoder(make(kind))
    assert encoder.sides == []
    real = torch.ones_like(IDS, dtype=torch.bool)
    assert encoder.states(IDS, real).shape[:2] == IDS.shape
    for side, column in (("left", 0), ("right", -1)):
        padded = real.clone()
        padded[1, column] = False
        with pytest.raises(ModelError, match=f"padded on the {side} otherwise than alone"):
            encoder.states(IDS, padded)


def test_a_model_without_a_language_head_is_refused():
    with pytest.raises(ModelError, match="BertModel gives no logits"):
        Encoder(BertModel(BertConfig(**SHAPE)))


def test_a_causal_model_is_refused():
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="BertForMaskedLM is causal"):
        Encoder(BertForMaskedLM(BertConfig(**SHAPE, is_decoder=True)))


def test_a_hook_is_gone_after_an_error():
    model = make("bert")
    encoder = Encoder(model)
    with pytest.raises(IndexError):
        encoder.states(torch.tensor([[99]]), None)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 0


def test_a_decoder_with_a_window_is_refused():
    shape = dict(vocab=20, hidden=16, layers=2, heads=2, kv_heads=2, mlp=16, max_positions=32)
    window = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    model = init_model(small_config("qwen2", tied=True, **shape, **window), 0)
    with pytest.raises(ModelError, match="window of 4 tokens"):
        Decoder(model, 0)


def test_evaluation_mode_for_a_while():
    model = nn.Sequential(nn.Dropout())
    with pytest.raises(ValueError), evaluating(model):
        assert not model[0].training
        raise ValueError
    assert model[0].training
