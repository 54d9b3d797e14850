"""The report of a run, from its metrics.jsonl and config.yaml: loss.png and report.html."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from simpo_megatron.atomic import new_file, write_text
from simpo_megatron.config import Config, load_config, to_yaml
from simpo_megatron.errors import ConfigError, visible
from simpo_megatron.limits import read_bounded
from simpo_megatron.reporting.continuations import Samples, read_samples
from simpo_megatron.reporting.loggers import CONFIG_FILE, METRICS_FILE
from simpo_megatron.reporting.metric_names import evaluation_metric
from simpo_megatron.reporting.rendering import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_FILE = "loss.png"
PAGE_FILE = "report.html"
_MAX_LINE, _MAX_BYTES = 1 << 20, 1 << 28
_MAX_STEPS = 1 << 53
_LARGEST = 1e100

Point = tuple[int, float]
"""(iteration, value)."""


class _Row(NamedTuple):
    """A validation metric in the table of before and after."""

    metric: str
    title: str
    format: str
    meaning: str

    def ends(self, metrics: Mapping[str, Sequence[Point]]) -> tuple[str, str] | None:
        """(before, after); None for a metric with fewer than two evaluations."""
        points, start = metrics.get(self.metric, []), _first_iteration(metrics)
        if not points or points[-1][0] == start:
            return None
        before = self.format.format(points[0][1]) if points[0][0] == start else _NOT_THERE
        return before, self.format.format(points[-1][1])


_NOT_THERE = "n/a"
"""Shown instead of the accuracy before training where the reference still is the model itself."""

_VALIDATION_ROWS = (
    _Row("rewards/accuracies", "accuracy", "{:.1%}", "share of pairs whose chosen response has the higher reward"),
    _Row("rewards/margins", "reward margin", "{:+.3f}", "chosen minus rejected reward"),
    _Row("loss", "loss", "{:.4f}", "what training lowers"),
    _Row(
        "logps/chosen",
        "log-prob of chosen",
        "{:.3f}",
        "average per token, nats; it may fall while its lead over the rejected grows",
    ),
    _Row("logps/rejected", "log-prob of rejected", "{:.3f}", "average per token, nats"),
    _Row(
        "rewards/saturated",
        "saturated",
        "{:.1%}",
        "share of pairs whose loss is below 0.01, with hardly a gradient left",
    ),
    _Row(
        "rewards/length_correlation",
        "length correlation",
        "{:+.2f}",
        "of a response's average log-prob with its length",
    ),
    _Row("repetition", "repetition", "{:.1%}", "share of repeated 4-grams in greedy continuations"),
)
_NAMED_SET_ROWS = _VALIDATION_ROWS[:3]


@dataclass(frozen=True)
class Curves:
    """The points of a run by metric, in order of iterations; training and evaluations are separate."""

    training: dict[str, list[Point]]
    validation: dict[str, list[Point]]
    """Curves of the first or only validation set."""
    named: dict[str, dict[str, list[Point]]]
    """Curves of every validation set that has a name, by that name."""


@dataclass(frozen=True)
class Report:
    """The files of a report, and its headline."""

    page: Path
    picture: Path
    headline: str
    curves: Curves


def write_report(run_folder: str | Path) -> Report:
    """Writes loss.png and report.html into `run_folder`; returns them with the headline.

    Raises: ConfigError when the folder is not a run's, or cannot be written.
    """
    folder = Path(run_folder)
    curves = read_curves(folder / METRICS_FILE)
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder}: found no {CONFIG_FILE}, expected the folder of a run")
    config = load_config(["--config", str(folder / CONFIG_FILE)])
    report = Report(folder / PAGE_FILE, folder / PICTURE_FILE, headline_of(curves), curves)
    try:
        with new_file(report.picture) as draft:
            draw_curves(curves, config, draft)
        write_text(report.page, _page(curves, config, report))
    except OSError as error:
        raise ConfigError(f"{folder}: the report cannot be written ({error.strerror or error})") from None
    return report


def read_curves(path: Path) -> Curves:
    """The curves in a metrics.jsonl. Where a resumed run repeated a step, the later line is taken.

    Raises: ConfigError when the file is missing or holds no record.
    """
    try:
        lines = read_bounded(path, _MAX_BYTES).decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}), expected the metrics of a run") from None
    # By (set, metric), so that names of an earlier version continue in the same curve.
    values: dict[tuple[str, str] | str, dict[int, float]] = {}
    for record in map(_record, lines):
        for name, value in record.items():
            values.setdefault(evaluation_metric(name) or name, {})[int(record["iteration"])] = value
    if "iteration" not in values:
        raise ConfigError(f"{path}: found no record, expected the metrics of a run")
    curves = Curves({}, {}, {})
    for key, points in values.items():
        in_order = sorted(points.items())
        if isinstance(key, str):
            curves.training[key] = in_order
        else:
            of_set, metric = key
            group = curves.named.setdefault(of_set, {}) if of_set else curves.validation
            group[metric] = in_order
    return curves


def _record(line: str) -> dict[str, float]:
    """The numbers of one line; none for an incomplete line of a killed process."""
    try:
        record = json.loads(line) if len(line) <= _MAX_LINE else None
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or type(record.get("iteration")) is not int:
        return {}
    if not 0 <= record["iteration"] < _MAX_STEPS:
        return {}
    return {name: float(value) for name, value in record.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return value in ("nan", "inf", "-inf")
    # Larger numbers can be neither drawn nor added.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def draw_curves(curves: Curves, config: Config, path: Path) -> None:
    """Draws loss, reward margin and accuracy over the steps into a PNG of 1800 x 600 pixels."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    panels = (
        ("loss", "loss", None, ""),
        ("rewards/margins", "reward margin", config.objective.target_margin, "target margin"),
        ("rewards/accuracies", "accuracy", 0.5, "chance"),
    )
    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 11,
        "axes.titlesize": 13,
    }
    with rc_context(style):
        figure = Figure(figsize=(12, 4), layout="constrained")
        axes = figure.subplots(1, len(panels))
        for axis, (metric, title, reference, meaning) in zip(axes, panels, strict=True):
            _draw_panel(axis, curves, metric, reference, meaning)
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_xlabel("step")
        axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))
        axes[-1].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[-1].set_ylim(0, 1.02)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _draw_panel(axis: Axes, curves: Curves, metric: str, reference: float | None, meaning: str) -> None:
    train, smooth, validation = "#9db4c8", "#1f5582", "#d9622b"
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    if reference is not None:
        axis.axhline(reference, color="#777777", linewidth=1, linestyle=(0, (4, 3)))
        axis.annotate(
            meaning,
            (1, reference),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color="#666666",
            fontsize=9,
        )
    steps, values = _xy(curves.training.get(metric, []))
    axis.plot(steps, values, color=train, linewidth=1, label="training batch")
    if len(values) >= 10:
        axis.plot(steps, _smoothed(values), color=smooth, linewidth=2, label="running mean")
    steps, values = _xy(curves.validation.get(metric, []))
    if values:
        axis.plot(steps, values, color=validation, linewidth=2, marker="o", markersize=5, label="validation pairs")


def _xy(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    return [iteration for iteration, _ in points], [value for _, value in points]


def _smoothed(values: list[float]) -> list[float]:
    """Centred running means over about a tenth of the curve, narrower at its ends."""
    reach = max(1, len(values) // 20)
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        window = [value for value in values[i - near : i + near + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _page(curves: Curves, config: Config, report: Report) -> str:
    folder = report.page.parent
    return render(
        "run_report.html",
        title=f"{config.objective.title} run {folder.resolve().name}",
        headline=report.headline,
        validation=before_and_after(curves.validation),
        set_titles=[row.title for row in _NAMED_SET_ROWS],
        named_sets=_named_sets(curves),
        picture=base64.b64encode(report.picture.read_bytes()).decode(),
        samples=_samples(folder),
        facts=_facts(curves, config),
        config_path=folder / CONFIG_FILE,
        config=to_yaml(config),
    )


def headline_of(curves: Curves) -> str:
    """One sentence on accuracy and margin of the validation pairs, or of training batches without any."""
    accuracy, margin = (row.ends(curves.validation) for row in _VALIDATION_ROWS[:2])
    if accuracy is None or margin is None:
        evaluated = "rewards/margins" in curves.validation
        why = "Validation pairs were evaluated only once" if evaluated else "No validation pairs were evaluated"
        return f"{why}{_of_training(curves)}."
    # The first set with a name is taken.
    count, error, of_set = "", "", "".join(f" {name}" for name in list(curves.named)[:1])
    if "num_pairs" in curves.validation:
        num_pairs, share = curves.validation["num_pairs"][-1][1], curves.validation["rewards/accuracies"][-1][1]
        count = f"{num_pairs:,.0f} "
        if 0 <= share <= 1 and num_pairs > 0:
            error = f" (standard error {standard_error(share, num_pairs):.1%})"
    told = f"accuracy went from {accuracy[0]} to {accuracy[1]}{error} and the reward margin from {{}} to {{}}."
    if accuracy[0] == _NOT_THERE:
        told = (
            f"accuracy is {accuracy[1]}{error}; before training, when the policy is the reference, it is n/a. The "
            "reward margin went from {} to {}."
        )
    return f"On {count}validation pairs{of_set}, " + told.format(*margin)


def standard_error(share: float, num_pairs: float) -> float:
    """The standard error of a share of `num_pairs` pairs; of none and of all of them by Wilson's interval.

    The plain error is 0 there, as if the next pair could not differ. Wilson's is half the width of the interval
    of shares within one standard deviation.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), 209.
    """
    plain = math.sqrt(share * (1 - share) / num_pairs)
    return plain if 0 < share < 1 else 1 / (2 * (num_pairs + 1))


def _first_iteration(metrics: Mapping[str, Sequence[Point]]) -> int:
    """The iteration of the first evaluation."""
    return min((points[0][0] for points in metrics.values() if points), default=0)


def _of_training(curves: Curves) -> str:
    """Means over the first and the last tenth of the logged steps, where there are two steps or more."""
    ends = []
    for name, shape in (("loss", "{:.4f}"), ("rewards/accuracies", "{:.1%}")):
        _, values = _xy(curves.training.get(name, []))
        if len(values) < 2:
            return ""
        tenth = max(1, len(values) // 10)
        ends += [shape.format(sum(part) / tenth) for part in (values[:tenth], values[-tenth:])]
    return "; on training batches, the loss went from {} to {} and accuracy from {} to {}".format(*ends)


def before_and_after(metrics: Mapping[str, Sequence[Point]]) -> list[tuple[str, str, str, str]]:
    """(title, before, after, meaning) of each validation metric with two evaluations or more."""
    found = [(row, row.ends(metrics)) for row in _VALIDATION_ROWS]
    return [(row.title, *ends, row.meaning) for row, ends in found if ends is not None]


def _named_sets(curves: Curves) -> list[tuple[str, list[tuple[str, str] | None]]]:
    """(set, its numbers before and after by the rows of `_NAMED_SET_ROWS`); empty where there is only one set."""
    if len(curves.named) < 2:
        return []
    return [(name, [row.ends(metrics) for row in _NAMED_SET_ROWS]) for name, metrics in curves.named.items()]


def _samples(folder: Path) -> Samples | None:
    """The samples of the run, with characters that a page cannot encode replaced."""
    found = read_samples(folder)
    if found is None:
        return None

    def shown(texts: list[str]) -> list[str]:
        return [visible(text, keep="\n\t") for text in texts]

    return Samples(shown(found.prompts), found.before and shown(found.before), shown(found.after), found.iteration)


def _facts(curves: Curves, config: Config) -> list[tuple[str, str]]:
    objective, sizes = config.objective, config.parallel.sizes
    facts = [
        ("started from", config.model.model or "-"),
        ("trained model", config.model.export_hf or "not exported (--export-hf DIR)"),
        ("pairs", " ".join(config.data.data)),
        ("objective", f"{objective.title}, {objective.describe()}"),
        ("layout", f"tp {sizes.tensor} x pp {sizes.pipeline} x cp {sizes.context}"),
    ]
    steps = [iteration for iteration, _ in curves.training.get("loss", [])]
    if steps:
        batch, lr = config.batch.global_batch_size, config.optimizer.lr
        facts.append(("steps", f"{steps[-1]:,}, of {batch} pairs each, up to lr {lr:g}"))
    for name, title, shape in (
        ("pairs_per_second", "pairs per second", "{:.1f}"),
        ("tokens_per_second", "tokens per second", "{:,.0f}, padding apart"),
        ("peak_memory_gib", "peak memory", "{:.2f} GiB on rank 0"),
    ):
        values = sorted(value for _, value in curves.training.get(name, []))
        if values:
            # The median, because a first step has start-up costs. Peak memory never falls.
            typical = values[-1] if name == "peak_memory_gib" else values[len(values) // 2]
            facts.append((title, shape.format(typical)))
    return facts
