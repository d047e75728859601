import subprocess
import sys
import time

import psutil
import pytest

from rlalign.rewards.verdict import RewardError, VerdictKind
from rlalign.rewards.worker import Target, WorkerPool
from tests.rewards.rows import call

ROWWISE = """
import os, signal, sys, time

def reward(completions, **columns):
    text = completions[0]
    if text == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        time.sleep(60)
    if text == "die":
        os._exit(7)
    if text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "memory":
        bytearray(1 << 40)
    if text == "print":
        print("hello from the reward", flush=True)
    return [float(text) if text.isdigit() else 0.0]

def pid(completions):
    return [float(os.getpid())] * len(completions)

def has_torch(completions):
    return ["torch" in sys.modules] * len(completions)

def hang(completions):
    time.sleep(60)

async def gathered(completions):
    import asyncio
    await asyncio.gather(*(asyncio.sleep(0.5) for _ in completions))
    return [1.0] * len(completions)
"""


@pytest.fixture
def pool(module):
    name = module(ROWWISE)
    pools = []

    def build(function="reward", **options):
        options = {"rowwise": function == "reward", "row_timeout_s": 1.0, **options}
        if not options["rowwise"]:
            options["row_timeout_s"] = None
        pools.append(WorkerPool(Target(function, f"{name}:{function}", **options)))
        pools[-1].start()
        return pools[-1]

    yield build
    for one in pools:
        one.close()


def test_order_is_kept_over_several_workers(pool):
    texts = [str(i) for i in range(100)]
    verdicts = pool(num_workers=3).score(call(*texts), 20)
    assert [v.value for v in verdicts] == [float(i) for i in range(100)]


def test_a_row_at_fault_costs_only_itself(pool):
    texts = ["1", "hang", "2", "die", "3", "segfault", "4", "killed", "5", "memory", "6"]
    verdicts = pool(max_memory_bytes=1 << 31).score(call(*texts), 30)
    assert [v.kind.value for v in verdicts] == [
        *("ok", "timeout", "ok", "crash", "ok", "crash", "ok", "oom", "ok", "oom", "ok")
    ]
    assert [v.value for v in verdicts[::2]] == [1, 2, 3, 4, 5, 6]
    assert "exited with code 7" in verdicts[3].detail
    assert "SIGSEGV" in verdicts[5].detail


def test_a_killed_worker_is_replaced_and_the_old_process_is_gone(pool):
    one = pool()
    (before,) = one.pids()
    assert one.score(call("hang"), 5)[0].kind is VerdictKind.TIMEOUT
    assert not psutil.pid_exists(before)
    assert one.score(call("9"), 5)[0].value == 9.0
    assert one.pids() != [before]


def test_a_worker_lives_from_call_to_call(pool):
    one = pool("pid")
    assert one.score(call("a"), 5) == one.score(call("b"), 5)


def test_a_hanging_call_ends_at_its_deadline_for_every_row(pool):
    one = pool("hang")
    start = time.monotonic()
    verdicts = one.score(call("a", "b"), 0.3)
    assert time.monotonic() - start < 5
    assert [v.kind for v in verdicts] == [VerdictKind.TIMEOUT] * 2


def test_rows_not_reached_before_the_deadline_are_timeouts(pool):
    verdicts = pool(row_timeout_s=10).score(call("1", "hang", "2"), 0.5)
    assert [v.kind.value for v in verdicts] == ["ok", "timeout", "timeout"]


def test_an_async_reward_overlaps_its_own_waits(pool):
    one = pool("gathered")
    start = time.monotonic()
    assert [v.value for v in one.score(call(*"abcdefghij"), 10)] == [1.0] * 10
    assert time.monotonic() - start < 4  # ten waits of 0.5 s one after the other take 5 s


def test_workers_do_not_import_torch(pool):
    assert pool("has_torch").score(call("a"), 10)[0].value == 0.0


def test_what_a_reward_prints_is_logged_and_not_mixed_into_its_answer(pool, caplog):
    caplog.set_level("INFO")
    assert pool().score(call("print"), 5)[0].value == 0.0
    assert "hello from the reward" in caplog.text


def test_dates_and_arrays_travel_and_other_objects_are_named(pool):
    import datetime

    import numpy as np

    one = pool()
    plain = call("5", when=[datetime.date(2024, 1, 2)], vector=[np.zeros(2)])
    assert one.score(plain, 5)[0].value == 5.0
    with pytest.raises(RewardError, match=r"cannot travel as JSON.*object"):
        one.score(call("5", odd=[object()]), 5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_library\ndef f(completions): pass", "no module named 'no_such_library'"),
        ("raise RuntimeError('broken at import')", "broken at import"),
        ("import os; os._exit(4)", "exited with code 4"),
        ("f = 3", "is int, not a function"),
    ],
)
def test_a_module_that_cannot_be_built_says_why(module, source, message):
    broken = WorkerPool(Target("f", f"{module(source)}:f"))
    with pytest.raises(RewardError, match=message):
        broken.start()
    assert broken.pids() == []


def test_workers_end_with_a_trainer_killed_by_sigkill(module, tmp_path):
    source = f"""
import sys, time
sys.path.insert(0, {str(tmp_path)!r})
from rlalign.rewards.worker import Target, WorkerPool
pool = WorkerPool(Target("hang", "{module(ROWWISE)}:hang"))
pool.start()
print(pool.pids()[0], flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    worker = psutil.Process(int(trainer.stdout.readline()))
    trainer.kill()
    trainer.wait(10)
    trainer.stdout.close()
    worker.wait(10)  # raises TimeoutExpired when it lives on
