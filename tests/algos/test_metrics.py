"""Adding up metrics over micro-batches."""

import pytest
import torch

from rlalign.algos import finalize_metrics, merge_metrics


def pair(total, weight):
    return torch.tensor(float(total)), torch.tensor(float(weight))


def test_means_are_weighted_and_extremes_are_extremes():
    merged = merge_metrics(
        [
            {"a": pair(3, 1), "x/max": torch.tensor(1.0), "x/min": torch.tensor(1.0)},
            {"a": pair(1, 3), "x/max": torch.tensor(5.0), "x/min": torch.tensor(5.0)},
            {"b": pair(2, 4)},
        ]
    )
    assert finalize_metrics(merged) == {"a": 1.0, "x/max": 5.0, "x/min": 1.0, "b": 0.5}


def test_a_mean_over_nothing_is_left_out():
    assert finalize_metrics({"a": pair(0, 0)}) == {}


def test_a_plain_number_that_is_no_extreme_cannot_be_merged():
    with pytest.raises(TypeError, match="'loss'"):
        merge_metrics([{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(2.0)}])


def test_effective_sample_size_of_one_dominant_weight():
    name = "sampling/importance_sampling_ratio"
    weights = torch.tensor([4.0, 0.0, 0.0, 0.0])
    metrics = {
        f"{name}/mean": (weights.sum(), torch.tensor(4.0)),
        f"{name}/mean_square": (weights.square().sum(), torch.tensor(4.0)),
    }
    assert finalize_metrics(metrics) == {f"{name}/mean": 1.0, "sampling/ess": 0.25}
