"""A channel between threads of one process."""

import socket
import time

import pytest

from rlalign.channel import Channel


def test_a_channel_that_is_closed_while_it_waits_says_that_it_ended():
    """As the close of another thread leaves it: the deadline is armed, the descriptor gone."""
    one, other = socket.socketpair()
    channel = Channel(one)
    arm = channel._arm

    def arm_then_lose(deadline):
        arm(deadline)
        one.close()

    channel._arm = arm_then_lose
    with pytest.raises(EOFError, match="was closed"):
        channel.receive(time.monotonic() + 5)
    other.close()


def test_messages_arrive_whole_and_in_order():
    one, other = map(Channel, socket.socketpair())
    for number in range(3):
        one.send({"number": number, "text": "x" * 5000})
    assert [other.receive(time.monotonic() + 5)["number"] for _ in range(3)] == [0, 1, 2]
    one.close()
    with pytest.raises(EOFError, match="closed the connection"):
        other.receive(time.monotonic() + 5)
    other.close()
