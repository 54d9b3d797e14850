"""Rate and memory of converting a Llama of a billion random parameters, beside plain copies of the same file.

    python tools/benchmarks/convert.py
    python tools/benchmarks/convert.py --layers 4 --rounds 2 --folder /scratch
    python tools/benchmarks/convert.py --bridge-python bridge-venv/bin/python

Every measurement is a process of its own, without its imports. Its input was read once just before, and its output is
on the disk at its end. A rate is divided by that of `dd` in the same round, the mean of one just before and one just
after. The rate of a shared disk changes within seconds. `dd` and `safetensors copy` (load_file, save_file) are what the
disk and the library can do; the bar is 60 % of dd's rate, in every round, and 2 GiB of memory. Both conversions also
hash what they write or read. Where other work shares the machine, CPU time tells more than wall time.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import keep

RATE_BAR, MEMORY_BAR = 0.60, 2 << 30


def write_model(folder: Path, num_layers: int) -> None:
    """Writes a Llama of Llama-3.2-1B's shape, of `num_layers`, with random weights in bf16."""
    import torch

    from simpo_megatron.convert.files import TensorSpec, write_safetensors
    from simpo_megatron.convert.mapping import hf_tensors
    from simpo_megatron.mcore.families import describe_hf_model

    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in hf_tensors(describe_hf_model(folder)).items()}
    tensors = (torch.empty(spec.shape, dtype=spec.dtype).normal_(std=0.02) for spec in specs.values())
    write_safetensors(folder / "model.safetensors", specs, tensors)


def copy_by_dd(folder: Path) -> None:
    """A copy of the weights by dd, synced."""
    source, target = folder / "model" / "model.safetensors", folder / "out"
    command = ["dd", f"if={source}", f"of={target}", "bs=4M", "conv=fsync", "status=none"]
    subprocess.run(command, check=True)


def copy_by_safetensors(folder: Path) -> None:
    """A copy by safetensors' own load_file and save_file, synced."""
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / "model" / "model.safetensors"), folder / "out")
    with open(folder / "out", "rb") as file:
        os.fsync(file.fileno())


def convert_to_mcore(folder: Path) -> None:
    """tools/convert_hf.py hf-to-mcore."""
    from simpo_megatron.offline.convert import to_mcore
    from simpo_megatron.offline.weights import open_weights
    from simpo_megatron.parallel import alone

    with alone() as groups:
        to_mcore(open_weights(folder / "model", groups), folder / "out", groups)


def convert_to_hf(folder: Path) -> None:
    """tools/convert_hf.py mcore-to-hf."""
    from simpo_megatron.offline.convert import to_hf
    from simpo_megatron.offline.weights import open_weights
    from simpo_megatron.parallel import alone

    with alone() as groups:
        to_hf(open_weights(folder / "megatron", groups), folder / "out")


def prepare(folder: Path, num_layers: int) -> None:
    """Writes the model in a process of its own, because a child would inherit this process's peak memory."""
    subprocess.run([sys.executable, "-W", "ignore", __file__, "--prepare", str(folder), str(num_layers)], check=True)


SOURCES = {"mcore-to-hf": "megatron"}
METHODS = {
    "dd": copy_by_dd,
    "safetensors copy": copy_by_safetensors,
    "hf-to-mcore": convert_to_mcore,
    "mcore-to-hf": convert_to_hf,
}


def measure(method: str, folder: Path) -> dict:
    """Returns wall and CPU seconds of `method`, and the peak memory in bytes of its process."""
    if method.startswith(("hf", "mcore")):
        from simpo_megatron.mcore import cpu_patches

        cpu_patches.install()
    elif method == "safetensors copy":
        import safetensors.torch  # noqa: F401
    for path in (folder / SOURCES.get(method, "model")).rglob("*"):
        if path.is_file():
            subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M", "status=none"], check=True)
    os.sync()
    before, start = cpu_seconds(), time.perf_counter()
    METHODS[method](folder)
    wall, cpu = time.perf_counter() - start, cpu_seconds() - before
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"wall": wall, "cpu": cpu, "peak": peak * 1024}


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_apart(method: str, folder: Path) -> dict:
    """Returns the same from a process of its own; its output is deleted, except for the first checkpoint."""
    taken = run([sys.executable, "-W", "ignore", __file__, "--measure", method, str(folder)])
    out, kept = folder / "out", folder / "megatron"
    if method == "hf-to-mcore" and not kept.exists():
        out.rename(kept)
    elif out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()
    return taken


def run(command: list[str]) -> dict:
    """Returns the JSON object that `command` prints on its last line."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_round(folder: Path, bridge_python: str | None) -> dict[str, dict]:
    """Returns the result of every method; `ratio` is its rate divided by that of the dd before and after it."""
    taken = {}
    before = first = measure_apart("dd", folder)
    for method in list(METHODS)[1:]:
        taken[method] = measure_apart(method, folder)
        after = measure_apart("dd", folder)
        taken[method]["ratio"] = (before["wall"] + after["wall"]) / 2 / taken[method]["wall"]
        before = after
    if bridge_python is not None:
        script = Path(__file__).with_name("bridge_convert.py")
        bridged = run([bridge_python, "-W", "ignore", str(script), str(folder / "model"), str(folder / "out")])
        shutil.rmtree(folder / "out")
        after = measure_apart("dd", folder)
        for way, one in bridged.items():
            taken[f"Megatron-Bridge {way}"] = {**one, "ratio": (before["wall"] + after["wall"]) / 2 / one["wall"]}
    return {"dd": {**first, "ratio": 1.0}, **taken}


def main() -> None:
    """Prepares the model, measures every method in every round and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="default 16: 1.24 billion parameters")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, default 3")
    parser.add_argument("--folder", help="where to write, up to four times the model; the system's temporary one")
    parser.add_argument("--bridge-python", metavar="PYTHON", help="measure Megatron-Bridge too, with this Python")
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=2, metavar=("FOLDER", "LAYERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        write_model(Path(arguments.prepare[0]), int(arguments.prepare[1]))
        return
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        prepare(folder / "model", arguments.layers)
        num_bytes = (folder / "model" / "model.safetensors").stat().st_size
        rounds = [measure_round(folder, arguments.bridge_python) for _ in range(arguments.rounds)]
    keep("convert", rounds)
    report(rounds, num_bytes)
    if arguments.bridge_python is None:
        print("Megatron-Bridge: not measured; --bridge-python names the Python that has it")


def report(rounds: list[dict[str, dict]], num_bytes: int) -> None:
    """Prints the medians of the rounds, the lowest ratio, and every bar that was missed."""
    print(f"{num_bytes / 2**30:.2f} GiB of weights, median of {len(rounds)} rounds")
    print("| method | wall s | GiB/s | rate of dd's | least | CPU s | memory MiB |\n|---|---|---|---|---|---|---|")
    for method in rounds[0]:
        taken = [one[method] for one in rounds]
        wall, cpu, ratio = (statistics.median(one[key] for one in taken) for key in ("wall", "cpu", "ratio"))
        least, peak = min(one["ratio"] for one in taken), max(one["peak"] for one in taken)
        print(
            f"| {method} | {wall:.1f} | {num_bytes / 2**30 / wall:.2f} | {ratio:.0%} | {least:.0%} | {cpu:.1f} | "
            f"{peak / 2**20:.0f} |"
        )
        if "mcore" in method and (least < RATE_BAR or peak > MEMORY_BAR):
            print(f"{method} misses the bar of {RATE_BAR:.0%} of dd's rate and {MEMORY_BAR / 2**30:.0f} GiB of memory")


if __name__ == "__main__":
    main()
