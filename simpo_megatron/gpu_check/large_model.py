"""A model of 1B parameters for a dozen steps: speed, memory against the plan, and the GPU's occupation."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from simpo_megatron.config import config_from
from simpo_megatron.data import build_preference_dataset, load_tokenizer
from simpo_megatron.demo import prepare_demo
from simpo_megatron.gpu_check.user_runs import SmallRun, last_line, records, train
from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict
from simpo_megatron.mcore.families import describe_hf_model
from simpo_megatron.planning.memory import stage_memory
from simpo_megatron.planning.shapes import ModelShape, Pack
from simpo_megatron.planning.workload import Workload

MFU_BUDGET, BUSY_BUDGET, RESERVED_BUDGET = 0.45, 0.95, 1.15
PLAN_BUDGET = 0.15
"""Largest difference between peak and planned memory, as a share of the plan."""
_PROFILED = (8, 9)
"""The step during which the profiler starts up, and the one that it records."""


def measure_steps(setting: CheckSetting) -> Verdict:
    """Checks for 45 % MFU, memory as planned, little reserved beyond it, and no allocation retries."""
    folder, num_steps = setting.folder / "large", _num_steps(setting)
    # Ended before the checkpoint of its last step, 21 GB that nobody reads, is written.
    options = (*model_options(setting), "--train-iters", str(num_steps + 1))
    done = train(setting, SmallRun(folder, options, fault=f"step@{num_steps + 1}:0:kill"))
    steps = [record for record in records(folder) if "grad_norm" in record]
    if done.returncode != -signal.SIGKILL or len(steps) != num_steps:
        return Verdict.of(
            False,
            f"exit code {done.returncode} after {len(steps)} steps: {last_line(done)}",
            f"{num_steps} steps and SIGKILL",
        )
    steady = _steady(steps)
    found: dict[str, Any] = {
        key: median(step[key] for step in steady)
        for key in ("tokens_per_second", "tflops_per_gpu", "mfu", "data_seconds", "forward_backward_seconds")
        if key in steady[0]
    }
    last = steps[-1]
    found |= {key: last[key] for key in ("peak_memory_gib", "reserved_memory_gib") if key in last}
    retries = sum(step.get("allocation_retries", 0) for step in steps)
    found["planned_memory_gib"] = _planned_bytes(setting) / 2**30
    value = f"{found['tokens_per_second']:,.0f} tokens/s, {found['tflops_per_gpu']:.4g} TFLOP/s"
    if setting.rehearse:
        return Verdict.of(True, value, "not judged", **found)
    reserved = found["reserved_memory_gib"] / found["peak_memory_gib"]
    share = f"{found['mfu']:.0%} MFU, " if "mfu" in found else ""
    peak, planned = found["peak_memory_gib"], found["planned_memory_gib"]
    holds = found.get("mfu", 1.0) >= MFU_BUDGET and reserved <= RESERVED_BUDGET and retries == 0
    return Verdict.of(
        holds and abs(peak / planned - 1) <= PLAN_BUDGET,
        f"{share}{value}, {peak:.1f} GiB, planned {planned:.1f}, {reserved:.2f} of it reserved, {retries} retries",
        f"{MFU_BUDGET:.0%} MFU, {PLAN_BUDGET:.0%} off the plan, {RESERVED_BUDGET} reserved, no retries",
        **found,
    )


def _planned_bytes(setting: CheckSetting) -> float:
    """The planned peak without CUDA's context and workspaces, which torch does not count."""
    model, pairs = model_and_pairs(setting)
    config = config_from(model=str(model), data=(str(pairs),), **_shape(setting))
    cache = setting.folder / "cache" / "planned"
    lengths = build_preference_dataset([str(pairs)], load_tokenizer(model), config.pairs, cache).lengths.mean(axis=0)
    prompt, chosen, rejected = map(float, lengths)
    pack = Pack.of(config.batch, prompt=prompt, response=(chosen + rejected) / 2)
    load = Workload(
        shape=ModelShape.of(describe_hf_model(model)),
        config=config,
        pack=pack,
        data_parallel_size=1,
        num_microbatches=round(config.batch.global_batch_size / pack.num_pairs) or 1,
    )
    memory = stage_memory(load, 0)
    return memory.total - memory.runtime


def measure_occupation(setting: CheckSetting) -> Verdict:
    """Checks that the GPU works for 95 % of a step, by the trace and the times of `measure_steps`.

    The kernels are those of the profiled step, the time is that of the others: recording Python's stacks delays it.
    """
    traces = list((setting.folder / "large" / "profile").glob("*.pt.trace.json"))
    if not traces:
        return Verdict.skip("no trace: the check of a model of 1B parameters has not run here")
    events = json.loads(traces[0].read_text(encoding="utf-8"))["traceEvents"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    steps = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("step ")]
    if setting.rehearse or not steps or not kernels:
        found = f"{len(steps)} steps, {len(kernels)} kernels in the trace"
        return Verdict.of(setting.rehearse and bool(steps), found, "not judged" if setting.rehearse else "some of both")
    covered = _covered([(k["ts"], k["ts"] + k["dur"]) for k in kernels]) / 1e6 / len(steps)
    timed = _steady([record for record in records(setting.folder / "large") if "grad_norm" in record])
    busy = covered * median(step["pairs_per_second"] for step in timed) / _shape(setting)["global_batch_size"]
    by_name: Counter[str] = Counter()
    for kernel in kernels:
        by_name[kernel["name"][:80]] += kernel["dur"]
    top = {name: microseconds / 1e3 for name, microseconds in by_name.most_common(8)}
    launches = len(kernels) / len(steps)
    return Verdict.of(
        busy >= BUSY_BUDGET,
        f"{busy:.0%} of a step's time busy, {launches:,.0f} launches a step",
        f"{BUSY_BUDGET:.0%}",
        top_kernels_ms=top,
    )


def _covered(spans: list[tuple[float, float]]) -> float:
    """The total length of the union of `spans`."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _steady(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those after the first ones, which compile and warm up, and before the profiler, which slows them."""
    return [step for step in steps if 3 < step["iteration"] < _PROFILED[0]] or steps


def _num_steps(setting: CheckSetting) -> int:
    return setting.size(12, 3)


def model_options(setting: CheckSetting) -> list[str]:
    """Options of a run of the large model on long pairs; writes both if they are missing."""
    model, pairs = model_and_pairs(setting)
    options = ["--model", str(model), "--data", str(pairs), "--log-interval", "1", "--lr", "1e-6"]
    for name, value in _shape(setting).items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    options += ["--train-iters", str(_num_steps(setting)), "--profile", "--use-pytorch-profiler"]
    first, last = _PROFILED if not setting.rehearse else (1, 2)
    return [*options, "--profile-step-start", str(first), "--profile-step-end", str(last)]


def model_and_pairs(setting: CheckSetting) -> tuple[Path, Path]:
    """(folder of the large model, file of long pairs); writes them if they are missing."""
    return _write_model(setting), _write_pairs(setting)


def _shape(setting: CheckSetting) -> dict[str, int]:
    return {
        "global_batch_size": setting.size(32, 8),
        "tokens_per_microbatch": setting.size(8192, 1024),
        "max_length": setting.size(2048, 512),
        "max_prompt_length": setting.size(1024, 256),
    }


def _write_model(setting: CheckSetting) -> Path:
    """A random Llama of 1.2 billion parameters with the demo's tokenizer; the demo's model in a rehearsal."""
    demo = prepare_demo(setting.folder / "cache" / "demo")
    if setting.rehearse:
        return demo.model_dir
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = setting.folder / "llama_1b"
    if folder.is_dir():
        return folder
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.model_dir).save_pretrained(folder)
    return folder


def _write_pairs(setting: CheckSetting) -> Path:
    """Long pairs, made by joining the demo's texts."""
    texts = prepare_demo(setting.folder / "cache" / "demo").train_file.read_text(encoding="utf-8").splitlines()
    words = " ".join(
        message["content"] for line in texts for part in json.loads(line).values() for message in part
    ).split()
    path, count = setting.folder / "long_pairs.jsonl", setting.size(768, 24)
    if path.exists():
        return path
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            parts = []
            for which, length in enumerate((150, 300, 260)):
                length = setting.size(length + number % 100, 20 + number % 7)
                start = (number * 97 + which * 31) % (len(words) - 400)
                parts.append(" ".join(words[start : start + length]))
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), parts))) + "\n")
    return path
