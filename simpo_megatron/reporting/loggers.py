"""The sinks of a run's metrics: metrics.jsonl, TensorBoard, Weights & Biases, terminal. Only rank 0 writes."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from simpo_megatron.config import Config, to_yaml
from simpo_megatron.data import METRIC_GROUPS
from simpo_megatron.errors import ConfigError, visible
from simpo_megatron.limits import check_plain

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
EVALUATION_PREFIX = "eval/"
_EARLIER_PREFIX = "valid/"
"""Prefix of the metrics of named validation sets in a metrics.jsonl of version 0.1."""

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


def set_prefix(name: str) -> str:
    """The prefix of the metrics of the validation set `name`; "" is the first or only one."""
    return f"{EVALUATION_PREFIX}{name}/" if name else EVALUATION_PREFIX


def evaluation_metric(name: str) -> tuple[str, str] | None:
    """(set, metric) of a validation metric, with "" for the first or only set; None for any other metric."""
    prefix, _, rest = name.partition("/")
    first, slash, metric = rest.partition("/")
    if prefix + "/" not in (EVALUATION_PREFIX, _EARLIER_PREFIX) or not rest:
        return None
    if slash and (first not in METRIC_GROUPS or prefix + "/" == _EARLIER_PREFIX):
        return first, metric
    return "", rest


class Sink(Protocol):
    """A destination of records."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes the metrics of one step or evaluation, `iteration` included."""

    def close(self) -> None:
        """Flushes everything."""


class RunLog:
    """The sinks of a run; a rank that does not log has none.

    A context manager, so that a run that fails keeps its log.
    """

    def __init__(self, sinks: Sequence[Sink], terminal: Terminal | None = None) -> None:
        self._sinks = sinks
        self._terminal = terminal

    def step(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Records a training step, counted from 1."""
        self._write({"iteration": iteration, **metrics})

    def evaluation(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Records an evaluation after `iteration` steps; its metrics are called `eval/...` and `eval/NAME/...`."""
        self._write({"iteration": iteration, **metrics})

    def advance(self, iteration: int) -> None:
        """Advances the progress bar, also for a step that is not recorded."""
        if self._terminal is not None:
            self._terminal.advance(iteration)

    def say(self, *things: Any) -> None:
        """Prints texts or tables above the progress bar."""
        if self._terminal is not None:
            self._terminal.say(*things)

    def _write(self, record: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()


def open_run_log(
    config: Config, extra_sinks: Sequence[Sink] = (), *, train_iters: int, is_logging_rank: bool
) -> RunLog:
    """The log of a run: the sinks of `config` and `extra_sinks` on the logging rank, none on others.

    It makes the run's folder, writes config.yaml into it, and continues an existing metrics.jsonl.

    Raises: ConfigError when the folder cannot be written.
    """
    if not is_logging_rank:
        return RunLog([])
    run = config.run
    sinks: list[Sink] = []
    if run.save is not None:
        sinks.append(JsonLines(_made_run_folder(config, Path(run.save)) / METRICS_FILE))
    if run.tensorboard_dir is not None:
        sinks.append(TensorBoard(run.tensorboard_dir))
    if run.wandb_project is not None:
        sinks.append(WeightsAndBiases(run.wandb_project, config))
    terminal = Terminal(train_iters)
    return RunLog([*(Steady(sink, terminal.say) for sink in sinks), *extra_sinks, terminal], terminal)


def _made_run_folder(config: Config, folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"save: found {folder}, expected a folder that can be written ({error.strerror})") from None
    return folder


def check_sinks(config: Config) -> None:
    """Raises ConfigError when a sink of `config` needs a package that is missing."""
    for key, package, remedy in (
        ("tensorboard_dir", "tensorboard", "pip install tensorboard"),
        ("wandb_project", "wandb", "pip install 'simpo-megatron[wandb]', or leave it out"),
    ):
        if getattr(config.run, key) is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{key}: found no {package}, expected it to be installed; {remedy}")


class Steady:
    """A sink whose failures cost a warning and its records, but not the run."""

    def __init__(self, sink: Sink, say: Callable[[str], None]) -> None:
        self._sink, self._say, self._num_lost = sink, say, 0

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            self._sink.write(record)
        except Exception as error:
            self._num_lost += 1
            if self._num_lost == 1:
                self._say(f"WARNING   {self._name}: could not be written ({error}); the run goes on without")

    def close(self) -> None:
        try:
            self._sink.close()
        except Exception as error:
            self._say(f"WARNING   {self._name}: could not be closed ({error})")
        if self._num_lost:
            self._say(f"WARNING   {self._name}: {self._num_lost:,} records were lost")

    @property
    def _name(self) -> str:
        return str(self._sink) if isinstance(self._sink, JsonLines) else type(self._sink).__name__


class JsonLines:
    """One JSON object per line, flushed when `write` returns; a float that is not finite is text."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            _end_last_line(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        finite = {name: _json_value(value) for name, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __str__(self) -> str:
        return str(self._path)


def _json_value(value: Any) -> Any:
    """`value` with every float that JSON has no number for as the text `nan`, `inf` or `-inf`."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value


def _end_last_line(path: Path) -> None:
    """Ends an incomplete last line of a killed process, so that the next record has its own line.

    Raises: OSError when `path` is not a regular file; writing into a pipe would wait for a reader.
    """
    if not path.exists():
        return
    check_plain(path, sys.maxsize)
    if path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")


class TensorBoard:
    """Scalars for TensorBoard."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["iteration"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Scalars for Weights & Biases; its client takes the key from the environment. The run has its folder's name."""

    def __init__(self, project: str, config: Config) -> None:
        import wandb

        name = None if config.run.save is None else Path(config.run.save).name
        self._run = wandb.init(project=project, name=name, config=config.flat())

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(_numbers(record), step=record["iteration"])

    def close(self) -> None:
        self._run.finish()


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in record.items()
        if name != "iteration" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


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
