"""The end that commands share whose work yields lines: each is printed as it comes, and an error ends the command."""

from __future__ import annotations

from collections.abc import Iterable

from simpo_megatron.errors import SimPOError, report_error, visible
from simpo_megatron.logs import logged


def print_lines(work: Iterable[str]) -> int:
    """The exit code of `work`, whose lines are printed: 0 at its end, else that of its error, which is printed."""
    try:
        with logged():
            for line in work:
                print(visible(line), flush=True)
    except SimPOError as error:
        return report_error(error)
    return 0
