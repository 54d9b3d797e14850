"""Log-probabilities of response tokens straight from hidden states: the logits never exist as a whole.

Rows that predict no response token are dropped before the first GEMM. The others go through the vocabulary block by
block. A block's exponentials are kept for the backward while they fit a byte budget, and recomputed beyond it.

An alternative finishes the gradient inside the forward, a pair at a time: within a pair the slope of every
token is known up to one scalar, which is known when the pair's tokens are done. It needs three GEMMs at any
budget. But it also needs a second weight gradient to apply the scalar, a collective per pair under tensor
parallelism, and the objective inside the kernel. Measured, forward and backward on one thread, fp32, hidden
1024, half of the positions prompt or padding, least of three runs:

    vocabulary, rows of positions     this form           at 64 MiB          pair at a time
    32,000, 2,080 of 4,096            4.8 s, 285 MiB      6.1 s, 90 MiB      5.0 s, 174 MiB
    128,256, 496 of 1,024             5.2 s, 264 MiB      6.4 s, 73 MiB      5.8 s, 579 MiB

so this module does not use it. Memory is the peak above inputs and gradients.

Shapes: S sequence (this rank's part under sequence parallelism), B batch, H hidden, v this rank's vocabulary
slice, b one block of it, N response tokens, n those of them whose target lies in the block.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.loss import blocks_torch
from simpo_megatron.loss.head import HeadCall
from simpo_megatron.loss.rows import RowSelection
from simpo_megatron.loss.softcap import SoftCap
from simpo_megatron.loss.tokens import ResponseTokens, VocabShard, check_targets
from simpo_megatron.loss.triton_needs import missing_for_triton

Backend = Literal["torch", "triton"]

# Holds the bf16 logits of 8,192 response rows of a 70B model's microbatch at tp 8 (263 MB), and workspace.
DEFAULT_LOGITS_BUDGET_BYTES = 320 * 2**20
# On a GPU there are few blocks and the current one counts: twice those logits, or 4,096 rows of a whole vocabulary.
DEFAULT_GPU_LOGITS_BUDGET_BYTES = 2**31


def fused_linear_log_probs(
    hidden_SBH: Tensor,
    weight_vH: Tensor,
    tokens: ResponseTokens,
    *,
    vocab: VocabShard,
    tp_group: ProcessGroup | None,
    sequence_parallel: bool = False,
    logit_softcap: float | None = None,
    logits_budget_bytes: int | None = None,
    logit_dtype: torch.dtype | None = None,
    accumulate_into_main_grad: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Returns log p(target), natural log, of every response token: [N], fp32, replicated over tp.

    Args:
        hidden_SBH: after the final norm. Replicated over tp, or with `sequence_parallel` this rank's equal
            part of dimension 0. Only the flat index of the first two dimensions counts, so a batch-first
            [R, S, H] serves as well.
        weight_vH: the output layer's slice (own or tied embedding), in the dtype of `hidden_SBH`. Frozen: no
            weight gradient is computed.
        tokens: which rows predict which tokens, the same on every rank. Best on the CPU with a copy on the
            device (`ResponseTokens.with_copy`): then this call neither waits nor copies.
        vocab: which token ids the weight's rows are; padding rows take no part and get a zero gradient.
        tp_group: the ranks that share the vocabulary; None for a whole vocabulary without process group.
        sequence_parallel: whether `hidden_SBH` is a part of the sequence.
        logit_softcap: each logit becomes cap * tanh(logit / cap) before the softmax; None: it stays as it is.
        logits_budget_bytes: the most bytes of logits to hold, between forward and backward and while
            computing; None: `DEFAULT_LOGITS_BUDGET_BYTES`, on a GPU `DEFAULT_GPU_LOGITS_BUDGET_BYTES`. Logits
            beyond it are recomputed in the backward, at the cost of one GEMM.
        logit_dtype: the dtype of the logits that the log-sum-exp and the target's logit are read from; None: that
            of `hidden_SBH`. With bf16 hidden states, fp32 keeps the rounding of logits out of the log-probs. The
            Triton backend also stores them in fp32 then: beside an exact log-sum-exp, bf16 logits could give a
            likely token a probability above 1.
        accumulate_into_main_grad: add the weight gradient to `weight_vH.main_grad` where there is one, as
            Megatron's linear layers do under gradient accumulation fusion, and set `grad_added_to_main_grad`.
        backend: "triton" or "torch"; None: Triton for fp32 and bf16 on a GPU where it can compile, else torch.

    Collectives: forward one all-gather of [2, N] fp32 over `tp_group`; backward one all-reduce of [N, H] in
    the hidden dtype, when the hidden states need a gradient. With `sequence_parallel` the forward also
    exchanges the selected rows, and the backward's collective returns to each rank the gradient of its own.

    Raises:
        ConfigError: shapes or dtypes that do not fit together, a cap that is no number above 0, or a tensor of
            which other ranks hold parts (a DTensor, a weight that FSDP has divided).
        DataError: a target outside the vocabulary, or rows unsorted or outside the sequence (on every rank).
    """
    _check_tensors(hidden_SBH, weight_vH, vocab, tp_group)
    num_local = hidden_SBH.shape[0] * hidden_SBH.shape[1]
    device = hidden_SBH.device
    tokens, device_tokens = tokens.on(torch.device("cpu")), tokens.on(device)
    _check_tokens(tokens, num_local * (tp_group.size() if sequence_parallel and tp_group else 1), vocab)
    backend = backend or _backend_for(hidden_SBH)
    if logits_budget_bytes is None:
        logits_budget_bytes = DEFAULT_LOGITS_BUDGET_BYTES if backend == "torch" else DEFAULT_GPU_LOGITS_BUDGET_BYTES
    call = HeadCall(
        selection=RowSelection.of(
            tokens.rows_N, num_local, group=tp_group, sharded=sequence_parallel, copy_N=device_tokens.rows_N
        ),
        targets_N=tokens.targets_N,
        device_targets_N=device_tokens.targets_N,
        vocab_start=vocab.start,
        width=vocab.num_real(weight_vH.shape[0]),
        tp_group=tp_group,
        softcap=None if logit_softcap is None else SoftCap(logit_softcap),
        logit_dtype=_logit_dtype(logit_dtype, hidden_SBH.dtype),
        budget_bytes=logits_budget_bytes,
        accumulate_into_main_grad=accumulate_into_main_grad,
        differentiable=torch.is_grad_enabled() and (hidden_SBH.requires_grad or weight_vH.requires_grad),
    )
    return _module_of(backend).log_probs(hidden_SBH, weight_vH, call)


def _backend_for(hidden_SBH: Tensor) -> Backend:
    """Triton where its kernels can be compiled (meta tensors count as a GPU's), else torch."""
    is_on_gpu = hidden_SBH.device.type in ("cuda", "meta")
    has_kernels = hidden_SBH.dtype in (torch.float32, torch.bfloat16) and missing_for_triton() is None
    return "triton" if is_on_gpu and has_kernels else "torch"


def _module_of(backend: Backend) -> ModuleType:
    if backend == "torch":
        return blocks_torch
    from simpo_megatron.loss import blocks_triton

    return blocks_triton


def _logit_dtype(asked: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    if asked is None or asked == dtype:
        return dtype
    if asked != torch.float32 or dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"logit_dtype: found {asked} beside hidden states in {dtype}, expected the same, or torch.float32 beside "
            "torch.bfloat16 or torch.float16"
        )
    return asked


def _check_tensors(hidden_SBH: Tensor, weight_vH: Tensor, vocab: VocabShard, tp_group: ProcessGroup | None) -> None:
    for name, tensor in (("hidden_SBH", hidden_SBH), ("weight_vH", weight_vH)):
        # Compared by name: the module that defines DTensor takes long to import.
        if type(tensor).__name__ == "DTensor" or (name == "weight_vH" and tensor.dim() == 1):
            raise ConfigError(
                f"{name}: found a part of what other ranks share ({type(tensor).__name__} {tuple(tensor.shape)}), "
                "expected a whole tensor of this rank; under FSDP compute the loss inside the forward of the module "
                "that holds the output layer, where its weight is gathered"
            )
    if hidden_SBH.dim() != 3 or weight_vH.dim() != 2 or hidden_SBH.shape[2] != weight_vH.shape[1]:
        raise ConfigError(
            f"hidden_SBH, weight_vH: found shapes {tuple(hidden_SBH.shape)} and {tuple(weight_vH.shape)}, "
            "expected [S, B, H] and [v, H] with the same H"
        )
    if hidden_SBH.dtype != weight_vH.dtype:
        raise ConfigError(
            f"hidden_SBH, weight_vH: found {hidden_SBH.dtype} and {weight_vH.dtype}, expected one dtype; cast one"
        )
    alone = tp_group is None or tp_group.size() == 1
    if alone and (vocab.start, vocab.num_real(len(weight_vH))) != (0, vocab.size):
        raise ConfigError(
            f"{vocab}: found {len(weight_vH)} rows of weight_vH, expected the whole vocabulary on a single rank"
        )


def _check_tokens(tokens: ResponseTokens, num_rows: int, vocab: VocabShard) -> None:
    rows_N = tokens.rows_N
    if rows_N.dim() != 1 or not rows_N.shape == tokens.targets_N.shape == tokens.sequence_N.shape:
        raise ConfigError(
            "ResponseTokens: found other shapes, expected vectors rows_N, targets_N and sequence_N of one length"
        )
    if ((rows_N < 0) | (rows_N >= num_rows)).any() or (rows_N[1:] < rows_N[:-1]).any():
        raise DataError(f"rows_N: found rows out of order or range, expected ascending rows below {num_rows}")
    check_targets(tokens.targets_N, vocab.size)
