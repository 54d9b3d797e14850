"""Held-out pairs: the training metrics of every one of them, without gradients."""

from __future__ import annotations

from simpo_megatron.data import PreferenceDataset
from simpo_megatron.training.metrics import reduce_sums
from simpo_megatron.training.step import Trainer, run_pass


def evaluate(trainer: Trainer, dataset: PreferenceDataset) -> dict[str, float]:
    """Means over all pairs of `dataset`, by the names of the training metrics; the same on every rank.

    Collectives: those of one forward pass for each global batch, and one reduction of the sums at the end.
    """
    for chunk in trainer.chunks:
        chunk.eval()
    sums = []
    for plan in trainer.plan_evaluation(dataset):
        sums += run_pass(trainer, dataset, plan, forward_only=True).sums
    return reduce_sums(sums, len(dataset), trainer.groups)
