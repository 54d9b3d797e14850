"""SimPO (arXiv 2405.14734) for Megatron-Core: the loss, the data and the trainer.

Names are imported at their first use: the loss needs only torch, and the version needs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simpo_megatron.config import load_config
    from simpo_megatron.convert import export_hf
    from simpo_megatron.data import build_preference_dataset
    from simpo_megatron.loss import SimPOObjective, fused_linear_log_probs, fused_linear_simpo
    from simpo_megatron.training.loop import train

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

_MODULES = {
    "SimPOObjective": "loss",
    "build_preference_dataset": "data",
    "export_hf": "convert",
    "fused_linear_log_probs": "loss",
    "fused_linear_simpo": "loss",
    "load_config": "config",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
