"""Time and memory of tokenising preference pairs, ours and TRL's `dataset.map` of the same pairs.

    python tools/benchmarks/data.py --data pairs.jsonl
    python tools/benchmarks/data.py --data pairs.jsonl --count 61000 --num-workers 1,2 --rounds 3

The pairs of the file are repeated to --count, each time with another number in the prompt. Both
sides get conversations, one byte-level tokenizer trained on the file, and limits that cut nothing; the number of
tokens is counted on both sides and must agree. TRL's side is the three maps of its CPOTrainer, with its own
functions. Every measurement is a process of its own, the methods in turn in every round; the least of the rounds
counts. CPU time includes worker processes; memory is the largest process.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import keep

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BUNDLED = str(Path(__file__).parents[2] / "simpo_megatron" / "demo" / "pairs.jsonl")
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
MAX_LENGTH, MAX_PROMPT_LENGTH = 1 << 20, 1 << 19


def prepare(data: str, count: int, folder: Path) -> None:
    """Writes `count` conversations and a tokenizer trained on them to `folder`."""
    from simpo_megatron.data import PairOptions
    from simpo_megatron.data.records import BadRecord, as_messages, parse_json, to_record
    from simpo_megatron.data.sources import read_raw

    records = []
    for raw in read_raw(data, PairOptions()):
        try:
            records.append(to_record(parse_json(raw.row), PairOptions()))
        except BadRecord:
            continue
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            record = records[number % len(records)]
            prompt = [dict(turn) for turn in as_messages(record.prompt)]
            prompt[-1]["content"] += f" ({number})"
            answers = ({"role": "assistant", "content": text.strip()} for text in (record.chosen, record.rejected))
            row = dict(zip(("chosen", "rejected"), ([*prompt, answer] for answer in answers), strict=True))
            file.write(json.dumps(row) + "\n")
    train_tokenizer(folder)


def train_tokenizer(folder: Path) -> None:
    """Writes a byte-level tokenizer with a chat template to `folder / "model"`, trained on some of the pairs there."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": SPECIAL_TOKENS, "show_progress": False}
    with open(folder / "pairs.jsonl", encoding="utf-8") as file:
        texts = (json.loads(line)["chosen"][-1]["content"] for _, line in zip(range(2000), file, strict=False))
        backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=16_000, **options))
    names = {"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1], "pad_token": SPECIAL_TOKENS[1]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")


def run_ours(folder: Path, num_workers: int):
    """Returns the tokens of all prompts and responses, by this package."""
    from simpo_megatron.data import PairOptions, build_preference_dataset

    options = PairOptions(max_length=MAX_LENGTH, max_prompt_length=MAX_PROMPT_LENGTH)
    data = [str(folder / "pairs.jsonl")]
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        dataset = build_preference_dataset(data, load_tokenizer(folder), options, cache, num_workers=num_workers)
        return int((dataset.lengths @ [2, 1, 1]).sum())


def run_trl(folder: Path, num_workers: int):
    """Returns the same by the maps of TRL's CPOTrainer, its methods called without its model."""
    import datasets
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
    from trl.experimental.cpo import CPOTrainer

    class Tokenizing:
        processing_class = load_tokenizer(folder)
        is_encoder_decoder, label_pad_token_id, truncation_mode = False, -100, "keep_end"
        max_length, max_prompt_length = MAX_LENGTH, MAX_PROMPT_LENGTH
        build_tokenized_answer = CPOTrainer.build_tokenized_answer
        tokenize_row = CPOTrainer.tokenize_row

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        dataset = datasets.load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=cache)
        num_proc = num_workers if num_workers > 1 else None
        dataset = dataset.map(maybe_extract_prompt, num_proc=num_proc)
        tokenizer = {"processing_class": Tokenizing.processing_class}
        dataset = dataset.map(maybe_apply_chat_template, fn_kwargs=tokenizer, num_proc=num_proc)
        dataset = dataset.map(Tokenizing().tokenize_row, num_proc=num_proc)
        columns = ["chosen_input_ids", "rejected_input_ids"]
        table = dataset.select_columns(columns).with_format("arrow")[:]
        return sum(len(ids) for name in columns for ids in table[name])


METHODS = {"ours": run_ours, "trl": run_trl}


def load_tokenizer(folder: Path):
    """Returns the tokenizer that `prepare` wrote."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False)


def measure(method: str, folder: Path, num_workers: int) -> dict:
    """Returns wall and CPU seconds, the tokens, and the peak memory in MiB of the largest process."""
    load_tokenizer(folder)  # imports are no part of the work
    before, start = cpu_seconds(), time.perf_counter()
    num_tokens = METHODS[method](folder, num_workers)
    wall, cpu = time.perf_counter() - start, cpu_seconds() - before
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"wall": wall, "cpu": cpu, "tokens": num_tokens, "peak": peak / 1024}


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Prepares the pairs, measures every method in processes of their own and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="preference file to take the pairs from; the bundled one when not given")
    parser.add_argument("--count", type=int, default=4000, help="pairs to tokenise, default 4000")
    parser.add_argument("--num-workers", default="1,2", help="numbers of processes, default 1,2")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each, default 2")
    parser.add_argument("--measure", nargs=3, metavar=("METHOD", "FOLDER", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        method, folder, num_workers = arguments.measure
        print(json.dumps(measure(method, Path(folder), int(num_workers))))
        return
    data = arguments.data or BUNDLED
    with tempfile.TemporaryDirectory() as folder:
        prepare(data, arguments.count, Path(folder))
        cells = [(m, int(w)) for w in arguments.num_workers.split(",") for m in METHODS]
        results = {cell: [] for cell in cells}
        for _ in range(arguments.rounds):
            for method, num_workers in cells:
                command = [sys.executable, __file__, "--measure", method, folder, str(num_workers)]
                environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": folder}
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                results[method, num_workers].append(json.loads(run.stdout.splitlines()[-1]))
    # The two sides cut long pairs by different rules, so token counts may differ slightly.
    keep("data", {f"{method}, {workers} processes": runs for (method, workers), runs in results.items()})
    print(f"{arguments.count:,} pairs of {data}")
    print(f"{'method':<8}{'processes':>10}{'wall s':>9}{'CPU s':>9}{'pairs / CPU s':>15}{'peak MiB':>10}{'tokens':>12}")
    for (method, num_workers), runs in results.items():
        best = {key: min(run[key] for run in runs) for key in ("wall", "cpu", "peak")}
        rate = arguments.count / best["cpu"]
        print(
            f"{method:<8}{num_workers:>10}{best['wall']:>9.1f}{best['cpu']:>9.1f}{rate:>15.0f}{best['peak']:>10.0f}"
            f"{runs[0]['tokens']:>12,}"
        )


if __name__ == "__main__":
    main()
