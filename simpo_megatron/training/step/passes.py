"""One pass of megatron's pipeline schedule over one step's microbatches, with or without gradients, and the update."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from simpo_megatron.checkpoint.sharded_state import RunState
from simpo_megatron.config import Config, Layout
from simpo_megatron.data import (
    BatchOptions,
    PreferenceDataset,
    Shape,
    StepPlan,
    collate,
    heaviest_step,
    pair_tokens,
    plan_evaluation,
    plan_step,
    step_shape,
)
from simpo_megatron.errors import NumericsError, SimPOError
from simpo_megatron.loss import PreferenceObjective
from simpo_megatron.mcore import device
from simpo_megatron.mcore.forward_step import ForwardStep, MicrobatchStep
from simpo_megatron.mcore.layers import take_load_balancing_loss, weigh_load_balancing
from simpo_megatron.mcore.microbatch import Microbatch, read_pairs, to_microbatch
from simpo_megatron.mcore.optimizer import update, zero_gradients
from simpo_megatron.parallel import ParallelGroups
from simpo_megatron.ranks import sync_status
from simpo_megatron.training.step.step_times import DATA, FORWARD, FORWARD_BACKWARD, OPTIMIZER, StepTimes

_MAX_PAIRS_SHOWN = 32


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The model, optimizer and schedule of a step, on this rank."""

    groups: ParallelGroups
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    objective: PreferenceObjective
    batch_options: BatchOptions
    layout: Layout
    times: StepTimes = field(default_factory=StepTimes)

    @property
    def state(self) -> RunState:
        """The state of this rank that a checkpoint holds."""
        return RunState(chunks=self.chunks, optimizer=self.optimizer, scheduler=self.scheduler, groups=self.groups)

    def plan_step(self, dataset: PreferenceDataset, consumed_pairs: int) -> StepPlan:
        """The microbatches of every data-parallel rank for the step after the first `consumed_pairs` pairs."""
        return plan_step(dataset.lengths, consumed_pairs, self.batch_options, **self._divided_by())

    def plan_heaviest(self, dataset: PreferenceDataset, consumed_pairs: int, num_steps: int) -> tuple[int, StepPlan]:
        """(number from 0, plan) of the step with the largest microbatch among the next `num_steps`."""
        return heaviest_step(
            dataset.lengths, consumed_pairs, self.batch_options, num_steps=num_steps, **self._divided_by()
        )

    def plan_evaluation(self, dataset: PreferenceDataset) -> Sequence[StepPlan]:
        """Plans like a step's that hold every pair of `dataset` once."""
        return plan_evaluation(dataset.lengths, self.batch_options, **self._divided_by())

    def _divided_by(self) -> dict[str, int]:
        return {
            "dp_size": self.layout.data_parallel_size,
            "microbatch_multiple": self.layout.microbatch_multiple,
        }


class StepPairs(NamedTuple):
    """Lengths of pairs of one step, in tokens."""

    lengths: np.ndarray
    """int [num_pairs, 3]: prompt, chosen and rejected."""
    counted: np.ndarray
    """int [num_pairs, 2]: tokens of chosen and rejected that count in the loss."""

    @classmethod
    def of(cls, dataset: PreferenceDataset, indices: Sequence[int]) -> StepPairs:
        """Those of the pairs `indices` of `dataset`."""
        return cls(dataset.lengths[indices], dataset.counted[indices])


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The results of one pass over a step's microbatches on this rank."""

    sums: list[dict[str, Tensor]]
    """Metric sums over pairs, one dict per microbatch; filled on the last pipeline stage, empty elsewhere."""
    num_pairs: int
    """Pairs of the whole step, over all data-parallel ranks."""
    pairs: StepPairs
    """Their lengths."""
    own_pairs: StepPairs
    """Those of this data-parallel rank."""
    num_tokens: int
    """Real tokens of the whole step as computed: padding apart, and a shared prompt once."""
    load_balancing_loss: float | None = None
    """Mean of an MoE in training over layers and microbatches of the whole step."""


def batch_options(config: Config, layout: Layout, pad_id: int) -> BatchOptions:
    """The rules that make microbatches of pairs; rows are padded only as far as the layout and the precision need."""
    return BatchOptions(
        **asdict(config.batch),
        sequence_multiple=layout.sequence_multiple,
        one_shape_per_step=layout.one_shape_per_step,
        pad_id=pad_id,
        seed=config.run.seed,
    )


def run_pass(trainer: Trainer, dataset: PreferenceDataset, plan: StepPlan) -> Pass:
    """The metric sums of one step's pairs, forward and backward.

    The DDP buffers then hold the gradients, reduced over every group and divided by the pairs of the step.

    Collectives: those of `run_microbatches` and `take_load_balancing_loss`.

    Raises:
        DataError: on every rank alike, when one could not read its pairs.
    """
    of_ranks = [StepPairs.of(dataset, [index for microbatch in rank for index in microbatch]) for rank in plan]
    pairs = StepPairs(*map(np.concatenate, zip(*of_ranks, strict=True)))
    num_pairs = len(pairs.lengths)
    forward_step = ForwardStep(objective=trainer.objective, pairs_per_chosen_token=pairs_per_token(pairs.counted))
    num_microbatches = sum(map(len, plan))
    weigh_load_balancing(trainer.chunks[0].module.config, num_pairs=num_pairs, num_microbatches=num_microbatches)
    sums = run_microbatches(trainer, dataset, plan, forward_step, forward_only=False)
    return Pass(
        sums=sums,
        num_pairs=num_pairs,
        pairs=pairs,
        own_pairs=of_ranks[trainer.groups.dp.rank()],
        num_tokens=int(pair_tokens(pairs.lengths, trainer.batch_options).sum()),
        load_balancing_loss=take_load_balancing_loss(trainer.chunks, num_microbatches=num_microbatches),
    )


def pairs_per_token(counted: np.ndarray) -> float:
    """The number of pairs divided by that of their chosen tokens, from a data set's [pairs, 2] `counted`."""
    return len(counted) / max(1, int(counted[:, 0].sum()))


def run_microbatches(
    trainer: Trainer, dataset: PreferenceDataset, plan: StepPlan, forward_step: MicrobatchStep, *, forward_only: bool
) -> list[Any]:
    """The results that `forward_step` kept of each microbatch of this rank; none before the last pipeline stage.

    Collectives: one broadcast over tp for the tokens, that of `sync_status`, then megatron's own.

    Raises:
        DataError: on every rank alike, when one could not read its pairs.
        ParallelError: on every rank alike, when their plans are not the same.
    """
    shape = step_shape(dataset.lengths, plan, trainer.batch_options)
    with trainer.times.phase(DATA):
        microbatches, problem = _read(trainer, dataset, plan[trainer.groups.dp.rank()], shape)
    # Ranks with different plans would silently skip pairs, or wait for each other.
    sync_status(problem, checksum=zlib.crc32(repr(plan).encode()))
    with trainer.times.phase(FORWARD_BACKWARD):
        return run_schedule(trainer, microbatches, forward_step, forward_only=forward_only)


def run_schedule(
    trainer: Trainer, microbatches: Sequence[Microbatch], forward_step: MicrobatchStep, *, forward_only: bool
) -> list[Any]:
    """The results that `forward_step` kept of each of `microbatches`; none before the last pipeline stage.

    Under pipeline parallelism all of them have one shape. So stages know the shapes they receive and exchange none.

    Collectives: those of megatron's schedule.
    """
    shapes = {microbatch.tokens_BS.shape for microbatch in microbatches}
    assert len(shapes) == 1 or trainer.groups.pp.size() == 1, f"microbatches of one pass differ in shape: {shapes}"
    num_rows, width = microbatches[0].tokens_BS.shape

    def timed(*arguments: Any) -> Any:
        with trainer.times.phase(FORWARD):
            return forward_step(*arguments)

    forward_backward = get_forward_backward_func()
    # megatron's forward_only runs no backward, but keeps everything that one would need.
    with torch.set_grad_enabled(not forward_only):
        return forward_backward(
            forward_step_func=timed,
            data_iterator=[iter(microbatches) for _ in trainer.chunks],
            model=trainer.chunks,
            num_microbatches=len(microbatches),
            # megatron divides the length by the context-parallel size; here it is already divided.
            seq_length=width * trainer.groups.cp.size(),
            micro_batch_size=num_rows,
            forward_only=forward_only,
        )


class Step(NamedTuple):
    """The outcome of one optimizer step."""

    computed: Pass
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """The one used."""
    noted: int
    """The largest that a rank had noted."""


def train_step(trainer: Trainer, dataset: PreferenceDataset, plan: StepPlan, noted: Callable[[], int] = int) -> Step:
    """One optimizer step.

    Args:
        noted: called once, after the backward; the returned step holds the largest result of any rank.

    Collectives: those of `run_pass`, of `sync_status`, and of `update`.

    Raises:
        DataError: on every rank alike, before anything was computed, when one could not read its pairs.
        NumericsError: on every rank alike, with the pairs, when a loss or the gradient is not finite; weights, moments
            and schedule are then as they were.
    """
    for chunk in trainer.chunks:
        chunk.train()
    zero_gradients(trainer.chunks, trainer.optimizer)
    computed = run_pass(trainer, dataset, plan)
    # A loss can be infinite while its gradient is finite, so checking the norm is not enough.
    largest = sync_status(_not_finite(computed.sums, plan[trainer.groups.dp.rank()], dataset), noted())
    try:
        with trainer.times.phase(OPTIMIZER):
            grad_norm, learning_rate = update(trainer.optimizer, trainer.scheduler)
    except NumericsError as error:
        pairs = sorted(index for rank in plan for microbatch in rank for index in microbatch)
        shown = dataset.places(pairs, _MAX_PAIRS_SHOWN)
        raise NumericsError(f"{error}; the step's losses are finite, its pairs are {shown}") from None
    return Step(computed, grad_norm, learning_rate, largest)


def _not_finite(
    sums: Sequence[dict[str, Tensor]], microbatches: Sequence[Sequence[int]], dataset: PreferenceDataset
) -> NumericsError | None:
    """The fault in the losses of this rank's microbatches, if any."""
    if not sums:
        return None
    losses = torch.stack([microbatch["loss"] for microbatch in sums])
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return None
    pairs = sorted(pair for number in bad for pair in microbatches[number])
    return NumericsError(
        f"loss: found {float(losses[bad[0]])} in the microbatch of pairs {dataset.places(pairs, _MAX_PAIRS_SHOWN)}, "
        "expected a finite number; weights, moments and schedule are as before the step"
    )


def _read(
    trainer: Trainer,
    dataset: PreferenceDataset,
    microbatch_indices: Sequence[Sequence[int]],
    shape: Shape | None,
) -> tuple[list[Microbatch], SimPOError | None]:
    """(microbatches, None), or (no microbatches, the error of reading them)."""
    try:
        return _materialise(trainer, dataset, microbatch_indices, shape), None
    except SimPOError as error:
        return [], error


def _materialise(
    trainer: Trainer,
    dataset: PreferenceDataset,
    microbatch_indices: Sequence[Sequence[int]],
    shape: Shape | None = None,
) -> list[Microbatch]:
    here = device.current_device()
    indices = [index for microbatch in microbatch_indices for index in microbatch]
    pairs = iter(read_pairs(dataset, indices, tp_group=trainer.groups.tp, device=here))
    return [
        to_microbatch(
            collate([next(pairs) for _ in chosen], chosen, trainer.batch_options, shape),
            here,
            dataset.reference_avg,
            trainer.groups.cp,
        )
        for chosen in microbatch_indices
    ]
