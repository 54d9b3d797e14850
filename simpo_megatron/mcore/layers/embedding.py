"""megatron's embedding of token ids, with a gradient only for the rows that a microbatch looked up."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding, gather_from_sequence_parallel_region
from torch import Tensor

from simpo_megatron.loss.main_grad import gradient_already_added


class MainGradEmbedding(VocabParallelEmbedding):
    """Adds the gradient of each token to its row of `weight.main_grad`, in the dtype of `main_grad`.

    megatron's own embedding makes, for every microbatch, a gradient of this rank's whole vocabulary slice in the
    weight's dtype. Nearly all of it is zeros, and DDP adds it to `main_grad`. Without a `main_grad` such a one is made.
    """

    padding_idx: int | None = None
    """The id whose row gets no gradient, as in torch.nn.Embedding; None: every row gets its own."""

    def forward(self, input_: Tensor) -> Tensor:
        """[B, S, H] of ids [B, S], or this rank's [S, B, H] under sequence parallelism, in the weight's dtype."""
        return _LookUp.apply(self.weight, input_, self)


class _LookUp(torch.autograd.Function):
    """megatron's forward, unchanged; in the backward each token's gradient goes to its row.

    Many tokens may have one id. A GPU adds them in any order, or, under torch's deterministic algorithms, one by one.

    Collectives: those of megatron, a reduction over tp in the forward, which under sequence parallelism is a
    reduce-scatter and in the backward an all-gather.
    """

    @staticmethod
    def forward(ctx: Any, weight_vH: Tensor, ids_BS: Tensor, embedding: MainGradEmbedding) -> Tensor:
        ctx.embedding = embedding
        ctx.save_for_backward(ids_BS)
        return VocabParallelEmbedding.forward(embedding, ids_BS)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        embedding, (ids_BS,) = ctx.embedding, ctx.saved_tensors
        weight_vH = embedding.weight
        if embedding.reduce_scatter_embeddings:
            grad = gather_from_sequence_parallel_region(grad, group=embedding.tp_group).transpose(0, 1)
        # Tokens of other ranks add zero, each to a different row. Added to one row, the atomic adds of 7 in 8 tokens
        # would queue at tp 8.
        adds_zero_BS = (ids_BS < embedding.vocab_start_index) | (ids_BS >= embedding.vocab_end_index)
        if embedding.padding_idx is not None:
            adds_zero_BS |= ids_BS == embedding.padding_idx
        row_BS = (ids_BS - embedding.vocab_start_index) % len(weight_vH)
        has_main_grad = hasattr(weight_vH, "main_grad")
        total_vH = weight_vH.main_grad if has_main_grad else torch.zeros_like(weight_vH)
        grad_BSH = grad.masked_fill(adds_zero_BS[..., None], 0).to(total_vH.dtype)
        total_vH.index_add_(0, row_BS.flatten(), grad_BSH.flatten(0, 1))
        return gradient_already_added(weight_vH) if has_main_grad else total_vH, None, None
