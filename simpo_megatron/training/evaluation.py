"""Validation: the training metrics of every pair of the validation sets, without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.data import PreferenceDataset, StepPlan
from simpo_megatron.mcore import device
from simpo_megatron.mcore.forward_step import AVERAGES
from simpo_megatron.reporting.metric_names import set_prefix
from simpo_megatron.training.metrics import reduce_sums
from simpo_megatron.training.step import Trainer, pairs_per_token, run_pass

ACCURACY = "rewards/accuracies"


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one pass over the validation sets, the same on every rank."""

    metrics: dict[str, float]
    """By the names they are logged under."""
    averages: np.ndarray | None
    """float32 [num_pairs, 2]: average log-probs, nats per token, of chosen and rejected of the first set; None without
    validation pairs."""


def evaluate(trainer: Trainer, datasets: Mapping[str, PreferenceDataset], *, is_untrained: bool = False) -> Evaluation:
    """The evaluation of the validation sets `datasets`.

    The metrics of the first set are `eval/...`; those of every set that has a name are `eval/NAME/...`.

    Args:
        is_untrained: no step was taken yet. An objective with a reference then compares a model with itself: all
            rewards are equal up to rounding, so the metrics have no accuracy.

    Collectives: those of one forward pass for each global batch, one reduction of the sums for each set, and for the
    first one all-reduce of 8 bytes a pair over dp on the last pipeline stage and one broadcast over pp.
    """
    metrics: dict[str, float] = {}
    averages: np.ndarray | None = None
    for name, dataset in datasets.items():
        is_first = not metrics
        means, of_pairs = _pass_over(trainer, dataset)
        if is_untrained and trainer.objective.needs_reference:
            del means[ACCURACY]
        prefixes = {set_prefix(""), set_prefix(name)} if is_first else {set_prefix(name)}
        metrics |= {prefix + metric: value for prefix in sorted(prefixes) for metric, value in means.items()}
        if is_first:
            averages = gather_averages(trainer, of_pairs, len(dataset))
    return Evaluation(metrics, averages)


def _pass_over(
    trainer: Trainer, dataset: PreferenceDataset
) -> tuple[dict[str, float], list[tuple[Sequence[int], Tensor]]]:
    """Means over all pairs of `dataset`, by the names of the training metrics, and `num_pairs`; and of each microbatch
    of this rank its pairs and their average log-probs."""
    for chunk in trainer.chunks:
        chunk.eval()
    sums, of_pairs = [], []
    # The SFT term is a mean over the chosen tokens of the whole set, however it is split into batches.
    ratio = pairs_per_token(dataset.counted)
    for plan in trainer.plan_evaluation(dataset):
        computed = run_pass(trainer, dataset, plan, forward_only=True, pairs_per_chosen_token=ratio).sums
        of_pairs += _of_microbatches(trainer, plan, computed)
        sums += computed
    return reduce_sums(sums, len(dataset), trainer.groups) | {"num_pairs": len(dataset)}, of_pairs


def _of_microbatches(
    trainer: Trainer, plan: StepPlan, computed: Sequence[Mapping[str, Tensor]]
) -> list[tuple[Sequence[int], Tensor]]:
    if not trainer.groups.is_last_stage:
        return []
    own = plan[trainer.groups.dp.rank()]
    return [(pairs, kept[AVERAGES]) for pairs, kept in zip(own, computed, strict=True)]


def gather_averages(trainer: Trainer, of_pairs: Sequence[tuple[Sequence[int], Tensor]], num_pairs: int) -> np.ndarray:
    """float32 [num_pairs, 2]: the average log-probs of chosen and rejected of every pair, the same on every rank.

    Args:
        of_pairs: pairs of this rank and their averages [2 * pairs]; only the last pipeline stage has any.

    Collectives: one all-reduce of 8 bytes a pair over dp on the last pipeline stage, one broadcast over pp.
    """
    groups = trainer.groups
    averages = torch.zeros(num_pairs, 2, device=device.current_device())
    for pairs, averages_R in of_pairs:
        averages[list(pairs)] = averages_R.view(-1, 2)
    if groups.is_last_stage:
        dist.all_reduce(averages, group=groups.dp)
    return groups.broadcast_from_last_stage(averages).cpu().numpy()
