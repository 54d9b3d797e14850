"""A model of the loss on an H100, ours and its peers: counted operations, bytes and launches, modelled time.

    python tools/benchmarks/roofline.py                       # all shapes and methods of the loss, as a table
    python tools/benchmarks/roofline.py --whole               # whole microbatches: embedding, layers, head and back
    python tools/benchmarks/roofline.py --shape "8B tp1" --prompt-tokens 300 --response-tokens 400 --pairs 8

Each method runs forward and backward over one microbatch, from hidden states to the gradients of hidden states and
head, on the meta device: every operation that would launch a kernel is counted, nothing is computed and nothing is
timed. Time is products over a rate plus all other bytes over a bandwidth; launches are not in it. Ours packs pairs,
the prompt once, and multiplies only response rows with the vocabulary; the peers' rows hold a prompt with one response,
padded to the longest. They know no tensor parallelism: at tp 8 they are given the slice of the vocabulary that a rank
would have, which is less than they need.

TRL's functions are TRL's own; those of princeton's SimPO and of Liger are written anew from their sources
(scripts/simpo_trainer.py, over a transformers that returns fp32 logits; LigerFusedLinearSimPOLoss, one pair at a time).
On a GPU with Triton, TRL from 1.13 on may take kernels of its own; `trl, two passes` is a lower bound for
that: its products, one read of the logits forward, one read and one write backward.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The counter is that of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "gpu_cpu"))
sys.path.insert(0, str(Path(__file__).parent))

import roofline_microbatch
from counting import COLLECTIVE, Counter, Operation
from roofline_lengths import META, Microbatch

from simpo_megatron.planning.gpus import ASSUMED, GPUS

BETA, GAMMA = 2.0, 1.0
V = 128256
# Hidden size, this rank's slice of the vocabulary, pairs of a microbatch.
SHAPES = {"8B tp1": (4096, V, 8), "8B tp4": (4096, V // 4, 8), "70B tp8": (8192, V // 8, 8)}
# Llama-3.1's shapes, the tensor-parallel ranks that ours runs on, pairs of a microbatch.
_LLAMA = {"vocab_size": V, "num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 8192}
MODELS = {
    "8B": (
        _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        1,
        8,
    ),
    "70B": (
        _LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        8,
        8,
    ),
}
# Rates of an H100's best kernels, of 989 Tflop/s in bf16 and 3.35 TB/s in its data sheet: assumed, not measured.
FLOPS, BANDWIDTH = 700e12, 0.85 * 3.35e12
_H100 = GPUS["h100-80gb"]
ATTENTION_FLOPS = ASSUMED.attention * _H100.bf16_flops
NVLINK = ASSUMED.links * _H100.nvlink_bytes_rate


def ours(batch: Microbatch, hidden_size: int, width: int) -> list[Operation]:
    from simpo_megatron import loss as lib

    hidden = torch.empty(batch.packed_tokens, 1, hidden_size, dtype=torch.bfloat16, device=META, requires_grad=True)
    weight = torch.nn.Parameter(torch.empty(width, hidden_size, dtype=torch.bfloat16, device=META))
    weight.main_grad = torch.empty(width, hidden_size, device=META)
    weight.grad_added_to_main_grad = False
    # A pair's prompt, then its responses; the prompt's last token predicts the first token of both.
    rows, sequences, start = [], [], 0
    for pair, (prompt, responses) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        last, start = start + prompt - 1, start + prompt
        for which, length in enumerate(responses):
            rows += [last, *range(start, start + length - 1)]
            sequences += [2 * pair + which] * length
            start += length
    order = np.argsort(rows, kind="stable")
    cpu = [torch.tensor(np.asarray(values)[order]) for values in (rows, [0] * len(rows), sequences)]
    tokens = lib.ResponseTokens(*cpu, num_pairs=len(batch.prompts))
    tokens = tokens.with_copy(*(torch.empty_like(x, device=META) for x in cpu))
    with Counter() as counter:
        vocab = lib.VocabShard(start=0, size=width)
        logps = lib.fused_linear_log_probs(
            hidden, weight, tokens, vocab=vocab, tp_group=None, accumulate_into_main_grad=True
        )
        averages, counts = lib.average_log_probs(logps, tokens.on(META).sequence_N, 2 * tokens.num_pairs)
        objective = lib.SimPOObjective(beta=BETA, gamma_beta_ratio=GAMMA / BETA)
        lib.preference_loss(averages, counts, objective=objective).loss.backward()
    return counter.operations


def _padded(batch: Microbatch, hidden_size: int, width: int) -> tuple[Tensor, torch.nn.Parameter, Tensor, Tensor]:
    """Returns hidden [R, L, H], the head, labels [R, L], and the mask of response labels."""
    rows, length = batch.padded_shape
    hidden = torch.empty(rows, length, hidden_size, dtype=torch.bfloat16, device=META, requires_grad=True)
    weight = torch.nn.Parameter(torch.empty(width, hidden_size, dtype=torch.bfloat16, device=META))
    labels = torch.empty(rows, length, dtype=torch.int64, device=META)
    return hidden, weight, labels, torch.empty(rows, length, dtype=torch.bool, device=META)


def _simpo(averages: Tensor) -> Tensor:
    chosen, rejected = averages.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()


def princeton(batch: Microbatch, hidden_size: int, width: int) -> list[Operation]:
    hidden, weight, labels, mask = _padded(batch, hidden_size, width)
    with Counter() as counter:
        logits = F.linear(hidden, weight).float()
        labels = labels[:, 1:].clone()
        shifted, mask = logits[:, :-1, :], mask[:, 1:]
        labels = torch.where(mask, labels, 0)
        logps = torch.gather(shifted.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
        loss = _simpo((logps * mask).sum(-1) / mask.sum(-1))
        # TRL logs the mean logit of chosen and rejected rows of every microbatch.
        for part in logits.detach().chunk(2):
            part.mean()
        loss.backward()
    return counter.operations


def trl(batch: Microbatch, hidden_size: int, width: int) -> list[Operation]:
    from trl.experimental.cpo import CPOTrainer

    hidden, weight, labels, _ = _padded(batch, hidden_size, width)
    with Counter() as counter:
        logits = F.linear(hidden, weight)
        loss = _simpo(CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True))
        for part in logits.detach().chunk(2):
            part.mean()
        loss.backward()
    return counter.operations


def trl_two_passes(batch: Microbatch, hidden_size: int, width: int) -> list[Operation]:
    rows, length = batch.padded_shape
    logits = rows * length * width
    product = Operation("mm", 0, 2 * logits * hidden_size, (rows * length, width))
    return [product] * 3 + [Operation("two passes", 2 * 3 * logits, 0, (rows * length, width))]


def liger(batch: Microbatch, hidden_size: int, width: int) -> list[Operation]:
    hidden, weight, labels, mask = _padded(batch, hidden_size, width)
    inputs, head = hidden.detach(), weight.detach()

    def of_pair(rows: Tensor, head: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits = rows @ head.t()
        log_probs = F.log_softmax(logits.float(), dim=-1)
        logps = log_probs.gather(-1, torch.where(mask, labels, 0).unsqueeze(-1)).squeeze(-1)
        chosen, rejected = logits.chunk(2)
        return _simpo((logps * mask).sum(-1) / mask.sum(-1)), (chosen.sum(), rejected.sum())

    with Counter() as counter:
        weight_grad, input_grads = torch.zeros_like(head), []
        for pair in range(len(batch.prompts)):
            of = slice(2 * pair, 2 * pair + 2)
            (grad_rows, grad_head), _ = torch.func.grad_and_value(of_pair, argnums=(0, 1), has_aux=True)(
                inputs[of], head, labels[of], mask[of]
            )
            weight_grad.add_(grad_head)
            input_grads.append(grad_rows)
        torch.cat(input_grads)
    return counter.operations


METHODS: dict[str, Callable[[Microbatch, int, int], list[Operation]]] = {
    "ours": ours,
    "trl": trl,
    "trl, two passes": trl_two_passes,
    "princeton": princeton,
    "liger": liger,
}


@dataclass(frozen=True)
class Count:
    """The counts of a method's work on a microbatch."""

    flops: float
    """Operations of matrix products."""
    elementwise_bytes: int
    """Bytes read and written by all kernels but the products."""
    launches: int
    collective_bytes: int = 0
    attention_flops: float = 0.0

    @classmethod
    def of(cls, operations: list[Operation]) -> Count:
        computed = [operation for operation in operations if not operation.name.startswith(COLLECTIVE)]
        return cls(
            sum(operation.flops for operation in computed),
            sum(operation.num_bytes for operation in computed if not operation.flops),
            len(operations),
            sum(operation.num_bytes for operation in operations if operation.name.startswith(COLLECTIVE)),
        )

    @property
    def seconds(self) -> float:
        products = self.flops / FLOPS + self.attention_flops / ATTENTION_FLOPS
        return products + self.elementwise_bytes / BANDWIDTH + self.collective_bytes / NVLINK


def show_losses(chosen: argparse.Namespace) -> None:
    """Prints a table of the loss for each shape."""
    for name in chosen.shape or SHAPES:
        hidden_size, width, num_pairs = SHAPES[name]
        batch = Microbatch.of(chosen.pairs or num_pairs, chosen.prompt_tokens, chosen.response_tokens)
        print(f"\n{name}: hidden {hidden_size}, {width:,} columns; {batch}")
        print("| method | Tflop | other GB | launches | modelled ms | of ours |\n|---|---|---|---|---|---|")
        counts = {method: Count.of(METHODS[method](batch, hidden_size, width)) for method in chosen.methods or METHODS}
        first = next(iter(counts.values()))
        for method, count in counts.items():
            print(
                f"| {method} | {count.flops / 1e12:.2f} | {count.elementwise_bytes / 1e9:.2f} | {count.launches:,} | "
                f"{1e3 * count.seconds:.2f} | {count.seconds / first.seconds:.2f} |"
            )


def show_microbatches(chosen: argparse.Namespace) -> None:
    """Prints a table of whole microbatches for each model."""
    for name in chosen.shape or MODELS:
        shape, ranks, num_pairs = MODELS[name]
        batch = Microbatch.of(chosen.pairs or num_pairs, chosen.prompt_tokens, chosen.response_tokens)
        layers = f"{shape['num_hidden_layers']} layers of {shape['hidden_size']}"
        print(f"\n{name}: {layers}; {batch}; ours on {ranks} GPUs")
        print(
            "| trainer | GPUs | Tflop | attention Tflop | other GB | launches | collectives GB | modelled GPU ms a "
            "pair | of ours |\n|---|---|---|---|---|---|---|---|---|"
        )
        first = None
        for trainer, num_gpus, count in whole_counts(shape, batch, ranks):
            seconds = count.seconds * num_gpus / len(batch.prompts)
            first = first or seconds
            print(
                f"| {trainer} | {num_gpus} | {count.flops / 1e12:.1f} | {count.attention_flops / 1e12:.1f} | "
                f"{count.elementwise_bytes / 1e9:.1f} | {count.launches:,} | {count.collective_bytes / 1e9:.1f} | "
                f"{1e3 * seconds:.1f} | {seconds / first:.2f} |"
            )


def whole_counts(shape: dict, batch: Microbatch, ranks: int) -> Iterator[tuple[str, int, Count]]:
    """Yields (trainer, its GPUs, the count of one of them), ours first; names a peer that is not installed."""
    count = Count.of(roofline_microbatch.ours(shape, batch, ranks))
    flops = roofline_microbatch.attention_flops(shape, batch, packed=True)
    yield "ours", ranks, replace(count, attention_flops=flops / ranks)
    flops = roofline_microbatch.attention_flops(shape, batch, packed=False)
    for trainer, peer in roofline_microbatch.PEERS.items():
        try:
            yield trainer, 1, replace(Count.of(peer(shape, batch)), attention_flops=flops)
        except ImportError as error:
            print(f"{trainer} is not counted: {error}")


def main(argv: list[str]) -> int:
    """Prints a table for each shape; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="whole microbatches in the place of the loss alone")
    parser.add_argument(
        "--shape", nargs="+", metavar="NAME", help="of those of the loss, or with --whole of the models"
    )
    parser.add_argument("--methods", choices=METHODS, nargs="+", metavar="NAME")
    parser.add_argument("--pairs", type=int, help="pairs of a microbatch; that of the shape when not given")
    parser.add_argument("--prompt-tokens", type=float, default=300)
    parser.add_argument("--response-tokens", type=float, default=400)
    chosen = parser.parse_args(argv)
    known = MODELS if chosen.whole else SHAPES
    for name in chosen.shape or ():
        if name not in known:
            parser.error(f"--shape: found {name!r}, expected {', '.join(known)}")
    print(
        f"A MODEL, nothing of it measured: products at {FLOPS / 1e12:g} Tflop/s, attention at "
        f"{ATTENTION_FLOPS / 1e12:.0f}, other bytes at {BANDWIDTH / 1e12:.2f} TB/s, collectives at {NVLINK / 1e9:.0f} "
        "GB/s, in turn; launches are free. bf16, forward and backward."
    )
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: ours is counted as the blocks of a CPU, and not as a GPU computes it.")
    if chosen.whole:
        show_microbatches(chosen)
    else:
        show_losses(chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
