"""Dropout is off in train mode too, in modules and in attention."""

import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, Qwen2Config

from rlalign.models.dropout import without_dropout


def outputs(model):
    ids = torch.arange(12)[None]
    return [model(ids).logits for _ in range(2)]


def test_two_passes_in_train_mode_are_equal():
    shape = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    bert = BertForMaskedLM(BertConfig(**shape, intermediate_size=16)).train()
    config = Qwen2Config(
        **shape, intermediate_size=16, num_key_value_heads=2, attention_dropout=0.5
    )
    qwen = AutoModelForCausalLM.from_config(config).train()
    for model in (bert, qwen):
        assert not torch.equal(*outputs(model))
        assert without_dropout(model) is model
        assert torch.equal(*outputs(model))
        assert model.training
