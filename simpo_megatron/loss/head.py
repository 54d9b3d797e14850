"""The arguments of a call of the loss head, for either backend: everything but the two tensors.

Shapes: N response tokens, v this rank's vocabulary slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from simpo_megatron.loss.rows import RowSelection
from simpo_megatron.loss.softcap import SoftCap


@dataclass(frozen=True, kw_only=True)
class HeadCall:
    """One call: which rows predict which ids, over which columns, and how.

    selection: the rows, on the device of the hidden states.
    targets_N: int64, the token id predicted at each row, on the CPU, where blocks are planned.
    device_targets_N: the same on the device of the hidden states.
    vocab_start: the token id of this rank's first column.
    width: columns of this rank's slice that are real token ids.
    tp_group: the ranks that share the vocabulary; None for one rank.
    softcap: the bound of the logits; None for no bound.
    logit_dtype: the dtype of the logits that the log-sum-exp and the target's logit are read from.
    budget_bytes: the most bytes of logits to hold.
    accumulate_into_main_grad: add the weight gradient to the weight's `main_grad`.
    differentiable: a backward may follow.
    """

    selection: RowSelection
    targets_N: Tensor
    device_targets_N: Tensor
    vocab_start: int
    width: int
    tp_group: ProcessGroup | None
    softcap: SoftCap | None
    logit_dtype: torch.dtype
    budget_bytes: int
    accumulate_into_main_grad: bool
    differentiable: bool

    def main_grad(self, weight_vH: Tensor) -> Tensor | None:
        """Returns the tensor that the weight gradient is added to; None where autograd gets a new one."""
        return getattr(weight_vH, "main_grad", None) if self.accumulate_into_main_grad else None
