"""A whole microbatch of each trainer, from token ids to gradients of all weights, counted on the meta device.

Ours runs through Megatron's layers, by `tests/gpu_cpu/meta_step.py`: one tensor-parallel rank on a GPU without
Transformer Engine, all pairs in one pack. The peers run through transformers' Llama in bf16, whole on one
GPU, a row for each response, gradients added to those of a microbatch before. What they need beyond that is left out,
in their favour: masks of padding, recomputation, and the gathering of weights that FSDP or ZeRO divide.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from counting import Counter, Operation
from roofline_lengths import IGNORE, META, Microbatch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[2] / "tests" / "gpu_cpu"
BETA, GAMMA = 2.0, 1.0
_HEAD_DIM = 128


@torch.library.custom_op("roofline::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One launch of a flash kernel: [R, A, L, D], fewer heads of keys and values allowed."""
    raise NotImplementedError("only counted")


@torch.library.custom_op("roofline::attention_backward", mutates_args=())
def attention_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The launch of its backward."""
    raise NotImplementedError("only counted")


attention.register_fake(lambda query, key, value: torch.empty_like(query))
attention_backward.register_fake(lambda query, key, value, out, grad: tuple(map(torch.empty_like, (query, key, value))))
attention.register_autograd(
    lambda ctx, grad: attention_backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


def _counted_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple:
    return attention(query, key, value).transpose(1, 2).contiguous(), None


def _llama(shape: dict) -> torch.nn.Module:
    """transformers' Llama of this shape with gradients, on the meta device."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("counted", _counted_attention)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with META:
            model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="counted"))
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    return model.train()


def _rows(batch: Microbatch) -> tuple[Tensor, Tensor]:
    """(ids, labels) of all chosen rows and then all rejected ones, padded to the longest."""
    rows, length = batch.padded_shape
    return (torch.empty(rows, length, dtype=torch.int64, device=META) for _ in range(2))


def _simpo(averages: Tensor) -> Tensor:
    chosen, rejected = averages.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()


def trl(shape: dict, batch: Microbatch) -> list[Operation]:
    """TRL's own CPOTrainer.concatenated_forward and cpo_loss, and the mean logits that it logs."""
    trainer_class = importlib.import_module("trl.experimental.cpo").CPOTrainer
    ids, labels = _rows(batch)
    rows = {"input_ids": ids, "labels": labels, "attention_mask": torch.empty_like(ids)}
    halves = {key: x.chunk(2) for key, x in rows.items()}
    halved = {
        f"{name}_{key}": parts[i] for key, parts in halves.items() for i, name in enumerate(("chosen", "rejected"))
    }
    trainer = SimpleNamespace(
        concatenated_inputs=trainer_class.concatenated_inputs,
        get_batch_logps=trainer_class.get_batch_logps,
        is_encoder_decoder=False,
        pad_token_id=0,
        accelerator=SimpleNamespace(device=META),
        aux_loss_enabled=False,
        cpo_alpha=0,
        alpha=0.0,
        beta=BETA,
        simpo_gamma=GAMMA,
        label_smoothing=0.0,
        loss_type="simpo",
    )
    model = _llama(shape)
    with Counter() as counter:
        logps_chosen, logps_rejected, *logits, _ = trainer_class.concatenated_forward(trainer, model, halved)
        losses, *_ = trainer_class.cpo_loss(trainer, logps_chosen, logps_rejected)
        for part in logits:
            part.detach().mean()
        losses.mean().backward()
    return counter.operations


def princeton(shape: dict, batch: Microbatch) -> list[Operation]:
    """SimPOTrainer.concatenated_forward of princeton-nlp/SimPO, scripts/simpo_trainer.py, written anew.

    Its transformers (4.44) returned logits in fp32.
    """
    model = _llama(shape)
    ids, labels = _rows(batch)
    with Counter() as counter:
        logits = model(ids, use_cache=False).logits.float()
        labels = labels[:, 1:].clone()
        mask = labels != IGNORE
        labels = torch.where(mask, labels, 0)
        logps = torch.gather(logits[:, :-1].log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
        loss = _simpo((logps * mask).sum(-1) / mask.sum(-1))
        for part in logits.detach().chunk(2):
            part.mean()
        loss.backward()
    return counter.operations


def liger(shape: dict, batch: Microbatch) -> list[Operation]:
    """transformers' layers and Liger's own LigerFusedLinearSimPOLoss, not compiled, a pair at a time."""
    module = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearSimPOLoss(
        beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=False
    )
    model = _llama(shape)
    ids, labels = _rows(batch)
    with Counter() as counter:
        rows = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        module(model.lm_head.weight, rows, labels[:, 1:])
        # Its gradients exist after the forward. Its backward compares its slope with one, which the meta device cannot.
        model.lm_head.weight.grad.add_(torch.empty_like(model.lm_head.weight))
        rows.backward(torch.empty_like(rows))
    return counter.operations


PEERS: dict[str, Callable[[dict, Microbatch], list[Operation]]] = {"trl": trl, "princeton": princeton, "liger": liger}


def ours(shape: dict, batch: Microbatch, tensor_ranks: int) -> list[Operation]:
    """One rank of `tensor_ranks`, sequence-parallel where there are several, in a process of its own."""
    options = {"tp": tensor_ranks, "sequence_parallel": True} if tensor_ranks > 1 else {}
    num_tokens = -(-batch.packed_tokens // tensor_ranks) * tensor_ranks
    pairs = [[int(prompt), *map(int, responses)] for prompt, responses in zip(batch.prompts, batch.responses)]
    packing = {"tokens_per_microbatch": num_tokens, "sequence_multiple": tensor_ranks}
    case = {"model": shape, "options": options, "pairs": pairs, "batch": packing, "counts_work": True}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.json").write_text(json.dumps({"ours": case}))
        done = subprocess.run(
            [sys.executable, str(TESTS / "meta_step.py"), folder], capture_output=True, text=True, check=True
        )
    found = json.loads(done.stdout.splitlines()[-1])
    if "raised" in found:
        raise RuntimeError(found["raised"])
    return [Operation(name, num_bytes, flops, tuple(largest)) for name, num_bytes, flops, largest in found["work"]]


def attention_flops(shape: dict, batch: Microbatch, *, packed: bool) -> float:
    """Multiplications and additions of attention, forward and backward, of queries and the keys that they see.

    A padded row is as long as the longest. The backward has five products of the forward's two.
    """
    if packed:
        prompts, (chosen, rejected) = batch.prompts.astype(float), batch.responses.T.astype(float)
        seen = float(((prompts + chosen) ** 2 / 2 + rejected * (prompts + rejected / 2)).sum())
    else:
        rows, length = batch.padded_shape
        seen = rows * length**2 / 2
    return 3.5 * 4 * seen * shape["num_attention_heads"] * _HEAD_DIM * shape["num_hidden_layers"]
