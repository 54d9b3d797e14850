"""All benchmarks, each in a short form, and one JSON file with machine, commit, results and ratios.

    python tools/benchmarks/bench.py build/bench.json
    python tools/benchmarks/bench.py build/bench.json --only step,data

`make bench` runs it, in less than 20 minutes on two quiet cores. A ratio says how much ours takes of what it is set
beside. Numbers of so few rounds vary by some percent, those of a busy machine by more. A benchmark that fails is named
at the end, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from results import VARIABLE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MAX_SECONDS = 400
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
BENCHMARKS: dict[str, Sequence[str]] = {
    "start": ("start.py", "--rounds", "1"),
    # The compiled methods take longer to compile than all others to run.
    "loss": (
        *("loss.py", "--rounds", "1", "--shape", "512x16384:4x1024"),
        *("--methods", "ours,princeton,trl,liger,megatron"),
    ),
    "step": ("step.py", "--num-steps", "3", "--global-batch-size", "8", "--methods", "ours,trl-1"),
    "data": ("data.py", "--count", "2000", "--num-workers", "1", "--rounds", "1"),
    "save": ("save.py", "--layers", "4", "--rounds", "1"),
    "convert": ("convert.py", "--layers", "2", "--rounds", "1"),
    "guards": ("guards.py", "--tp", "2", "--train-iters", "12", "--no-probe-memory"),
    "scaling": ("scaling.py", "--quick"),
    "roofline": ("roofline.py",),
}


def run(name: str, kept: Path, triton_python: str | None) -> float | None:
    """Seconds that a benchmark took, its results in the file `kept`; None when it failed."""
    script, *options = BENCHMARKS[name]
    python = triton_python if name == "roofline" else sys.executable
    if python is None:
        print("not run: --triton-python names a Python that has Triton", flush=True)
        return 0.0
    launcher = TORCHRUN if name == "guards" else ()
    # A run of its own, not that of `make demo`.
    options = [*options, "--save", str(kept.parent / "run")] if name == "guards" else options
    environment = {
        **os.environ,
        VARIABLE: str(kept),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    begun = time.perf_counter()
    try:
        subprocess.run([python, *launcher, HERE / script, *options], env=environment, check=True, timeout=MAX_SECONDS)
    except subprocess.SubprocessError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return None
    return time.perf_counter() - begun


def machine() -> dict[str, Any]:
    """The machine and the versions that results depend on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "load before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "transformers")},
    }


def commit() -> str:
    """The commit of this checkout, and whether it was changed since."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
    )
    return told.stdout.strip() or "unknown"


def ratios(results: Mapping[str, Any]) -> dict[str, float]:
    """The share that ours takes of what it is compared with, and the exponents of what grows."""
    return {name: round(number, 4) for name, number in _ratios(results)}


def _ratios(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if "start" in results:
        ours, trl = (min(one["cpu"] for one in results["start"][side]) for side in ("ours", "trl"))
        yield "start: CPU seconds of TRL's", ours / trl
    for name, methods in results.items():
        if name.startswith("loss "):
            ours = methods["ours"]
            for method, report in methods.items():
                if method != "ours" and "seconds" in report:
                    yield f"{name}: CPU seconds of {method}'s", ours["seconds"] / report["seconds"]
    if "step" in results:
        for measure, what in (("cpu_per_pair", "CPU seconds a pair"), ("memory", "memory")):
            yield f"step: {what} of TRL's", results["step"]["ours"][measure] / results["step"]["trl-1"][measure]
    if "data" in results:
        ours, trl = (results["data"][f"{side}, 1 processes"][0] for side in ("ours", "trl"))
        yield "data: CPU seconds of TRL's", ours["cpu"] / trl["cpu"]
    if "save" in results:
        waits = [min(waited for _, _, waited in way["saves"]) for way in results["save"].values()]
        yield "save: waiting in the background of waiting at once", waits[1] / waits[0]
    if "guards" in results:
        for name, when, seconds, calls in results["guards"]["rows"]:
            yield f"guards: {name}, {calls} a {when}, of a step", calls * seconds / results["guards"]["step seconds"]
    for curve in results.get("scaling", []):
        yield from ((f"scaling: {curve['name']}, {measure}, exponent", n) for measure, n in curve["grows"].items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the JSON file to write")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="of " + ", ".join(BENCHMARKS))
    parser.add_argument("--triton-python", help="a Python that has Triton, for the roofline")
    asked = parser.parse_args()
    told = {"machine": machine(), "commit": commit()}
    with tempfile.TemporaryDirectory() as folder:
        kept, seconds = Path(folder) / "results.json", {}
        for name in asked.only.split(","):
            print(f"\n== {name}", flush=True)
            seconds[name] = run(name, kept, asked.triton_python)
        results = json.loads(kept.read_text()) if kept.exists() else {}
    found = ratios(results)
    asked.file.parent.mkdir(parents=True, exist_ok=True)
    asked.file.write_text(
        json.dumps({**told, "seconds": seconds, "ratios": found, "results": results}, indent=1) + "\n"
    )
    print(f"\n== {asked.file}", *(f"{number:8.3f}  {name}" for name, number in found.items()), sep="\n")
    failed = [name for name, taken in seconds.items() if taken is None]
    if failed:
        print(f"== FAILED: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
