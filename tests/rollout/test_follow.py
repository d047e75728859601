"""The other processes of a job wait for what the first one sends."""

from __future__ import annotations

import pytest

from rlalign.rollout.channels.follow import FollowChannel
from rlalign.rollout.engine import EngineError


def never(announcement):
    raise AssertionError("a follower announces nothing")


def test_a_follower_goes_through_the_weights_and_waits_for_their_version():
    states = iter([(1, "old"), (2, ""), (2, "new")])  # without a digest, the weights are lost
    seen = []

    def state():
        version, digest = next(states)
        return {"version": version, "digest": digest}

    weights = (seen.append(i) or (str(i), None) for i in range(3))
    receipt = FollowChannel(state, 10.0).send(weights, 2, never)  # type: ignore[arg-type]
    assert receipt == {"version": 2, "digest": "new"}
    assert seen == [0, 1, 2]


def test_a_first_process_that_sends_nothing_is_named_at_the_deadline():
    channel = FollowChannel(lambda: {"version": 1, "digest": "old"}, 0.05)
    with pytest.raises(EngineError, match="waiting for version 2: the server has version 1"):
        channel.send((), 2, never)
