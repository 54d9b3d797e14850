"""SimPO (arXiv 2405.14734) for Megatron-Core: the loss, the data and the trainer.

Names are imported at their first use: the loss needs only torch, and the version needs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpo_megatron.lazy import lazy_names

if TYPE_CHECKING:
    from simpo_megatron.config import load_config
    from simpo_megatron.convert import export_hf
    from simpo_megatron.data import build_preference_dataset
    from simpo_megatron.loss import SimPOObjective, fused_linear_log_probs, fused_linear_simpo
    from simpo_megatron.training.run import train

__version__ = "0.1.0"

__all__ = [
    "SimPOObjective",
    "__version__",
    "build_preference_dataset",
    "export_hf",
    "fused_linear_log_probs",
    "fused_linear_simpo",
    "load_config",
    "train",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "config": "load_config",
        "convert": "export_hf",
        "data": "build_preference_dataset",
        "loss": "SimPOObjective fused_linear_log_probs fused_linear_simpo",
        "training.run": "train",
    },
)
