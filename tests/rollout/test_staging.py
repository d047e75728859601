"""Weights arrive whole or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlalign.rollout.digest import digest_of
from rlalign.rollout.engine import EngineError
from rlalign.rollout.staging import WeightStage


def tied_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "mid": nn.Linear(4, 4)})
    model["head"] = nn.Linear(4, 7, bias=False)
    model["head"].weight = model["embed"].weight
    return model


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in tied_model(seed).named_parameters()}


def new_stage(dtype: torch.dtype = torch.float32) -> WeightStage:
    return WeightStage(tied_model(0), dtype)


def test_tensors_may_be_overwritten_as_soon_as_the_next_one_is_asked_for():
    """As when a sharded trainer gathers one parameter at a time into one buffer."""
    sent = weights(1)

    def stream():
        buffer = torch.empty(100)
        for name, tensor in sent.items():
            view = buffer[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            yield name, view
            buffer.fill_(torch.nan)

    stage = new_stage()
    assert stage.receive(stream()) == digest_of(sent)
    assert stage.arrived.keys() == sent.keys()
    assert all(torch.equal(stage.arrived[name], sent[name]) for name in sent)


def test_what_is_in_use_outlives_the_next_arrival_whether_good_or_bad():
    stage = new_stage()
    assert stage.in_use is None
    for seed in (1, 2, 3):
        stage.receive(weights(seed).items())
        stage.commit()
        with pytest.raises(EngineError, match="not sent"):
            stage.receive(list(weights(99).items())[:1])
        assert stage.in_use is not None
        assert all(torch.equal(stage.in_use[n], t) for n, t in weights(seed).items())


def test_copies_are_kept_in_the_engines_dtype_and_the_digest_is_of_what_came():
    stage, sent = new_stage(torch.bfloat16), weights(1)
    assert stage.receive(sent.items()) == digest_of(sent)
    assert all(torch.equal(stage.arrived[n], t.bfloat16()) for n, t in sent.items())


def test_a_tied_weight_may_come_under_any_of_its_names_but_not_with_two_values():
    sent = weights(1)
    both = {**sent, "head.weight": sent["embed.weight"]}
    other = {("head.weight" if n == "embed.weight" else n): t for n, t in sent.items()}
    for accepted in (sent, both, other):
        stage = new_stage()
        stage.receive(accepted.items())
        assert stage.arrived.keys() == sent.keys()
        assert torch.equal(stage.arrived["embed.weight"], sent["embed.weight"])
    with pytest.raises(EngineError, match="tied"):
        new_stage().receive({**sent, "head.weight": sent["embed.weight"] + 1e-6}.items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(value: float):
    sent = {name: tensor.clone() for name, tensor in weights(1).items()}
    sent["mid.weight"][2, 1] = value
    with pytest.raises(EngineError, match=r"1 of 16 values of mid\.weight are not finite"):
        new_stage().receive(sent.items())


def test_other_weights_are_refused_by_name():
    sent = weights(1)
    with pytest.raises(EngineError, match=r"mid\.bias.*\(5,\).*\(4,\)"):
        new_stage().receive({**sent, "mid.bias": torch.zeros(5)}.items())
    with pytest.raises(EngineError, match="'tail' is not one"):
        new_stage().receive({**sent, "tail": torch.zeros(5)}.items())
    with pytest.raises(EngineError, match="twice"):
        new_stage().receive([*sent.items(), ("mid.bias", sent["mid.bias"])])
