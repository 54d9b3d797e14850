"""A run's metrics on the terminal: one line per step in columns, and a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from simpo_megatron.errors import visible
from simpo_megatron.reporting.metric_names import EVALUATION_PREFIX, evaluation_metric, set_prefix

_HEADER_EVERY = 25
_WIDTH_OF_A_FILE = 180


class _Column(NamedTuple):
    """One column of a step line."""

    heading: str
    width: int
    format: str
    metrics: tuple[str, ...]
    always: bool = True
    """False for a column that only some machines have; it is shown when the first step has it."""


# c/r: chosen, then rejected.
_COLUMNS = (
    _Column("loss", 8, "{:.4f}", ("loss",)),
    _Column("margin", 9, "{:+.4f}", ("rewards/margins",)),
    _Column("accuracy", 9, "{:.1%}", ("rewards/accuracies",)),
    _Column("rewards c/r", 16, "{:.3f}/{:.3f}", ("rewards/chosen", "rewards/rejected")),
    _Column("log-probs c/r", 16, "{:.3f}/{:.3f}", ("logps/chosen", "logps/rejected")),
    _Column("grad norm", 10, "{:.3g}", ("grad_norm",)),
    _Column("lr", 9, "{:.1e}", ("learning_rate",)),
    _Column("pairs/s", 8, "{:.1f}", ("pairs_per_second",)),
    _Column("tokens/s", 9, "{:,.0f}", ("tokens_per_second",)),
    _Column("TFLOP/s", 8, "{:.3g}", ("tflops_per_gpu",), always=False),
    _Column("MFU", 4, "{:.0%}", ("mfu",), always=False),
    _Column("memory", 9, "{:.1f} GiB", ("peak_memory_gib",)),
    _Column("reserved", 9, "{:.1f} GiB", ("reserved_memory_gib",), always=False),
    _Column(
        "data/f+b/opt s",
        15,
        "{:.2f}/{:.2f}/{:.2f}",
        ("data_seconds", "forward_backward_seconds", "optimizer_seconds"),
        always=False,
    ),
)
# From the clock of the terminal's sink, in seconds; the last columns of every step line.
_ELAPSED, _LEFT = _Column("elapsed", 8, "", ()), _Column("left", 8, "", ())


class Terminal:
    """A line per step under a heading, with a progress bar on a terminal.

    Args:
        clock: seconds, for the elapsed and the remaining time.
    """

    def __init__(
        self, train_iters: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console()
        self._train_iters = train_iters
        self._num_lines = 0
        self._clock = clock
        self._opened = self._steps_began = clock()
        self._first_step: int | None = None
        self._columns: Sequence[_Column] = ()
        self._progress = Progress(
            "training",
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=train_iters)
        self._progress.start()

    def write(self, record: Mapping[str, Any]) -> None:
        if any(name.startswith(EVALUATION_PREFIX) for name in record):
            if self._first_step is None:
                self._steps_began = self._clock()
            for line in _evaluation_lines(record):
                self.say(line)
            return
        if self._num_lines == 0:
            width = self._console.width if self._console.is_terminal else _WIDTH_OF_A_FILE
            self._columns = _columns_within(width, 2 * len(str(self._train_iters)) + 1, record)
        if self._num_lines % _HEADER_EVERY == 0:
            headings = [column.heading for column in (*self._columns, _ELAPSED, _LEFT)]
            self.say(self._line("step", headings))
        self._num_lines += 1
        iteration = record["iteration"]
        self.advance(iteration)
        cells = [_cell(column.format, [record.get(name) for name in column.metrics]) for column in self._columns]
        line = self._line(f"{iteration}/{self._train_iters}", [*cells, *self._times(iteration)])
        self.say("; ".join([line, *_remarks(record)]))

    def advance(self, iteration: int) -> None:
        if self._first_step is None:
            self._first_step = iteration
        self._progress.update(self._task, completed=iteration)

    def say(self, *things: Any) -> None:
        shown = [visible(thing) if isinstance(thing, str) else thing for thing in things]
        self._console.print(*shown, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()

    def _times(self, iteration: int) -> tuple[str, str]:
        """Time since the log was opened, and the time left at the mean speed of this start's steps."""
        assert self._first_step is not None
        now, num_taken = self._clock(), iteration - self._first_step + 1
        left = (now - self._steps_began) / num_taken * (self._train_iters - iteration)
        return _hours(now - self._opened), _hours(left)

    def _line(self, step: str, cells: Sequence[str]) -> str:
        first = step.rjust(2 * len(str(self._train_iters)) + 1)
        widths = [column.width for column in (*self._columns, _ELAPSED, _LEFT)]
        return first + "".join(" " + cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _columns_within(width: int, first_width: int, record: Mapping[str, Any]) -> Sequence[_Column]:
    """The columns, from the left, that fit into `width` characters beside the first one and the times.

    Columns that only some machines have are included when `record` has them.
    """
    chosen, used = [], max(first_width, len("step")) + 2 + _ELAPSED.width + _LEFT.width
    for column in _COLUMNS:
        if not column.always and any(name not in record for name in column.metrics):
            continue
        used += 1 + column.width
        if used > width:
            break
        chosen.append(column)
    return chosen


def _cell(shape: str, values: Sequence[Any]) -> str:
    if any(value is None for value in values):
        return "-"
    return shape.format(*values)


def _remarks(record: Mapping[str, Any]) -> list[str]:
    """Remarks at the end of a step's line, about anything unusual."""
    remarks = []
    if "slowest_rank" in record:
        remarks.append(f"rank {record['slowest_rank']} is {record['slowest_rank_behind']:.0%} behind")
    if record.get("allocation_retries"):
        remarks.append(f"{record['allocation_retries']} allocation retries")
    return remarks


def _hours(seconds: float) -> str:
    """`seconds` as hours, minutes and seconds, as in 0:01:23."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _evaluation_lines(record: Mapping[str, Any]) -> list[str]:
    """A line for each validation set: those with names, or the only one."""
    found = [of_set for key in record if (of_set := evaluation_metric(key)) is not None]
    names = dict.fromkeys(name for name, _ in found if name) or {"": None}
    lines = []
    for name in names:
        shown = []
        for column in _COLUMNS[:3]:
            values = [record.get(set_prefix(name) + metric) for metric in column.metrics]
            if None not in values:
                shown.append(f"{column.heading} {column.format.format(*values)}")
        pairs = f"validation pairs {name}".strip()
        lines.append(f"{pairs} after {record['iteration']} steps: {', '.join(shown)}")
    return lines
