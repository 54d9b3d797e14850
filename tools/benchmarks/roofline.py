"""A model of the loss on an H100, ours and its peers: operations, bytes and launches, counted; time, modelled.

    python tools/benchmarks/roofline.py                       # all shapes and methods, as a table
    python tools/benchmarks/roofline.py --shape "8B tp1" --prompt-tokens 300 --response-tokens 400 --pairs 8

Each method runs forward and backward over one microbatch, from hidden states to the gradients of hidden states and
head, on the meta device: every operation that would launch a kernel is counted, nothing is computed and nothing is
timed. Time is products over a rate plus all other bytes over a bandwidth; launches are not in it. Ours packs pairs,
the prompt once, and meets the vocabulary with response rows alone; the peers' rows hold a prompt with one response,
padded to the longest. They know no tensor parallelism: at tp 8 they are given the slice of the vocabulary that a rank
would have, which is less than they need.

TRL's functions are TRL's own; those of princeton's SimPO (scripts/simpo_trainer.py, over a transformers of its time,
which returns fp32 logits) and of Liger (LigerFusedLinearSimPOLoss, one pair at a time) are written anew from their
sources. On a GPU with Triton, TRL from 1.13 on may take kernels of its own; `trl, two passes` is a lower bound for
that: its products, one read of the logits forward, one read and one write backward.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The counter is that of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "gpu_cpu"))

from counting import Counter, Operation

BETA, GAMMA = 2.0, 1.0
IGNORE = -100
META = torch.device("meta")
V = 128256
# Hidden size, this rank's slice of the vocabulary, pairs of a microbatch.
SHAPES = {"8B tp1": (4096, V, 8), "8B tp4": (4096, V // 4, 8), "70B tp8": (8192, V // 8, 8)}
# What an H100's best kernels reach of its data sheet's 989 Tflop/s in bf16 and 3.35 TB/s: assumed, not measured.
FLOPS, BANDWIDTH = 700e12, 0.85 * 3.35e12


@dataclass(frozen=True)
class Microbatch:
    """Pairs by their lengths in tokens."""

    prompts: np.ndarray
    responses: np.ndarray
    """[num_pairs, 2]."""

    @classmethod
    def of(cls, num_pairs: int, prompt_tokens: float, response_tokens: float) -> Microbatch:
        """Returns pairs whose lengths are spread as those of chats are: log-normally, by a factor of 1.6."""
        random = np.random.default_rng(0)

        def spread(mean: float, size: tuple[int, ...]) -> np.ndarray:
            lengths = np.exp(random.normal(0.0, np.log(1.6), size))
            return np.maximum(1, np.round(lengths * mean / lengths.mean())).astype(int)

        return cls(spread(prompt_tokens, (num_pairs,)), spread(response_tokens, (num_pairs, 2)))

    @property
    def packed_tokens(self) -> int:
        return int(self.prompts.sum() + self.responses.sum())

    @property
    def padded_shape(self) -> tuple[int, int]:
        """(rows, positions) of a batch with a row for each response."""
        return 2 * len(self.prompts), int((self.prompts[:, None] + self.responses).max())


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
    """Returns hidden [R, L, H], the head, labels [R, L], and which of them count."""
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
        # What it logs of every microbatch: the mean logit of chosen and rejected rows.
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
    """What a method does to a microbatch."""

    flops: int
    elementwise_bytes: int
    """Read and written by all but the products."""
    launches: int

    @classmethod
    def of(cls, operations: list[Operation]) -> Count:
        return cls(
            sum(operation.flops for operation in operations),
            sum(operation.num_bytes for operation in operations if not operation.flops),
            len(operations),
        )

    @property
    def seconds(self) -> float:
        return self.flops / FLOPS + self.elementwise_bytes / BANDWIDTH


def main(argv: list[str]) -> int:
    """Returns 0 after a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES), metavar="NAME")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), metavar="NAME")
    parser.add_argument("--pairs", type=int, help="pairs of a microbatch; that of the shape when not given")
    parser.add_argument("--prompt-tokens", type=float, default=300)
    parser.add_argument("--response-tokens", type=float, default=400)
    chosen = parser.parse_args(argv)
    print(
        f"A MODEL, nothing of it measured: products at {FLOPS / 1e12:g} Tflop/s, other bytes at "
        f"{BANDWIDTH / 1e12:.2f} TB/s, in turn; launches are free. bf16, forward and backward from hidden states."
    )
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: ours is counted as the blocks of a CPU, and not as a GPU computes it.")
    for name in chosen.shape:
        hidden_size, width, num_pairs = SHAPES[name]
        batch = Microbatch.of(chosen.pairs or num_pairs, chosen.prompt_tokens, chosen.response_tokens)
        rows, length = batch.padded_shape
        print(
            f"\n{name}: hidden {hidden_size}, {width:,} columns; {len(batch.prompts)} pairs: {batch.packed_tokens:,} "
            f"tokens packed, {int(batch.responses.sum()):,} of them responses; padded {rows} x {length:,}"
        )
        print("| method | Tflop | other GB | launches | modelled ms | of ours |\n|---|---|---|---|---|---|")
        counts = {method: Count.of(METHODS[method](batch, hidden_size, width)) for method in chosen.methods}
        first = counts[chosen.methods[0]]
        for method, count in counts.items():
            print(
                f"| {method} | {count.flops / 1e12:.2f} | {count.elementwise_bytes / 1e9:.2f} | {count.launches:,} | "
                f"{1e3 * count.seconds:.2f} | {count.seconds / first.seconds:.2f} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
