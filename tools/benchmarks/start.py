"""Time from the command to the end of the first step: ours and TRL's CPOTrainer, on the demo's model and pairs.

    python tools/benchmarks/start.py
    python tools/benchmarks/start.py --rounds 5

Both train the same tiny Llama in fp32 on one rank and one thread, 16 pairs a step, from the same files of text. Each
measurement is a process of its own; the sides take turns, and the first round, which fills caches, is not counted.
`help` is `simpo train --help`, `mistake` a wrong value of an option. CPU seconds are those of the process, at the end
of its first step or at its own, the least over the rounds; modules are counted at the same moment. Seconds are those
from the command to that moment. Below them are the phases of ours, as a run prints them, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAIRS = 16
_COMMAND = "import atexit, sys; from simpo_megatron.cli import run; from tools.benchmarks.start import tell; "
HELP = _COMMAND + "atexit.register(tell); run(['train', '--help'])"
MISTAKE = _COMMAND + "atexit.register(tell); run(['train', '--lr', 'abc'])"


def tell(phases: dict[str, tuple[float, float]] | None = None) -> None:
    """Prints the CPU seconds and modules of this process so far, and the (seconds, CPU seconds) of each phase."""
    found = {"cpu": time.process_time(), "modules": len(sys.modules), "phases": phases or {}}
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)


def ours(folder: Path) -> None:
    """`simpo train` on the demo's files, until its first step is done."""
    from simpo_megatron.cli import main

    class AfterFirstStep:
        def write(self, record: dict) -> None:
            from simpo_megatron.training.start.start_times import phases

            if "grad_norm" in record:
                tell(phases())

        def close(self) -> None:
            pass

    from simpo_megatron.training import run

    train = run.train
    run.train = lambda config: train(config, [AfterFirstStep()])
    files = json.loads((folder / "demo.json").read_text())
    options = ["--model", files["model"], "--data", files["pairs"], "--data-cache", str(folder / "ours"), "--fp32"]
    options += ["--max-length", "512", "--max-prompt-length", "384", "--global-batch-size", str(PAIRS)]
    main(["train", *options, "--tokens-per-microbatch", "1024", "--train-iters", "1", "--log-interval", "1"])


def trl(folder: Path) -> None:
    """TRL's trainer on the demo's files, until its first step is done."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class AfterFirstStep(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            tell()

    files = json.loads((folder / "demo.json").read_text())
    CPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(files["model"], attn_implementation="sdpa"),
        args=CPOConfig(
            output_dir=str(folder / "trl"),
            loss_type="simpo",
            cpo_alpha=0.0,
            per_device_train_batch_size=PAIRS,
            max_length=512,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=AutoTokenizer.from_pretrained(files["model"]),
        train_dataset=load_dataset(
            "json", data_files=files["pairs"], split="train", cache_dir=str(folder / "datasets")
        ),
        callbacks=[AfterFirstStep()],
    ).train()


SIDES: dict[str, Callable[[Path], None]] = {"ours": ours, "trl": trl}


def measure(side: str, folder: Path) -> dict[str, Any]:
    """The JSON that a process of `side` prints."""
    script = {"help": ["-c", HELP], "mistake": ["-c", MISTAKE]}.get(side, [__file__, "--side", side, str(folder)])
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-W", "ignore", *script], env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"cpu"')]
    if not lines:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    return {**json.loads(lines[-1]), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="counted rounds, default 3")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return SIDES[arguments.side](arguments.folder)
    from results import keep

    from simpo_megatron.demo import prepare_demo

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        demo = prepare_demo(folder / "demo")
        files = {"model": str(demo.model_dir), "pairs": str(demo.train_file)}
        (folder / "demo.json").write_text(json.dumps(files))
        sides = ("help", "mistake", *SIDES)
        rounds = [{side: measure(side, folder) for side in sides} for _ in range(arguments.rounds + 1)][1:]
    keep("start", {side: [one[side] for one in rounds] for side in sides})
    print(f"{'':22}{'seconds':>8}{'CPU s':>8}{'modules':>9}")
    for side in sides:
        seconds, cpu = (min(one[side][what] for one in rounds) for what in ("seconds", "cpu"))
        print(f"{side:22}{seconds:8.2f}{cpu:8.2f}{rounds[0][side]['modules']:9}")
    for phase in rounds[0]["ours"]["phases"]:
        seconds, cpu = (min(one["ours"]["phases"][phase][clock] for one in rounds) for clock in (0, 1))
        print(f"{'  ours, ' + phase:22}{seconds:8.2f}{cpu:8.2f}")


if __name__ == "__main__":
    main()
