"""The checks by name, the most valuable first, because late ones are skipped when time is short."""

from __future__ import annotations

from simpo_megatron.gpu_check.ceilings import measure_ceilings
from simpo_megatron.gpu_check.large_model import measure_occupation, measure_steps
from simpo_megatron.gpu_check.loss_exactness import check_exactness, check_large_indices
from simpo_megatron.gpu_check.loss_speed import measure_loss
from simpo_megatron.gpu_check.memcheck import check_memory_accesses
from simpo_megatron.gpu_check.packed_attention import check_packs, check_synchronizations, measure_pack
from simpo_megatron.gpu_check.trl_trainer import compare_with_trl
from simpo_megatron.gpu_check.two_ranks import check_two_ranks
from simpo_megatron.gpu_check.verdict import Check
from simpo_megatron.gpu_check.whole_runs import check_demo, check_ends, check_resume

START_SECONDS = 20
"""Time for the checks' process to start."""
CHECKS = (
    Check("A1", "versions, free memory, bandwidth, a large product", 10, measure_ceilings),
    Check("C1", "the loss against float64", 30, check_exactness),
    Check("C2", "the loss over more logits than 32 bits count", 15, check_large_indices),
    Check("B1", "packs against separate sequences", 25, check_packs),
    Check("S1", "no synchronization inside a microbatch", 10, check_synchronizations),
    Check("E1", "the demo learns, its export is what was trained", 45, check_demo),
    Check("C3", "time and memory of the loss, ours and its peers", 75, measure_loss),
    Check("F1", "a model of 1B parameters: speed and memory", 60, measure_steps),
    Check("F2", "the GPU's share of the time of those steps", 10, measure_occupation),
    Check("B2", "a pack's time, and that of a pack of other lengths", 15, measure_pack),
    Check("E2", "a run stopped by a signal and resumed is the run without a stop", 40, check_resume),
    Check("E3", "too little memory and NaN end a run", 35, check_ends),
    Check("G1", "TRL's trainer on the same model and pairs", 45, compare_with_trl),
    Check("H1", "two ranks on one device against one", 20, check_two_ranks),
    Check("K1", "the loss's kernels write where they should and nowhere else", 25, check_memory_accesses),
)
