"""Which tiles a kernel gets: the device's own, smaller ones where those do not fit, the quickest
where that is asked for."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import OutOfResources

from rlalign.kernels import tiles
from rlalign.kernels.tiles import AMPERE_HALF, HOPPER_HALF, run_with_tiles

MATRIX = torch.zeros(2, 64, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """No GPU is needed to choose for one."""
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "capability", lambda _: 90)
    monkeypatch.setattr(tiles, "_fitting", {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.delenv(tiles.AUTOTUNE_VARIABLE, raising=False)


class Kernel:
    """Fits where `room` says so; remembers its launches."""

    def __init__(self, room):
        self.room, self.launches = room, []

    def __call__(self, candidate):
        self.launches.append(candidate)
        if not self.room(candidate):
            raise OutOfResources(232449, 232448, "shared memory")
        return "result"


def test_the_devices_own_tiles_come_first():
    kernel = Kernel(lambda tiles: True)
    assert run_with_tiles("forward", MATRIX, kernel) == "result"
    assert kernel.launches == [HOPPER_HALF.forward]


def test_tiles_that_do_not_fit_give_way_once():
    kernel = Kernel(lambda tiles: tiles == AMPERE_HALF.backward)
    for _ in range(2):
        assert run_with_tiles("backward", MATRIX, kernel) == "result"
    assert kernel.launches == [HOPPER_HALF.backward, AMPERE_HALF.backward, AMPERE_HALF.backward]


def test_where_none_fit_the_error_says_which_kernel_on_what_and_why():
    kernel = Kernel(lambda tiles: False)
    message = r"fused kernel .* 9.0 .*torch.bfloat16.*backend='torch'"
    with pytest.raises(RuntimeError, match=message) as error:
        run_with_tiles("fused", MATRIX, kernel)
    assert "232449" in str(error.value) and len(kernel.launches) == 2


def test_other_errors_are_not_taken_for_a_lack_of_room():
    def run(_):
        raise torch.OutOfMemoryError("the device is full")

    with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
        run_with_tiles("forward", MATRIX, run)


def test_autotuning_takes_the_quickest_that_fits(monkeypatch):
    monkeypatch.setenv(tiles.AUTOTUNE_VARIABLE, "1")
    quick = HOPPER_HALF.forward._replace(group=8)
    clock = [0.0]
    monkeypatch.setattr(tiles.time, "perf_counter", lambda: clock[0])

    def run(candidate):
        if candidate == AMPERE_HALF.forward:
            raise OutOfResources(1, 0, "shared memory")
        clock[0] += 1.0 if candidate == quick else 2.0
        return candidate

    assert run_with_tiles("forward", MATRIX, run) == quick
    monkeypatch.setattr(tiles, "_seconds", None)  # not measured again
    assert run_with_tiles("forward", MATRIX, run) == quick


def test_a_device_before_ampere_is_refused(monkeypatch):
    monkeypatch.setattr(tiles, "capability", lambda _: 75)
    with pytest.raises(RuntimeError, match=r"need compute capability 8\.0, this device has 7\.5"):
        run_with_tiles("forward", MATRIX, Kernel(lambda tiles: True))
