"""Time, memory and error of the SimPO loss, ours and its peers, forward and backward from hidden states.

    python tools/benchmarks/loss.py                                  # every method, both standard shapes
    python tools/benchmarks/loss.py --shape 1024x128256:4x256 --methods ours,trl --rounds 5
    python tools/benchmarks/loss.py --tp 2 --methods ours,megatron

Every measurement is a process of its own, one thread a rank, the methods in turn in every round; a time is the lowest
CPU time over the rounds, which other work on the machine hardly changes. Memory is the peak above inputs and gradients.
Errors are of both gradients, relative to float64. Half of the positions are prompt or padding. A peer that cannot be
imported is listed as not installed. Liger is `liger-kernel`, Cut Cross Entropy `cut-cross-entropy` (which imports
triton), both from PyPI.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from results import keep

from simpo_megatron.collector import release_memory

BETA, GAMMA = 2.0, 1.0
IGNORE = -100
STANDARD_SHAPES = "1024x32000:8x512,1024x128256:4x256"
MIB = 2**20


def make_inputs(shape: str, dtype: torch.dtype = torch.float32):
    """Returns hidden [R, S, H], weight [V, H] and aligned labels [R, S], chosen and rejected in turn."""
    layer, rows = shape.split(":")
    num_hidden, num_vocab = map(int, layer.split("x"))
    num_rows, length = map(int, rows.split("x"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, length, num_hidden, generator=generator)
    weight = torch.randn(num_vocab, num_hidden, generator=generator) / math.sqrt(num_hidden)
    labels = torch.randint(num_vocab, (num_rows, length), generator=generator)
    for row in range(num_rows):
        start = length // 4 + (row % 3) * length // 32
        labels[row, :start] = IGNORE
        labels[row, start + length // 2 + (row % 2) * length // 64 :] = IGNORE
    return hidden.to(dtype), weight.to(dtype), labels


def simpo_of_logps(logps_RS, labels_RS):
    """Returns the mean SimPO loss of token log-probabilities, as the reference implementation writes it."""
    mask_RS = labels_RS != IGNORE
    avg_R = (logps_RS * mask_RS).sum(-1) / mask_RS.sum(-1)
    return -F.logsigmoid(BETA * (avg_R[0::2] - avg_R[1::2]) - GAMMA).mean()


def ours(budget_bytes=None):
    from simpo_megatron import loss as lib

    objective = lib.SimPOObjective(beta=BETA, gamma_beta_ratio=GAMMA / BETA)
    options = {} if budget_bytes is None else {"logits_budget_bytes": budget_bytes}

    def run(hidden, weight, labels, group, start, size):
        tokens = lib.ResponseTokens.from_labels(labels)
        vocab = lib.VocabShard(start=start, size=size)
        logps = lib.fused_linear_log_probs(hidden, weight, tokens, vocab=vocab, tp_group=group, **options)
        avg, counts = lib.average_log_probs(logps, tokens.sequence_N, len(labels))
        return lib.preference_loss(avg, counts, objective=objective).loss / tokens.num_pairs

    return run


def princeton():
    def run(hidden, weight, labels, *_):
        logps = (hidden @ weight.t()).log_softmax(-1)
        return simpo_of_logps(logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0], labels)

    return run


def trl():
    from trl.trainer.utils import selective_log_softmax

    def run(hidden, weight, labels, *_):
        return simpo_of_logps(selective_log_softmax(hidden @ weight.t(), labels.clamp(min=0)), labels)

    return run


def liger(compiled):
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    module = LigerFusedLinearSimPOLoss(
        ignore_index=IGNORE, beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=compiled
    )

    def run(hidden, weight, labels, *_):
        order = torch.cat((torch.arange(0, len(labels), 2), torch.arange(1, len(labels), 2)))
        return module(weight, hidden[order], labels[order])[0]

    return run


def cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden, weight, labels, *_):
        nll = linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile")
        return simpo_of_logps(-nll, labels)

    return run


def megatron():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        vocab_parallel_cross_entropy,
    )

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())

    def run(hidden, weight, labels, *_):
        logits = copy_to_tensor_model_parallel_region(hidden) @ weight.t()
        return simpo_of_logps(-vocab_parallel_cross_entropy(logits, labels.clamp(min=0)), labels)

    return run


METHODS = {
    "ours": ours,
    "ours at 64 MiB": lambda: ours(64 * MIB),
    "ours at 32 MiB": lambda: ours(32 * MIB),
    "princeton": princeton,
    "trl": trl,
    "liger": lambda: liger(False),
    "liger compiled": lambda: liger(True),
    "cce": cut_cross_entropy,
    "megatron": megatron,
}


def status_mib(key: str) -> float:
    """Returns a memory line of this process from the kernel: VmRSS, or VmHWM for its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def gradients(run, hidden, weight, labels, where):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    run(hidden, weight, labels, *where).backward()
    return hidden.grad, weight.grad


def worker(args) -> dict:
    """Returns the CPU seconds, peak MiB and relative gradient errors of one method, measured in this process."""
    torch.set_num_threads(1)
    if args.worker == "gemm":
        return measure_gemms(args.shape)
    rank, group = args.rank, None
    if args.tp > 1:
        store = torch.distributed.FileStore(args.store, args.tp)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=args.tp)
        group = torch.distributed.group.WORLD
    try:
        run = METHODS[args.worker]()
    except ImportError as error:
        return {"missing": f"not installed: {error}"}
    hidden, weight, labels = make_inputs(args.shape)
    size, width = len(weight), len(weight) // args.tp
    weight = weight[rank * width : (rank + 1) * width].clone()
    where = (group, rank * width, size)

    # Once without measuring, because some methods compile for a shape. What this leaves in the heap goes back to the
    # system, or memory and time of the second run would profit from it, of each method by another amount.
    gradients(run, hidden, weight, labels, where)
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")
    base = status_mib("VmRSS")
    start = time.process_time()
    grads = gradients(run, hidden, weight, labels, where)
    seconds = time.process_time() - start
    peak = status_mib("VmHWM") - base - sum(grad.nbytes for grad in grads) / MIB
    reference = torch.load(args.reference, mmap=True)
    reference[1] = reference[1][rank * width : (rank + 1) * width]
    errors = [float((got - want).norm() / want.norm()) for got, want in zip(grads, reference, strict=True)]
    return {"seconds": seconds, "peak": peak, "error": max(errors)}


def measure_gemms(shape: str) -> dict:
    """Returns the CPU seconds of the three GEMMs that every exact method needs, in their best shape."""
    hidden, weight, labels = make_inputs(shape)
    rows = hidden[labels != IGNORE]
    weight = weight[: min(len(weight), 16384)]
    scale = int(shape.split(":")[0].split("x")[1]) / len(weight)
    logits, out_rows, out_weight = rows @ weight.t(), torch.empty_like(rows), torch.empty_like(weight)
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        torch.mm(rows, weight.t(), out=logits)
        torch.mm(logits, weight, out=out_rows)
        torch.mm(logits.t(), rows, out=out_weight)
        best = min(best, time.process_time() - start)
    return {"seconds": best * scale, "gflops": 6e-9 * logits.numel() * rows.shape[1] / best}


def write_reference(shape: str, path: Path) -> None:
    """Writes the float64 gradients of the dense objective, computed one row at a time."""
    hidden, weight, labels = make_inputs(shape, torch.float64)
    logps = torch.zeros(labels.shape, dtype=torch.float64)
    for row, label in enumerate(labels):
        at = (label != IGNORE).nonzero()[:, 0]
        logps[row, at] = (hidden[row, at] @ weight.t()).log_softmax(-1).gather(1, label[at, None])[:, 0]
    logps.requires_grad_()
    simpo_of_logps(logps, labels).backward()
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for row, label in enumerate(labels):
        at = (label != IGNORE).nonzero()[:, 0]
        slopes = (hidden[row, at] @ weight.t()).softmax(-1).neg_()
        slopes[torch.arange(len(at)), label[at]] += 1
        slopes *= logps.grad[row, at, None]
        grad_hidden[row, at] = slopes @ weight
        grad_weight.addmm_(slopes.t(), hidden[row, at])
    torch.save([grad_hidden.float(), grad_weight.float()], path)


def measure(method: str, shape: str, tp: int, reference: Path) -> dict:
    """Returns the worst value over the ranks of one measurement."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", method, "--shape", shape, "--tp", str(tp)]
        command += ["--reference", str(reference), "--store", f"{folder}/store"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
            for rank in range(tp)
        ]
        reports = []
        for rank in ranks:
            output = rank.communicate(timeout=1200)[0]
            if rank.returncode:
                return {"missing": f"failed with exit code {rank.returncode}"}
            reports.append(json.loads(output.splitlines()[-1]))
    if "missing" in reports[0]:
        return reports[0]
    return {key: max(report[key] for report in reports) for key in reports[0]}


def compare(shape: str, args) -> None:
    methods = args.methods.split(",") if args.methods else list(METHODS)
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder, "reference.pt")
        write_reference(shape, reference)
        for _ in range(args.rounds):
            for method in [*methods, "gemm"]:
                report = measure(method, shape, 1 if method == "gemm" else args.tp, reference)
                best = results.setdefault(method, report)
                if "seconds" in report and report["seconds"] < best.get("seconds", math.inf):
                    results[method] = report | {"peak": max(report.get("peak", 0), best.get("peak", 0))}
    keep(f"loss {shape}", results)
    print_table(shape, args.tp, results)


def print_table(shape: str, tp: int, results: dict[str, dict]) -> None:
    gemm = results.pop("gemm")
    print(f"\nhidden x vocabulary : rows x positions {shape}, tp {tp}")
    floor = gemm["seconds"] / tp
    print(f"three GEMMs over the response rows: {floor:.2f} s a rank at {gemm['gflops']:.0f} GFLOP/s\n")
    print("| method | CPU s | peak MiB | gradient error | x the GEMMs | ours/it: time | ours/it: memory |")
    print("|---|---|---|---|---|---|---|")
    base = results.get("ours", {})
    for method, report in results.items():
        if "missing" in report:
            print(f"| {method} | {report['missing']} | | | | | |")
            continue
        seconds, peak = report["seconds"], report["peak"]
        cells = [f"{seconds:.2f}", f"{peak:.0f}", f"{report['error']:.1e}", f"{seconds / floor:.2f}"]
        if "seconds" in base:
            cells += [f"{base['seconds'] / seconds:.2f}", f"{base['peak'] / peak:.2f}"]
        print("|", " | ".join([method, *cells]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=STANDARD_SHAPES, help="HIDDENxVOCAB:ROWSxPOSITIONS,...")
    parser.add_argument("--methods", help="comma-separated names; the default is all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--reference", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args)))
        return
    for shape in args.shape.split(","):
        compare(shape, args)


if __name__ == "__main__":
    main()
