"""A loss that is not finite is found wherever it stands, and its pairs are named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from simpo_megatron.errors import listed
from simpo_megatron.training.step.passes import _not_finite

DATASET = SimpleNamespace(places=lambda indices, most: f"at {listed(indices, most)}")


def sums(*losses):
    return [{"loss": torch.tensor(loss)} for loss in losses]


def test_finite_losses_and_a_stage_without_losses_are_no_problem():
    assert _not_finite(sums(0.5, 1e30), [[1], [2]], DATASET) is None
    assert _not_finite([], [[1], [2]], DATASET) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_pairs_of_the_microbatches_concerned_are_named_and_no_others(value):
    error = _not_finite(sums(0.5, value, 0.25, value), [[3, 1], [9, 4], [5], [2]], DATASET)
    assert f"loss: found {value} in the microbatch of pairs at 2, 4, 9," in str(error)
