"""The request of a sweep: the options of its trials, the values to try, and their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from simpo_megatron.config import Config, load_config
from simpo_megatron.config.reading import Axes
from simpo_megatron.errors import ConfigError, require
from simpo_megatron.reporting.loggers import CONFIG_FILE
from simpo_megatron.sweep.points import SEED, Point, check_axes, grid, parse_axes
from simpo_megatron.sweep.rounds import Choose, Round, halving, num_rungs, rung_steps, staged, whole_grid

Order = Literal["grid", "staged"]
_SECTIONS_OF_RESULTS = ("objective", "model", "lora", "data", "pairs", "batch", "optimizer", "precision")
_OF_NO_RESULT = ("data_cache", "export_hf", "export_dtype", "export_adapter")
# Trials export nothing: an export can be made from any checkpoint later.
_OF_NO_TRIAL: Mapping[str, Any] = {"export_hf": None, "export_adapter": None, "resume": "latest"}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The trials of a sweep and their order; the same on every rank."""

    argv: tuple[str, ...]
    """The trainer's options, as they were given."""
    axes: Axes
    base: Config = field(repr=False)
    order: Order = "grid"
    halving: int | None = None
    """Factor of successive halving; None: every trial is a whole run."""
    keep: int | None = None
    """Settings whose checkpoints stay; None: all."""
    shared: bool = False
    """Several processes work on the sweep, each on trials of its own."""

    @property
    def folder(self) -> Path:
        assert self.base.run.save is not None, "read_sweep asks for a folder"
        return Path(self.base.run.save)

    @property
    def num_rungs(self) -> int:
        settings = grid({name: values for name, values in self.axes.items() if name != SEED})
        return 1 if self.halving is None else num_rungs(len(settings), self.halving)

    @property
    def settings(self) -> dict[str, Any]:
        """The options that all trials share and results depend on; if trials differ in length, the axes too."""
        every = asdict(self.base)
        common = {
            name: value
            for section in _SECTIONS_OF_RESULTS
            for name, value in every[section].items()
            if name not in self.axes and name not in _OF_NO_RESULT
        }
        if SEED not in self.axes:
            common[SEED] = self.base.run.seed
        return common if self.halving is None else {**common, "halving": self.halving, "sweep": self.axes}

    def rounds(self, choose: Choose) -> Iterator[Round]:
        """The rounds of trials; later ones depend on the ranking of earlier ones by `choose`."""
        if self.halving is not None:
            return halving(self.axes, self.halving, choose)
        if self.order == "staged":
            return staged(self.axes, self.base.flat(), choose)
        return whole_grid(self.axes)

    def steps_of(self, point: Point, full_steps: int) -> int | None:
        """Optimizer steps of a trial that is shorter than `full_steps`; None of a whole one."""
        if self.halving is None or point.rung is None or point.rung == self.num_rungs - 1:
            return None
        return rung_steps(full_steps, point.rung, self.num_rungs - 1, self.halving)

    def config_of(self, point: Point, train_iters: int | None = None) -> Config:
        """The configuration of a trial: an ordinary run's, in a folder of its own.

        Raises: ConfigError when its options do not fit together.
        """
        options: dict[str, Any] = {
            **_OF_NO_TRIAL,
            **point.options,
            "save": self.folder / point.folder,
            "data_cache": self.base.data.data_cache,
        }
        if train_iters is not None:
            options["train_iters"] = train_iters
        if self.base.run.tensorboard_dir is not None:
            options["tensorboard_dir"] = Path(self.base.run.tensorboard_dir) / point.folder
        return load_config(list(self.argv), axes={}, **options)


def read_sweep(
    argv: Sequence[str],
    axes: Sequence[str],
    *,
    order: Order = "grid",
    halving: int | None = None,
    keep: int | None = None,
    shared: bool = False,
) -> Sweep:
    """The sweep of the trainer's options `argv`, which may name a file with a mapping `sweep`, and of `axes` above it.

    Raises: ConfigError: any of its trials would be refused; raised before the first one runs.
    """
    of_file: Axes = {}
    base = load_config(list(argv), axes=of_file, **_OF_NO_TRIAL)
    every = of_file | parse_axes(axes)
    check_axes(every)
    require(base.run.save is not None, "save", None, "a folder for the sweep; add --save DIR")
    cache = base.data.data_cache or f"{base.run.save}/cache"
    base = replace(base, data=replace(base.data, data_cache=cache))
    sweep = Sweep(argv=tuple(argv), axes=every, base=base, order=order, halving=halving, keep=keep, shared=shared)
    _check(sweep)
    for point in grid(every):
        sweep.config_of(point)
    return sweep


def _check(sweep: Sweep) -> None:
    data = sweep.base.data
    require(
        bool(data.valid_data or data.valid_fraction) or "demo" in data.data,
        "valid_data",
        None,
        "validation pairs, by which trials are compared; add --valid-data FILE or --valid-fraction F",
    )
    if SEED in sweep.axes and data.valid_fraction:
        raise ConfigError(
            "valid_fraction: found it beside several seeds, which would each split off other pairs; expected "
            "--valid-data FILE"
        )
    if (sweep.folder / CONFIG_FILE).exists():
        raise ConfigError(f"save: found {sweep.folder}, the folder of a run, expected one for the sweep alone")
    require(sweep.keep is None or sweep.keep > 0, "keep", sweep.keep, "a number above 0")
    if sweep.halving is None:
        return
    require(sweep.halving > 1, "halving", sweep.halving, "a factor above 1, such as 3")
    require(sweep.order == "grid", "order", sweep.order, "grid with halving")
    for name in ("epochs", "train_iters"):
        require(name not in sweep.axes, "halving", sweep.halving, f"no axis {name} beside it, for it sets the steps")
