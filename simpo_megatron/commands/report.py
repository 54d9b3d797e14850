"""Writes the report of a run: the curves as a picture, and a page to open in a browser.

simpo report runs/mine

RUN_DIR is the folder that --save named. The files are RUN_DIR/report.html and RUN_DIR/loss.png.
"""

from __future__ import annotations

from collections.abc import Sequence

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.errors import SimPOError, report_error


def main(argv: Sequence[str], prog: str = "simpo report") -> int:
    """The exit code: 0, or that of the error, which is printed."""
    from simpo_megatron.reporting.run_report import write_report

    parser = CommandParser(prog, __doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of the run")
    try:
        report = write_report(parser.parse_args(argv).run_dir)
    except SimPOError as error:
        return report_error(error)
    print(f"{report.headline}\n{report.page}\n{report.picture}")
    return 0
