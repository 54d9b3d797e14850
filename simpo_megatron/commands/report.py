"""Writes the report of a run: the curves as a picture, and a page to open in a browser; or compares several runs.

simpo report runs/mine
simpo report runs/a runs/b runs/c

RUN_DIR is a run's --save folder. The files of one run are RUN_DIR/report.html and RUN_DIR/loss.png. Several runs are
compared on the same validation pairs, pair by pair, whatever their objectives; the page is comparison.html in the
folder that contains them all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.errors import SimPOError, report_error, visible


def main(argv: Sequence[str], prog: str = "simpo report") -> int:
    """The exit code: 0, or that of the error, which is printed."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="folder of a run; several are compared")
    folders = [Path(name) for name in parser.parse_args(argv).run_dirs]
    try:
        printed = _report(folders[0]) if len(folders) == 1 else _compare(folders)
    except SimPOError as error:
        return report_error(error)
    print(*map(visible, printed), sep="\n")
    return 0


def _report(folder: Path) -> list[str]:
    from simpo_megatron.reporting.run_report import write_report

    report = write_report(folder)
    return [report.headline, str(report.page), str(report.picture)]


def _compare(folders: Sequence[Path]) -> list[str]:
    from simpo_megatron.sweep.comparison import compare
    from simpo_megatron.sweep.evidence import read_evidence
    from simpo_megatron.sweep.page import compared_page, lines

    parent = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    found = compare({os.path.relpath(folder, parent): (read_evidence(folder),) for folder in folders})
    return [*lines(found), str(compared_page(found, parent))]
