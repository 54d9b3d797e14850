"""Time and memory of whole training steps on real pairs: ours beside TRL's CPOTrainer on SimPO's loss.

    python tools/benchmarks/step.py                                  # the bundled pairs
    python tools/benchmarks/step.py --data pairs.jsonl --num-steps 3 --global-batch-size 16
    python tools/benchmarks/step.py --data pairs.jsonl --methods ours,ours-padded,trl-1,trl-2,trl-8

Both sides train the same Llama (8 layers, hidden 512, 32,000 ids, fp32) with AdamW. They get the same token ids in the
same global batches, so their losses must agree. `trl-M` takes M pairs a microbatch, and gets them
better than it would take them itself: each global batch sorted by length, so that a microbatch pads
little; its attention is scaled_dot_product_attention, its optimizer fused, gradient checkpointing off.

Every measurement is a process of its own on one thread, the methods in turn in every round. The first
step is not counted. CPU seconds a pair are the least over the rounds (they hardly notice what else the
machine does), pairs a second the most. Memory is the peak of the resident set during the counted steps,
less what the process held before it made the model: weights, gradients, optimizer state (16 bytes a
parameter on both sides) and all that a step needs beside them, which is `beyond`. TRL is `trl` from PyPI,
0.29 or later.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from results import keep

if TYPE_CHECKING:
    from torch.nn import Module

BETA, GAMMA, LEARNING_RATE = 2.0, 1.0, 1e-5
LAYERS, HIDDEN, MLP_WIDTH, HEADS, VOCAB = 8, 512, 1408, 8, 32000
SEED = 42
MIB = 2**20
OURS = {
    "ours": {},
    "ours-no-sharing": {"prefix_sharing": False},
    "ours-no-packing": {"packing": False},
    "ours-padded": {"packing": False, "prefix_sharing": False},
}


@dataclass
class Meter:
    """CPU time, wall time and memory of the steps after the first one."""

    memory_before: int = field(default_factory=lambda: status_bytes("VmRSS"))
    marks: list[tuple[float, float]] = field(default_factory=list)

    def mark(self) -> None:
        """Ends one step; call it after every step."""
        if not self.marks:
            Path("/proc/self/clear_refs").write_text("5")  # restarts the kernel's peak
        self.marks.append((time.process_time(), time.perf_counter()))

    def result(self, losses: list[float], global_batch_size: int, model: Module) -> dict:
        """The result for the parent process: of the counted steps, with the losses of all."""
        held = 16 * sum(parameter.numel() for parameter in model.parameters())
        num_pairs = global_batch_size * (len(self.marks) - 1)
        cpu, wall = (last - first for first, last in zip(self.marks[0], self.marks[-1], strict=True))
        return dict(
            losses=losses,
            cpu_per_pair=cpu / num_pairs,
            pairs_per_second=num_pairs / wall,
            memory=(memory := status_bytes("VmHWM") - self.memory_before),
            beyond=memory - held,
        )


def status_bytes(name: str) -> int:
    """A line of /proc/self/status in bytes; the kernel gives kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def prepare(data: str, folder: Path) -> None:
    """A tokenizer trained on the pairs and a Llama with random weights, in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from simpo_megatron.demo import CHAT_TEMPLATE, SPECIAL_TOKENS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(Path(data).read_text(encoding="utf-8").splitlines(), trainer)
    pad, begin, end = SPECIAL_TOKENS[:3]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    write_llama(folder)


def write_llama(folder: Path, *, vocab_size: int = VOCAB, num_layers: int = LAYERS, hidden_size: int = HIDDEN) -> None:
    """A Llama with random weights, in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * MLP_WIDTH // HIDDEN,
            num_hidden_layers=num_layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder)


def config_of(job: dict, **options):
    """The configuration that both sides follow."""
    from simpo_megatron.config import config_from

    return config_from(
        model=job["model"],
        data=(job["data"],),
        data_cache=job["cache"],
        bf16=False,
        beta=BETA,
        gamma_beta_ratio=GAMMA / BETA,
        max_length=job["max_length"],
        max_prompt_length=job["max_length"] * 3 // 4,
        chat_template=job.get("chat_template", ""),
        bad_record="skip",
        max_bad_fraction=1.0,
        global_batch_size=job["global_batch_size"],
        tokens_per_microbatch=job["tokens_per_microbatch"],
        train_iters=job["num_steps"],
        lr=LEARNING_RATE,
        lr_warmup_fraction=0.0,
        lr_decay_style="constant",
        seed=SEED,
        **options,
    )


def run_ours(job: dict, options: dict) -> dict:
    """Trains with our own trainer's parts, on one rank."""
    from simpo_megatron.mcore import cpu_patches, device

    cpu_patches.install()
    from simpo_megatron import parallel
    from simpo_megatron.training.start.run_plan import plan_run
    from simpo_megatron.training.start.setup import build_job
    from simpo_megatron.training.step import reduce_sums, train_step

    meter = Meter()
    config = config_of(job, **options)
    plan = plan_run(config, world_size=1)
    groups = parallel.initialize(config.parallel.sizes, backend=device.backend())
    parallel.seed_everything(SEED)
    job_of_rank = build_job(config, plan, groups)
    trainer, pairs = job_of_rank.trainer, job_of_rank.train_data
    losses = []
    for step in range(job["num_steps"]):
        microbatches = trainer.plan_step(pairs, step * job["global_batch_size"])
        computed, *_ = train_step(trainer, pairs, microbatches)
        losses.append(reduce_sums(computed.sums, computed.num_pairs, groups)["loss"])
        meter.mark()
    return meter.result(losses, job["global_batch_size"], trainer.chunks[0])


def run_trl(job: dict, micro_batch_size: int) -> dict:
    """Trains with TRL's trainer on the same ids, in place of its own tokens."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class TrainerOfIds(CPOTrainer):
        losses: list[float] = []

        def tokenize_row(self, feature, model=None) -> dict:
            row = {"prompt_input_ids": feature["prompt_ids"]}
            num_prompt = len(feature["prompt_ids"])
            for name in ("chosen", "rejected"):
                ids = feature["prompt_ids"] + feature[f"{name}_ids"]
                row[f"{name}_input_ids"] = ids
                row[f"{name}_labels"] = [-100] * num_prompt + ids[num_prompt:]
            return row | {
                f"{name}_attention_mask": [1] * len(row[f"{name}_input_ids"])
                for name in ("prompt", "chosen", "rejected")
            }

        def get_batch_loss_metrics(self, *arguments, **options):
            loss, metrics = super().get_batch_loss_metrics(*arguments, **options)
            self.losses.append(float(loss))
            return loss, metrics

    class EveryStep(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            meter.mark()

    records = json.loads(Path(job["records"]).read_text())
    meter = Meter()
    accumulation = job["global_batch_size"] // micro_batch_size
    trainer = TrainerOfIds(
        model=AutoModelForCausalLM.from_pretrained(job["model"], attn_implementation="sdpa"),
        args=CPOConfig(
            output_dir=job["cache"],
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=BETA,
            simpo_gamma=GAMMA,
            max_length=2 * job["max_length"],
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=job["num_steps"],
            train_sampling_strategy="sequential",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=Dataset.from_list(records),
        callbacks=[EveryStep()],
    )
    trainer.train()
    losses = [
        sum(trainer.losses[start : start + accumulation]) / accumulation
        for start in range(0, len(trainer.losses), accumulation)
    ]
    return meter.result(losses, job["global_batch_size"], trainer.model)


def write_records(job: dict) -> str:
    """Writes the pairs of the steps for TRL, longest first within a step; returns a line about them."""
    from transformers import AutoTokenizer

    from simpo_megatron.data import BatchOptions, build_preference_dataset
    from simpo_megatron.data.batching import step_pairs

    config = config_of(job)
    dataset = build_preference_dataset(
        [job["data"]], AutoTokenizer.from_pretrained(job["model"]), config.pairs, Path(job["cache"]) / "pairs"
    )
    options = BatchOptions(global_batch_size=job["global_batch_size"], seed=SEED)
    records, lengths = [], dataset.lengths
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    for step in range(job["num_steps"]):
        indices = step_pairs(len(dataset), step * job["global_batch_size"], options)
        for index in sorted(indices.tolist(), key=lambda i: -longest[i]):
            pair = dataset[index]
            texts = dict.fromkeys(("prompt", "chosen", "rejected"), "text")
            ids = {f"{name}_ids": getattr(pair, f"{name}_ids").tolist() for name in texts}
            records.append(texts | ids)
    Path(job["records"]).write_text(json.dumps(records))
    mean = [sum(len(r[f"{name}_ids"]) for r in records) / len(records) for name in texts]
    return (
        f"{len(dataset)} pairs, {len(records)} in the steps: on average {mean[0]:.0f} tokens of prompt, "
        f"{mean[1]:.0f} of chosen and {mean[2]:.0f} of rejected response"
    )


def measure(method: str, job_file: Path) -> dict:
    """The result of one method in a process of its own."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    if method.startswith("trl"):
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del environment[name]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--job", str(job_file), "--methods", method],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_one(method: str, job: dict) -> dict:
    if method in OURS:
        return run_ours(job, OURS[method])
    return run_trl(job, int(method.removeprefix("trl-")))


def report(methods: list[str], results: dict[str, list[dict]]) -> None:
    """Prints a line for each method, then the ratios of the first method to the best of TRL's."""
    best: dict[str, dict] = {}
    print(f"{'method':18}{'pairs/s':>9}{'CPU s/pair':>12}{'memory MiB':>12}{'beyond':>8}  losses")
    for method in methods:
        runs = results[method]
        best[method] = dict(
            pairs_per_second=max(run["pairs_per_second"] for run in runs),
            cpu_per_pair=min(run["cpu_per_pair"] for run in runs),
            memory=min(run["memory"] for run in runs),
            beyond=min(run["beyond"] for run in runs),
        )
        losses = " ".join(f"{loss:.6f}" for loss in runs[0]["losses"])
        values = best[method]
        print(
            f"{method:18}{values['pairs_per_second']:9.2f}{values['cpu_per_pair']:12.3f}"
            f"{values['memory'] / MIB:12.0f}{values['beyond'] / MIB:8.0f}  {losses}"
        )
    keep("step", best)
    rivals = [best[method] for method in methods if method.startswith("trl")]
    if not rivals or methods[0].startswith("trl"):
        return
    mine, fastest = best[methods[0]], min(rivals, key=lambda rival: rival["cpu_per_pair"])
    smallest = min(rival["memory"] for rival in rivals)
    expected = next(results[method][0]["losses"] for method in methods if method.startswith("trl"))
    difference = max(abs(a - b) for a, b in zip(results[methods[0]][0]["losses"], expected, strict=True))
    print(
        f"{methods[0]} against the fastest TRL: {fastest['cpu_per_pair'] / mine['cpu_per_pair']:.2f} times the "
        f"pairs per CPU second, {mine['pairs_per_second'] / fastest['pairs_per_second']:.2f} times the pairs per "
        f"second, {mine['memory'] / fastest['memory']:.2f} of its memory "
        f"({mine['memory'] / smallest:.2f} of the smallest TRL's), beyond weights, gradients and Adam "
        f"{mine['beyond'] / fastest['beyond']:.2f}; losses differ by at most {difference:.1e}"
    )


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--data", help="a preference file; the bundled pairs when not given")
    parser.add_argument("--methods", default="ours,trl-1,trl-2,trl-4", help=f"of {', '.join(OURS)} and trl-M")
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--num-steps", type=int, default=3, help="the first of them is not counted")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        print(json.dumps(run_one(asked.methods, json.loads(Path(asked.job).read_text()))))
        return
    methods = asked.methods.split(",")
    from simpo_megatron import demo

    data = asked.data or str(Path(demo.__file__).parent / "pairs.jsonl")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = dict(
            data=str(Path(data).resolve()),
            model=str(folder / "model"),
            cache=str(folder / "cache"),
            records=str(folder / "records.json"),
            global_batch_size=asked.global_batch_size,
            tokens_per_microbatch=asked.tokens_per_microbatch,
            max_length=asked.max_length,
            num_steps=asked.num_steps,
        )
        prepare(job["data"], folder / "model")
        print(f"{data}: {write_records(job)}", flush=True)
        (folder / "job.json").write_text(json.dumps(job))
        results: dict[str, list[dict]] = {method: [] for method in methods}
        for _ in range(asked.rounds):
            for method in methods:
                results[method].append(measure(method, folder / "job.json"))
                print(f"  {method}: {results[method][-1]['cpu_per_pair']:.3f} CPU s a pair", file=sys.stderr)
    report(methods, results)


if __name__ == "__main__":
    main()
