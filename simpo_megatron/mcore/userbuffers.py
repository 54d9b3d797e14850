"""Transformer Engine's userbuffers, in which tensor-parallel collectives overlap with the matrix products beside them.

Each buffer has the shape of a whole microbatch, so every microbatch of a run must have that shape.
Source: initialize_ub of transformer_engine.pytorch.module.base (2.9 to 2.20), and Megatron-LM's
_initialize_tp_communicators, which calls it as here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from simpo_megatron.config import Config
from simpo_megatron.errors import ConfigError

_MODULE = "transformer_engine.pytorch.module.base"


@contextmanager
def userbuffers(config: Config, hidden_size: int) -> Iterator[None]:
    """While the context lasts, the buffers exist, if the run asks for them.

    Collectives: those of `initialize_ub`, over the world by NCCL, in the ranks of each tensor-parallel group.

    Raises:
        ConfigError: a Transformer Engine before 2.9.
    """
    if not config.parallel.tp_comm_overlap:
        yield
        return
    engine = importlib.import_module(_MODULE)
    if "quantization_modes" not in inspect.signature(engine.initialize_ub).parameters:
        raise ConfigError(
            "tp_comm_overlap: found a Transformer Engine whose initialize_ub takes no quantization_modes, expected 2.9 "
            "or later; leave the option out, or install it with pip install -U 'simpo-megatron[te]'"
        )
    sizes, modes = config.parallel.sizes, engine.UserBufferQuantizationMode
    engine.initialize_ub(
        shape=[config.batch.tokens_per_microbatch // sizes.context, hidden_size],
        tp_size=sizes.tensor,
        quantization_modes=[getattr(modes, name) for name in _quantization_modes(config)],
        bootstrap_backend="nccl",
    )
    try:
        yield
    finally:
        engine.destroy_ub()


def _quantization_modes(config: Config) -> tuple[str, ...]:
    """The modes that layers of a run have: FP8, and NONE where some or all of them compute in bf16."""
    recipe = config.precision.fp8_recipe
    if recipe is None:
        return ("NONE",)
    # The first and the last layer stay in bf16 under tensorwise scaling (`precision_options`).
    return ("FP8", "NONE") if recipe == "tensorwise" else ("FP8",)
