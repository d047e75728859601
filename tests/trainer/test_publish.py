"""A weight update that did not arrive whole, or is not used, ends the run with both figures."""

import pytest
import torch

from rlalign.rollout.digest import WeightDigest
from rlalign.rollout.engine import Capabilities
from rlalign.trainer.publish import WeightSyncError, check_engine, publish
from rlalign.types import PolicyVersion


class Receiver:
    """Takes weights as an engine does; `spoil` changes what arrives, `late` keeps the version."""

    capabilities = Capabilities(False, False, False, adapter_only=True)

    def __init__(self, spoil=lambda name, tensor: tensor, late=0):
        self.spoil, self.late = spoil, late
        self.version = PolicyVersion(0, "")

    def update_weights(self, parameters, version):
        digest = WeightDigest()
        for name, tensor in parameters:
            digest.add(name, self.spoil(name, tensor))
        self.version = PolicyVersion(version - self.late, digest.hexdigest())
        return self.version

    def score(self, sequences):
        return [torch.zeros(len(sequence) - 1) for sequence in sequences]


WEIGHTS = [("a", torch.arange(6.0)), ("b", torch.ones(2, 3))]


def test_a_faithful_engine_returns_its_receipt():
    assert publish(Receiver(), WEIGHTS, 7).version == 7


def one_bit(name, tensor):
    tensor = tensor.clone()
    tensor.view(torch.int32).view(-1)[0] ^= 1
    return tensor


def test_one_flipped_bit_is_noticed():
    with pytest.raises(WeightSyncError, match="digest"):
        publish(Receiver(spoil=one_bit), WEIGHTS, 7)


def test_an_engine_that_keeps_the_old_version_is_noticed():
    with pytest.raises(WeightSyncError, match="holds version 6"):
        publish(Receiver(late=1), WEIGHTS, 7)


def test_weights_that_arrive_and_are_not_used_are_noticed():
    engine = Receiver()
    engine.version = PolicyVersion(3, "x")
    assert check_engine(engine, (1, 2, 3), torch.tensor([0.0, 1e-4]), 1e-3) == pytest.approx(1e-4)
    with pytest.raises(WeightSyncError, match=r"version 3 .* 0\.5 nats.*the very one this run"):
        check_engine(engine, (1, 2, 3), torch.tensor([0.0, 0.5]), 1e-3)


def test_a_difference_that_is_not_a_number_does_not_pass():
    with pytest.raises(WeightSyncError, match="nan"):
        check_engine(Receiver(), (1, 2, 3), torch.tensor([0.0, float("nan")]), 1e-3)
