"""Runs arena-hard-auto's show_result.py with seeded random numbers, under a Python that has its packages.

`arena_hard_child.py CHECKOUT battles OUT BENCHMARK JUDGE` writes the verdicts as the official code reads them.
`arena_hard_child.py CHECKOUT table OUT ...` writes what `show_result.py ...` prints.
"""

import json
import random
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

_SEED = 42


def main(checkout: Path, what: str, out: Path, *arguments: str) -> None:
    """Do `what` in the working directory, which holds the benchmark's `data`."""
    sys.path.insert(0, str(checkout))
    if what == "table":
        table(checkout, out, arguments)
    else:
        battles(out, *arguments)


def table(checkout: Path, out: Path, arguments: tuple[str, ...]) -> None:
    """Write the printed table into `out`."""
    import numpy
    import torch

    random.seed(_SEED)
    numpy.random.seed(_SEED)
    torch.manual_seed(_SEED)
    sys.argv[:] = ["show_result.py", *arguments]
    with out.open("w", encoding="utf-8") as file, redirect_stdout(file):
        runpy.run_path(str(checkout / "show_result.py"), run_name="__main__")


def battles(out: Path, benchmark: str, judge: str) -> None:
    """Write the scores of each question's battles into `out`."""
    from show_result import load_judgments

    found = load_judgments([judge], benchmark)
    rows = [
        {"uid": uid, "category": category, "scores": [float(score) for score in group]}
        for (uid, category), group in found.groupby(["uid", "category"], sort=False)["scores"]
    ]
    out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
