"""Tests that need a GPU are skipped, visibly, where there is none; RLALIGN_TEST_DEVICE=cuda makes
tensors without a device on it."""

import os

import pytest
import torch

torch.set_default_device(os.environ.get("RLALIGN_TEST_DEVICE", "cpu"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
