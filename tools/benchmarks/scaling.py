"""The growth of each cost, as a table and, with --picture, as a picture.

    python tools/benchmarks/scaling.py --quick
    python tools/benchmarks/scaling.py --picture docs/reference/scaling.png --page docs/reference/benchmarks.md
    python tools/benchmarks/scaling.py --only data --pairs 1000,10000

A step: CPU seconds a pair and peak memory against the length of pairs, the pack size, the share of prompt, the
vocabulary and the layers, each alone, on made-up pairs of exact lengths (step.py measures). Data: building the token
store, and opening it again, against the number of pairs (data.py). Save and resume against parameters (save.py). The
start against ranks on this machine, whose cores they share, so that CPU seconds count. Guards: messages and bytes
against any number of ranks (fake_ranks.py); these are counted, and alike on all machines.

Each point is a process of its own. `grows` is the exponent between the first and the last point: 1.0 is in proportion.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import data
import save
import step
from results import keep

MIB = 2**20
# A step of which one thing is changed at a time.
BASE = {"length": 512, "pack": 2048, "share": 0.5, "vocabulary": 8192, "layers": 4}
HIDDEN, PAIRS_A_STEP, NUM_STEPS = 256, 8, 3
STEPS = {
    "length": ("tokens of a pair", (256, 512, 1024, 2048), (256, 1024)),
    "pack": ("tokens of a pack", (512, 1024, 2048, 4096), (512, 2048)),
    "share": ("prompt's share of a pair", (0.1, 0.25, 0.5, 0.75, 0.9), (0.1, 0.9)),
    "vocabulary": ("ids", (2048, 8192, 32768, 131072), (2048, 32768)),
    "layers": ("layers", (2, 4, 8, 16), (2, 8)),
}
PAIRS, QUICK_PAIRS = (1000, 10_000, 100_000, 1_000_000), (300, 3000)
LAYERS_SAVED, QUICK_LAYERS_SAVED = (1, 4, 10, 20), (1, 4)
RANKS, QUICK_RANKS = (1, 2, 4, 8), (1, 2)
WORLDS, QUICK_WORLDS = (1, 2, 8, 64, 256, 1024, 4096), (2, 64, 1024)
# Phases that a run prints, put together.
PHASES = {
    "imports": ("imports",),
    "the rendezvous and groups": ("plan", "rendezvous", "groups"),
    "opening the data": ("data",),
    "model, weights and optimizer": ("model", "weights", "optimizer"),
    "checks and first evaluation": ("checks", "evaluation"),
    "the first step": ("first step",),
}
_START = re.compile(r"^start +first step done ([\d.]+) s .*?\(([\d.]+) s of CPU\): (.*), in s", re.MULTILINE)
_PHASE = re.compile(r"([a-z ]+) [\d.]+ \(([\d.]+)\)")
# Lines of a page between which the table stands.
_BEGIN, _END = "<!-- the table of tools/benchmarks/scaling.py -->", "<!-- the end of the table -->"
_HEAD = ["| cost | measure | against | found | grows |", "|---|---|---|---|---|"]


@dataclass
class Curve:
    """A cost at each value of what grows."""

    name: str
    against: str
    values: list[float] = field(default_factory=list)
    found: dict[str, list[float]] = field(default_factory=dict)
    """By measure with its unit, one number for each value."""

    def add(self, value: float, found: dict[str, float]) -> None:
        """Add the point at `value`."""
        self.values.append(value)
        for measure, number in found.items():
            self.found.setdefault(measure, []).append(number)

    def exponent(self, measure: str) -> float:
        """The power of the value with which a measure grows from the first point to the last; 0 where one is none."""
        numbers = self.found[measure]
        if numbers[0] <= 0 or numbers[-1] <= 0:
            return 0.0
        return math.log(numbers[-1] / numbers[0]) / math.log(self.values[-1] / self.values[0])

    def rows(self) -> list[str]:
        """Lines of a table in Markdown, one a measure."""
        points = ", ".join(map(_shown, self.values))
        return [
            f"| {self.name} | {measure} | {points} {self.against} | {', '.join(map(_shown, numbers))} "
            f"| {self.exponent(measure):.2f} |"
            for measure, numbers in self.found.items()
        ]


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"


def write_pairs(folder: Path, *, count: int, length: int, share: float, vocabulary: int) -> None:
    """Pairs of `length` tokens, and a tokenizer that makes one token of a word, in `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<s>", "</s>", "<unk>")
    num_words = vocabulary - len(special)
    ids = {word: number for number, word in enumerate((*special, *(f"w{number}" for number in range(num_words))))}
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    tokenizer = Tokenizer(models.WordLevel(ids, special[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "model")
    num_prompt = round(share * length)
    sizes = {"prompt": num_prompt, "chosen": (length - num_prompt) // 2, "rejected": (length - num_prompt + 1) // 2}
    with (folder / "pairs.jsonl").open("w") as file:
        for pair in range(count):
            row = {
                key: " ".join(f" w{(7 * pair + 31 * side + 3 * place) % num_words}" for place in range(sizes[key]))
                for side, key in enumerate(sizes)
            }
            file.write(json.dumps(row) + "\n")


def step_curve(name: str, quick: bool) -> Curve:
    """The cost of a step against one of its numbers."""
    against, values, few = STEPS[name]
    curve = Curve(f"step: {name}", against)
    for value in few if quick else values:
        chosen = {**BASE, name: value}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            count = PAIRS_A_STEP * NUM_STEPS
            shape = {key: chosen[key] for key in ("length", "share", "vocabulary")}
            write_pairs(folder, count=count, **shape)
            step.write_llama(
                folder / "model", vocab_size=chosen["vocabulary"], num_layers=chosen["layers"], hidden_size=HIDDEN
            )
            job = {
                "data": str(folder / "pairs.jsonl"),
                "model": str(folder / "model"),
                "cache": str(folder / "cache"),
                "chat_template": "none",
                "global_batch_size": PAIRS_A_STEP,
                "tokens_per_microbatch": max(chosen["pack"], chosen["length"] + 8),
                "max_length": 2 * chosen["length"],
                "num_steps": NUM_STEPS,
            }
            (folder / "job.json").write_text(json.dumps(job))
            found = step.measure("ours", folder / "job.json")
        curve.add(value, {"CPU ms a pair": 1e3 * found["cpu_per_pair"], "peak MiB": found["memory"] / MIB})
    return curve


def data_curve(counts: Iterable[int]) -> Curve:
    """The cost of a token store against its pairs."""
    curve = Curve("data", "pairs")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            data.prepare(data.BUNDLED, count, Path(folder))
            built, opened = (_in_a_process("data", what, folder) for what in ("build", "open"))
        curve.add(
            count,
            {
                "CPU s to build": built["cpu"],
                "MiB to build": built["peak"],
                "CPU s to open and plan a step": opened["cpu"],
                "MiB to open": opened["peak"],
            },
        )
    return curve


def measure_data(what: str, folder: Path) -> dict[str, float]:
    """CPU seconds and the peak of memory to build the store of the pairs in `folder`, or to open it and plan a step."""
    from simpo_megatron.data import BatchOptions, PairOptions, build_preference_dataset
    from simpo_megatron.data.batching import step_pairs

    options = PairOptions(max_length=data.MAX_LENGTH, max_prompt_length=data.MAX_PROMPT_LENGTH)
    tokenizer, before = data.load_tokenizer(folder), data.cpu_seconds()
    dataset = build_preference_dataset(
        [str(folder / "pairs.jsonl")], tokenizer, options, folder / "cache", num_workers=1
    )
    if what == "open":
        indices = step_pairs(len(dataset), 0, BatchOptions(global_batch_size=128, seed=1))
        assert dataset.lengths[indices].all()
    return {"cpu": data.cpu_seconds() - before, "peak": step.status_bytes("VmHWM") / MIB}


def save_curve(layers: Iterable[int]) -> Curve:
    """The cost of a checkpoint, and of a start from one, against parameters."""
    curve = Curve("save and resume", "million parameters")
    for num_layers in layers:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model, pairs = save.write_model(folder, num_layers)
            saves, _ = save.run(folder, "saved", model, pairs)
            mib, seconds, waited = saves[-1]
            starts = [
                save.start_of_run(folder, name, model, pairs, *flags)
                for name, flags in (("anew", ()), ("saved", ("--resume", "required")))
            ]
        curve.add(
            # 12 bytes of state for each, in fp32.
            mib * MIB / 12e6,
            {
                "s to save, all waiting": waited,
                "s until it is committed": seconds,
                "CPU s more to start from it": starts[1] - starts[0],
            },
        )
    return curve


def start_curve(numbers: Iterable[int]) -> Curve:
    """The cost of a start, from a rank's first moment to its first step, against ranks; as rank 0 prints it."""
    from simpo_megatron.demo import prepare_demo

    curve = Curve("start", "ranks on this machine")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        demo = prepare_demo(folder / "demo")
        options = ["--model", str(demo.model_dir), "--data", str(demo.train_file), "--valid-data", str(demo.valid_file)]
        options += ["--data-cache", str(folder), "--fp32", "--global-batch-size", "16", "--train-iters", "1"]
        options += ["--max-length", "512", "--max-prompt-length", "384", "--tokens-per-microbatch", "1024"]
        # The first start tokenises, and is not counted.
        for number, ranks in enumerate((1, *numbers)):
            found = _started(ranks, *options)
            if number:
                curve.add(ranks, found)
    return curve


def _started(ranks: int, *options: str) -> dict[str, float]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    printed = _output([*command, str(save.REPOSITORY / "examples/pretrain_simpo.py"), "--verbose", *options])
    ((seconds, cpu_seconds, phases),) = _START.findall(printed)
    of_phase = {name.strip(): float(cpu) for name, cpu in _PHASE.findall(phases)}
    parts = {f"CPU s a rank: {name}": sum(map(of_phase.__getitem__, parts)) for name, parts in PHASES.items()}
    return {"s to the first step": float(seconds), "CPU s a rank to it": float(cpu_seconds), **parts}


def ranks_curve(worlds: Iterable[int]) -> Curve:
    """The messages and bytes of guards against ranks."""
    import fake_ranks

    curve = Curve("guards", "ranks")
    with tempfile.TemporaryDirectory() as folder:
        model = fake_ranks.write_model(Path(folder))
        for world in worlds:
            received = fake_ranks.bytes_of_guards(world, model)
            when: dict[str, int] = {}
            for name, number in received.items():
                when[name.split(":")[0]] = when.get(name.split(":")[0], 0) + number
            found = {"messages a second at the store": world / fake_ranks.poll_seconds(world)}
            found |= {f"bytes at a {name}": number for name, number in when.items()}
            curve.add(world, {**found, "CPU s to make the groups": fake_ranks.seconds_of_groups(world)})
    return curve


def _in_a_process(*arguments: str) -> dict[str, float]:
    return json.loads(_output([__file__, "--measure", *arguments]).splitlines()[-1])


def _output(arguments: Sequence[str]) -> str:
    command = [sys.executable, "-W", "ignore", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def write_table(page: Path, rows: Sequence[str]) -> None:
    """Write the table between the two lines of `page` that mark its place."""
    before, begin, rest = page.read_text().partition(f"{_BEGIN}\n")
    _, end, after = rest.partition(f"\n{_END}\n")
    if not (begin and end):
        raise SystemExit(f"{page}: found no lines {_BEGIN} and {_END}, expected both; write them where the table goes")
    page.write_text("".join([before, begin, "\n", *(f"{row}\n" for row in rows), end, after]))


def draw(curves: list[Curve], path: Path) -> None:
    """Each measure against what grows, relative to the first point, both on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, curve in zip(panels, curves, strict=False):
        for measure, numbers in curve.found.items():
            first = next((number for number in numbers if number > 0), 1.0)
            axes.plot(curve.values, [number / first for number in numbers], marker=".", label=measure)
        in_proportion = [value / curve.values[0] for value in curve.values]
        axes.plot(curve.values, in_proportion, ":", color="gray", linewidth=1, label="in proportion")
        axes.set(xscale="log", yscale="log", title=curve.name, xlabel=curve.against, ylabel="times the first")
        axes.set_xticks(curve.values, [f"{value:,.9g}" for value in curve.values], fontsize=7)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.24))
    for axes in panels[len(curves) :]:
        axes.remove()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few points of each")
    parser.add_argument("--only", default="step,data,save,start,ranks", help="of step, data, save, start, ranks")
    parser.add_argument("--pairs", help="numbers of pairs of the data")
    parser.add_argument("--picture", type=Path, help="where to draw the table")
    parser.add_argument("--page", type=Path, help="a page of the documentation, whose table is replaced")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure_data(asked.measure[1], Path(asked.measure[2]))))
        return
    quick = asked.quick
    counts = [int(count) for count in asked.pairs.split(",")] if asked.pairs else QUICK_PAIRS if quick else PAIRS
    parts: dict[str, list[Callable[[], Curve]]] = {
        "step": [lambda name=name: step_curve(name, quick) for name in STEPS],
        "data": [lambda: data_curve(counts)],
        "save": [lambda: save_curve(QUICK_LAYERS_SAVED if quick else LAYERS_SAVED)],
        "start": [lambda: start_curve(QUICK_RANKS if quick else RANKS)],
        "ranks": [lambda: ranks_curve(QUICK_WORLDS if quick else WORLDS)],
    }
    print(*_HEAD, sep="\n")
    curves = []
    for part in asked.only.split(","):
        for measure in parts[part]:
            curves.append(measure())
            print(*curves[-1].rows(), sep="\n", flush=True)
    keep("scaling", [{**asdict(one), "grows": {what: one.exponent(what) for what in one.found}} for one in curves])
    if asked.picture:
        draw(curves, asked.picture)
    if asked.page:
        write_table(asked.page, [*_HEAD, *(row for curve in curves for row in curve.rows())])


if __name__ == "__main__":
    main()
