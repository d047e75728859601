import math

import numpy as np
import pytest
import torch

from rlalign.rewards.verdict import Verdict, VerdictKind, read_output, read_value


@pytest.mark.parametrize(
    "output", [[1, 0.5], (1, 0.5), np.array([1, 0.5]), torch.tensor([1, 0.5]), [True, 0.5]]
)
def test_every_usual_container_reads_as_the_same_numbers(output):
    assert [v.value for v in read_output(output, 2)] == [1.0, 0.5]


@pytest.mark.parametrize("number", [np.float32(0.25), torch.tensor(0.25), np.int64(0) + 0.25])
def test_scalars_of_libraries_are_numbers(number):
    assert read_value(number) == Verdict(VerdictKind.OK, 0.25)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1.0", [1.0], {}, 1j])
def test_what_is_no_finite_number_is_invalid_and_named(value):
    verdict = read_value(value)
    assert verdict.kind is VerdictKind.INVALID
    assert verdict.value is None
    assert "expected" in verdict.detail


def test_none_does_not_apply_and_is_not_a_failure():
    verdict = read_value(None)
    assert not verdict.failed
    assert verdict.value is None


@pytest.mark.parametrize("output", [[1.0], [1.0] * 3, None, 0.5, "ab", {"a": 1, "b": 2}, b"ab"])
def test_a_wrong_shape_is_invalid_for_every_row(output):
    verdicts = read_output(output, 2)
    assert [v.kind for v in verdicts] == [VerdictKind.INVALID] * 2


def test_the_message_for_a_wrong_length_gives_both_lengths():
    assert "returned 3 values for 2 completions" in read_output([1, 2, 3], 2)[0].detail


def test_an_ok_verdict_with_nan_is_invalid():
    assert read_value(Verdict(VerdictKind.OK, math.nan)).kind is VerdictKind.INVALID
