"""One step: a pass over its microbatches and the update, with its metrics and times; and passes for validation."""

from simpo_megatron.training.step.evaluation import (
    LogProbs,
    evaluate,
    gather_averages,
    log_probs_of,
    validation_log_probs,
)
from simpo_megatron.training.step.metrics import memory_use, peak_memory_bytes, reduce_sums, throughput, utilization
from simpo_megatron.training.step.passes import (
    Pass,
    Step,
    StepPlan,
    Trainer,
    batch_options,
    run_pass,
    run_schedule,
    train_step,
)
from simpo_megatron.training.step.step_times import DATA, FORWARD, PHASES, gather_paces, slowest_rank

__all__ = [
    "DATA",
    "FORWARD",
    "PHASES",
    "LogProbs",
    "Pass",
    "Step",
    "StepPlan",
    "Trainer",
    "batch_options",
    "evaluate",
    "gather_averages",
    "gather_paces",
    "log_probs_of",
    "memory_use",
    "peak_memory_bytes",
    "reduce_sums",
    "run_pass",
    "run_schedule",
    "slowest_rank",
    "throughput",
    "train_step",
    "utilization",
    "validation_log_probs",
]
