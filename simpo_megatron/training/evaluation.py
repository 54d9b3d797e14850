"""Validation: the training metrics of every pair of the validation sets, without gradients."""

from __future__ import annotations

from collections.abc import Mapping

from simpo_megatron.data import PreferenceDataset
from simpo_megatron.reporting.loggers import set_prefix
from simpo_megatron.training.metrics import reduce_sums
from simpo_megatron.training.step import Trainer, run_pass


def evaluate(trainer: Trainer, datasets: Mapping[str, PreferenceDataset]) -> dict[str, float]:
    """The metrics of the validation sets `datasets` by the names they are logged under; the same on every rank.

    Those of the first set are `eval/...`; those of every set that has a name are `eval/NAME/...`.

    Collectives: those of one forward pass for each global batch, and one reduction of the sums for each set.
    """
    metrics: dict[str, float] = {}
    for name, dataset in datasets.items():
        means = _means(trainer, dataset)
        prefixes = {set_prefix(name)} if metrics else {set_prefix(""), set_prefix(name)}
        metrics |= {prefix + metric: value for prefix in sorted(prefixes) for metric, value in means.items()}
    return metrics


def _means(trainer: Trainer, dataset: PreferenceDataset) -> dict[str, float]:
    """Means over all pairs of `dataset`, by the names of the training metrics, and `num_pairs`."""
    for chunk in trainer.chunks:
        chunk.eval()
    sums = []
    for plan in trainer.plan_evaluation(dataset):
        sums += run_pass(trainer, dataset, plan, forward_only=True).sums
    return reduce_sums(sums, len(dataset), trainer.groups) | {"num_pairs": len(dataset)}
