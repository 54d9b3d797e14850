"""The sinks of a run's metrics: metrics.jsonl, TensorBoard, Weights & Biases, terminal. Only rank 0 writes."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from simpo_megatron.config import Config, to_yaml
from simpo_megatron.errors import ConfigError
from simpo_megatron.limits import check_plain

if TYPE_CHECKING:
    from simpo_megatron.reporting.terminal import Terminal

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"


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
    from simpo_megatron.reporting.terminal import Terminal  # loads rich

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
                self._say(f"WARNING   {self._name}: could not be written ({error}); the run continues without it")

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
