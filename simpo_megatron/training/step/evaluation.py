"""Validation: the training metrics of every pair of the validation sets, without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from simpo_megatron.data import PreferenceDataset, StepPlan
from simpo_megatron.mcore import device
from simpo_megatron.mcore.forward_step import LogProbsStep, ResponseLogProbs, loss_and_sums
from simpo_megatron.reporting.metric_names import set_prefix
from simpo_megatron.training.step.metrics import reduce_sums
from simpo_megatron.training.step.passes import Trainer, pairs_per_token, run_microbatches

ACCURACY = "rewards/accuracies"


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one pass over the validation sets, the same on every rank."""

    metrics: dict[str, float]
    """By the names they are logged under."""
    averages: np.ndarray | None
    """float32 [num_pairs, 2]: average log-probs, nats per token, of chosen and rejected of the first set; None without
    validation pairs."""


class MicrobatchLogProbs(NamedTuple):
    """The log-probs of one microbatch of this rank; only the last pipeline stage has any."""

    pairs: Sequence[int]
    """Their numbers in the data set."""
    responses: ResponseLogProbs


LogProbs = Mapping[str, Sequence[MicrobatchLogProbs]]
"""The log-probs of this rank's microbatches, by the name of the validation set."""


def validation_log_probs(trainer: Trainer, datasets: Mapping[str, PreferenceDataset]) -> LogProbs:
    """The log-probs of the validation sets `datasets`, which every objective's metrics are made of.

    Collectives: those of one forward pass for each global batch.
    """
    return {
        name: log_probs_of(trainer, dataset, trainer.plan_evaluation(dataset)) for name, dataset in datasets.items()
    }


def log_probs_of(trainer: Trainer, dataset: PreferenceDataset, plans: Iterable[StepPlan]) -> list[MicrobatchLogProbs]:
    """The log-probs of `dataset` under the present weights, computed as `plans` divide it.

    Collectives: those of one forward pass for each plan.
    """
    for chunk in trainer.chunks:
        chunk.eval()
    found: list[MicrobatchLogProbs] = []
    for plan in plans:
        computed = run_microbatches(trainer, dataset, plan, LogProbsStep(), forward_only=True)
        if trainer.groups.is_last_stage:
            found += map(MicrobatchLogProbs, plan[trainer.groups.dp.rank()], computed)
    return found


def evaluate(
    trainer: Trainer,
    datasets: Mapping[str, PreferenceDataset],
    log_probs: LogProbs,
    *,
    is_untrained: bool = False,
) -> Evaluation:
    """The evaluation of the validation sets `datasets`, from their `validation_log_probs`.

    The metrics of the first set are `eval/...`; those of every set that has a name are `eval/NAME/...`.

    Args:
        is_untrained: no step was taken yet. An objective with a reference then compares a model with itself: all
            rewards are equal up to rounding, so the metrics have no accuracy.

    Collectives: one reduction of the sums for each set, and for the first one all-reduce of 8 bytes a pair over dp on
    the last pipeline stage and one broadcast over pp.
    """
    metrics: dict[str, float] = {}
    averages: np.ndarray | None = None
    for name, dataset in datasets.items():
        is_first = not metrics
        means = _means(trainer, dataset, log_probs[name])
        if is_untrained and trainer.objective.needs_reference:
            del means[ACCURACY]
        prefixes = {set_prefix(""), set_prefix(name)} if is_first else {set_prefix(name)}
        metrics |= {prefix + metric: value for prefix in sorted(prefixes) for metric, value in means.items()}
        if is_first:
            averages = gather_averages(trainer, log_probs[name], len(dataset))
    return Evaluation(metrics, averages)


def _means(trainer: Trainer, dataset: PreferenceDataset, log_probs: Sequence[MicrobatchLogProbs]) -> dict[str, float]:
    """Means over all pairs of `dataset`, by the names of the training metrics, and `num_pairs`."""
    # The SFT term is a mean over the chosen tokens of the whole set, however it is split into batches.
    ratio = pairs_per_token(dataset.counted)
    sums = []
    for pairs, responses in log_probs:
        reference_avg_R = None
        if dataset.reference_avg is not None:
            reference_avg_R = torch.from_numpy(dataset.reference_avg[list(pairs)]).flatten().to(responses.avg_R.device)
        sums.append(loss_and_sums(responses, trainer.objective, reference_avg_R, ratio)[1])
    return reduce_sums(sums, len(dataset), trainer.groups) | {"num_pairs": len(dataset)}


def gather_averages(trainer: Trainer, log_probs: Sequence[MicrobatchLogProbs], num_pairs: int) -> np.ndarray:
    """float32 [num_pairs, 2]: the average log-probs of chosen and rejected of every pair, the same on every rank.

    Collectives: one all-reduce of 8 bytes a pair over dp on the last pipeline stage, one broadcast over pp.
    """
    groups = trainer.groups
    averages = torch.zeros(num_pairs, 2, device=device.current_device())
    for pairs, responses in log_probs:
        averages[list(pairs)] = responses.avg_R.view(-1, 2)
    if groups.is_last_stage:
        dist.all_reduce(averages, group=groups.dp)
    return groups.broadcast_from_last_stage(averages).cpu().numpy()
