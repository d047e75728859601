import asyncio
import threading
import time

import pytest

from rlalign.rewards import inprocess
from rlalign.rewards.inprocess import InProcess
from rlalign.rewards.verdict import RewardError, VerdictKind
from tests.rewards.rows import call


def test_a_callable_that_hangs_stops_the_run_and_names_the_way_out(monkeypatch):
    monkeypatch.setattr(inprocess, "GRACE_S", 0.0)
    release = threading.Event()

    def stuck(completions):
        release.wait(10)

    try:
        with pytest.raises(RewardError, match=r"'stuck' was still running.*import path"):
            InProcess("stuck", stuck).score(call("a"), 0.1)
    finally:
        release.set()


def test_a_coroutine_that_hangs_is_cancelled_and_only_masks():
    cancelled = threading.Event()

    async def slow(completions):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    start = time.monotonic()
    verdicts = InProcess("slow", slow).score(call("a", "b"), 0.1)
    assert [v.kind for v in verdicts] == [VerdictKind.TIMEOUT] * 2
    assert cancelled.is_set()
    assert time.monotonic() - start < 5


def test_the_callable_sees_python_objects_as_they_are():
    thing = object()

    def same(completions, thing):
        return [float(thing[0] is marker) for marker in [expected]]

    expected = thing
    assert InProcess("same", same).score(call("a", thing=[thing]), 5)[0].value == 1.0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callable_that_leaves_its_thread_is_a_crash_at_once():
    def leave(completions):
        raise SystemExit

    start = time.monotonic()
    assert InProcess("leave", leave).score(call("a"), 30)[0].kind is VerdictKind.CRASH
    assert time.monotonic() - start < 10


def test_looking_at_a_callable_does_not_close_it():
    class Service:
        open = True

        def __call__(self, completions):
            return [1.0] * len(completions)

        def close(self):
            self.open = False

    service = Service()
    looked_at = InProcess("service", service)
    looked_at.inspect()
    looked_at.close()
    assert service.open
    used = InProcess("service", service)
    used.start()
    used.close()
    assert not service.open
