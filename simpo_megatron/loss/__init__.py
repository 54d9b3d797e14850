"""The SimPO loss for any training loop: tensors and a process group in, loss and sums out. Needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpo_megatron.lazy import lazy_names

if TYPE_CHECKING:
    from simpo_megatron.loss.baselines import CPOObjective, DPOObjective, IPOObjective, ORPOObjective
    from simpo_megatron.loss.fused_linear import DEFAULT_LOGITS_BUDGET_BYTES, fused_linear_log_probs
    from simpo_megatron.loss.fused_simpo import fused_linear_simpo
    from simpo_megatron.loss.log_probs import vocab_parallel_log_probs
    from simpo_megatron.loss.monitored import MONITORED, length_correlation, monitored_sums
    from simpo_megatron.loss.objective import PreferenceObjective, PreferenceResult, preference_loss
    from simpo_megatron.loss.reduce import average_log_probs
    from simpo_megatron.loss.simpo import SimPOObjective
    from simpo_megatron.loss.tokens import IGNORE_INDEX, ResponseTokens, VocabShard

__all__ = [
    "DEFAULT_LOGITS_BUDGET_BYTES",
    "IGNORE_INDEX",
    "MONITORED",
    "CPOObjective",
    "DPOObjective",
    "IPOObjective",
    "ORPOObjective",
    "PreferenceObjective",
    "PreferenceResult",
    "ResponseTokens",
    "SimPOObjective",
    "VocabShard",
    "average_log_probs",
    "fused_linear_log_probs",
    "fused_linear_simpo",
    "length_correlation",
    "monitored_sums",
    "preference_loss",
    "vocab_parallel_log_probs",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "baselines": "CPOObjective DPOObjective IPOObjective ORPOObjective",
        "fused_linear": "DEFAULT_LOGITS_BUDGET_BYTES fused_linear_log_probs",
        "fused_simpo": "fused_linear_simpo",
        "log_probs": "vocab_parallel_log_probs",
        "monitored": "MONITORED length_correlation monitored_sums",
        "objective": "PreferenceObjective PreferenceResult preference_loss",
        "reduce": "average_log_probs",
        "simpo": "SimPOObjective",
        "tokens": "IGNORE_INDEX ResponseTokens VocabShard",
    },
)
