"""The checks by name, those of most value first; what is late is left out when time is short."""

from __future__ import annotations

from simpo_megatron.gpu_check.ceilings import measure_ceilings
from simpo_megatron.gpu_check.large_model import measure_occupation, measure_steps
from simpo_megatron.gpu_check.loss_exactness import check_exactness, check_large_indices
from simpo_megatron.gpu_check.loss_speed import measure_loss
from simpo_megatron.gpu_check.memcheck import check_memory_accesses
from simpo_megatron.gpu_check.packed_attention import check_packs, check_synchronizations, measure_pack
from simpo_megatron.gpu_check.two_ranks import check_two_ranks
from simpo_megatron.gpu_check.verdict import Check
from simpo_megatron.gpu_check.whole_runs import check_demo, check_ends, check_resume

CHECKS = (
    Check("A1", "versions, free memory, bandwidth, a large product", 30, measure_ceilings),
    Check("C1", "the loss against float64", 45, check_exactness),
    Check("C2", "the loss over more logits than 32 bits count", 30, check_large_indices),
    Check("B1", "packs against separate sequences", 45, check_packs),
    Check("S1", "no synchronization inside a microbatch", 30, check_synchronizations),
    Check("E1", "the demo learns, its export is what was trained", 75, check_demo),
    Check("C3", "time and memory of the loss, ours and its peers", 110, measure_loss),
    Check("F1", "a model of 1B parameters: speed and memory", 90, measure_steps),
    Check("F2", "the GPU's share of the time of those steps", 30, measure_occupation),
    Check("B2", "a pack's time, and that of a pack of other lengths", 40, measure_pack),
    Check("E2", "a resumed run is the run without a stop", 90, check_resume),
    Check("E3", "too little memory, NaN and SIGTERM end a run", 75, check_ends),
    Check("H1", "two ranks on one device against one", 40, check_two_ranks),
    Check("K1", "the loss's kernels under compute-sanitizer", 60, check_memory_accesses),
)
