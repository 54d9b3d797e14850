"""The time that training waits for a checkpoint, written at once or in the background (--async-save).

    python tools/benchmarks/save.py
    python tools/benchmarks/save.py --layers 4 --rounds 1

Runs of the trainer on one rank, a Llama of random weights in fp32 (33 million parameters, 12 bytes of state each, with
10 layers), a checkpoint every second step but none of the last; the two ways in turn in every round. A step's time is
without the wait; in the background it includes the slow-down by the writer.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from results import keep

REPOSITORY = Path(__file__).parents[2]
SAVED = re.compile(r"^saved .*?\(([\d.]+) MiB in ([\d.]+) s; training waited ([\d.]+) s\)", re.MULTILINE)
FIRST_STEP = re.compile(r"^start +first step done [\d.]+ s .*\(([\d.]+) s of CPU\)", re.MULTILINE)
NUM_STEPS, PAIRS = 7, 4


def write_model(folder: Path, num_layers: int) -> tuple[Path, Path]:
    """(A Llama of `num_layers` with random weights and the bundled tokenizer, the bundled pairs), made in `folder`."""
    import torch

    from simpo_megatron.convert.files import TensorSpec, write_safetensors
    from simpo_megatron.convert.mapping import hf_tensors
    from simpo_megatron.demo import prepare_demo
    from simpo_megatron.mcore.families import describe_hf_model

    demo = prepare_demo(folder / "demo")
    (demo.model_dir / "model.safetensors").unlink()
    config = json.loads((demo.model_dir / "config.json").read_text())
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}
    config |= shape | {"head_dim": 64, "num_hidden_layers": num_layers}
    (demo.model_dir / "config.json").write_text(json.dumps(config))
    shapes = hf_tensors(describe_hf_model(demo.model_dir))
    specs = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}
    tensors = (torch.empty(spec.shape).normal_(std=0.02) for spec in specs.values())
    write_safetensors(demo.model_dir / "model.safetensors", specs, tensors)
    return demo.model_dir, demo.train_file


def run(folder: Path, name: str, model: Path, pairs: Path, *flags: str) -> tuple[list[tuple[float, ...]], list[float]]:
    """([(MiB, seconds until committed, seconds waited) of each checkpoint but the last], seconds of steps 2 on)."""
    save = folder / name
    saves = [tuple(map(float, found)) for found in SAVED.findall(train(save, model, pairs, *flags))]
    records = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    steps = [PAIRS / record["pairs_per_second"] for record in records if record.get("iteration", 0) > 1]
    return saves[:-1], steps


def start_of_run(folder: Path, name: str, model: Path, pairs: Path, *flags: str) -> float:
    """CPU seconds of a run in `folder` / `name` until its first step is done; it takes one step more than before."""
    printed = train(folder / name, model, pairs, "--train-iters", str(NUM_STEPS + 1), *flags, "--override-on-resume")
    return float(FIRST_STEP.findall(printed)[0])


def train(save: Path, model: Path, pairs: Path, *flags: str) -> str:
    """The output of a run that saves in `save`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += [str(REPOSITORY / "examples/pretrain_simpo.py"), "--model", str(model), "--data", str(pairs), "--fp32"]
    command += ["--global-batch-size", str(PAIRS), "--train-iters", str(NUM_STEPS), "--save", str(save)]
    command += ["--save-interval", "2", "--no-probe-memory", "--max-length", "256", "--max-prompt-length", "128"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; a temporary folder when not given")
    chosen = parser.parse_args()
    ways = {"at once": (), "in the background": ("--async-save",)}
    saves, steps = {way: [] for way in ways}, {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as scratch:
        model, pairs = write_model(Path(scratch), chosen.layers)
        for number in range(chosen.rounds):
            for way, flags in ways.items():
                saved, stepped = run(Path(scratch), f"{way} {number}", model, pairs, *flags)
                saves[way] += saved
                steps[way] += stepped
    keep("save", {way: {"saves": saves[way], "steps": steps[way]} for way in ways})
    for way in ways:
        sizes, written, waited = zip(*saves[way], strict=True)
        print(
            f"{way:18} {sizes[0]:.0f} MiB: training waited {statistics.median(waited):.2f} s (least "
            f"{min(waited):.2f}, most {max(waited):.2f}) of {statistics.median(written):.2f} s until it was committed; "
            f"a step takes {statistics.median(steps[way]):.2f} s ({len(waited)} checkpoints)"
        )


if __name__ == "__main__":
    main()
