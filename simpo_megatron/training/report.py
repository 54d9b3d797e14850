"""What a run achieved, from its metrics.jsonl and config.yaml: a picture of the curves and a page to open."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from simpo_megatron.config import Config, load_config, to_yaml
from simpo_megatron.errors import ConfigError
from simpo_megatron.training.loggers import CONFIG_FILE, EVALUATION_PREFIX, METRICS_FILE, NAMED_SET

PICTURE_FILE = "loss.png"
PAGE_FILE = "report.html"

# Metric, title, format and what is good, for the table of held-out pairs before and after.
_HELD_OUT_ROWS = (
    (
        "rewards/accuracies",
        "accuracy",
        "{:.1%}",
        "share of pairs whose chosen response has the higher reward",
    ),
    ("rewards/margins", "reward margin", "{:+.3f}", "chosen minus rejected reward"),
    ("loss", "loss", "{:.4f}", "what training lowers"),
    (
        "logps/chosen",
        "log-prob of chosen",
        "{:.3f}",
        "average per token, nats; it may fall while its lead over the rejected grows",
    ),
    ("logps/rejected", "log-prob of rejected", "{:.3f}", "average per token, nats"),
    (
        "rewards/saturated",
        "saturated",
        "{:.1%}",
        "share of pairs whose loss is below 0.01, with hardly a gradient left",
    ),
    (
        "rewards/length_correlation",
        "length correlation",
        "{:+.2f}",
        "of a response's average log-prob with its length",
    ),
    ("repetition", "repetition", "{:.1%}", "share of repeated 4-grams in greedy continuations"),
)


@dataclass(frozen=True)
class Curves:
    """A run's numbers by metric: (iteration, value) in order, training steps and evaluations apart."""

    training: dict[str, list[tuple[int, float]]]
    held_out: dict[str, list[tuple[int, float]]]
    """Of the first held-out set."""
    named: dict[str, dict[str, list[tuple[int, float]]]]
    """Of every held-out set that has a name, by that name."""


@dataclass(frozen=True)
class Report:
    """What was written, and the one sentence that says how it went."""

    page: Path
    picture: Path
    headline: str
    curves: Curves


def write_report(run_folder: str | Path) -> Report:
    """The report, after loss.png and report.html were written into `run_folder`.

    Raises: ConfigError when the folder is not that of a run.
    """
    folder = Path(run_folder)
    curves = read_curves(folder / METRICS_FILE)
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder}: found no {CONFIG_FILE}, expected the folder of a run")
    config = load_config(["--config", str(folder / CONFIG_FILE)])
    report = Report(folder / PAGE_FILE, folder / PICTURE_FILE, headline_of(curves), curves)
    draw_curves(curves, config, report.picture)
    report.page.write_text(_page(curves, config, report), encoding="utf-8")
    return report


def read_curves(path: Path) -> Curves:
    """The curves in a metrics.jsonl. Where a resumed run did a step again, the later line counts.

    Raises: ConfigError when the file is missing or holds no record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}), expected the metrics of a run") from None
    values: dict[str, dict[int, float]] = {}
    for record in map(_record, lines):
        for name, value in record.items():
            values.setdefault(name, {})[int(record["iteration"])] = value
    if "iteration" not in values:
        raise ConfigError(f"{path}: found no record, expected the metrics of a run")
    curves = Curves({}, {}, {})
    for name, points in values.items():
        in_order = sorted(points.items())
        if match := NAMED_SET.fullmatch(name):
            curves.named.setdefault(match[1], {})[match[2]] = in_order
        elif name.startswith(EVALUATION_PREFIX):
            curves.held_out[name.removeprefix(EVALUATION_PREFIX)] = in_order
        else:
            curves.training[name] = in_order
    return curves


def _record(line: str) -> dict[str, float]:
    """The numbers of one line; none of a line that a killed process left half-written."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
        return {}
    return {name: float(value) for name, value in record.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return value in ("nan", "inf", "-inf")
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def draw_curves(curves: Curves, config: Config, path: Path) -> None:
    """Draw loss, reward margin and accuracy over the steps into a PNG of 1800 x 600 pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    panels = (
        ("loss", "loss", None, ""),
        ("rewards/margins", "reward margin", config.objective.target_margin, "target margin"),
        ("rewards/accuracies", "accuracy", 0.5, "chance"),
    )
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "axes.titlesize": 13}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, len(panels), figsize=(12, 4), layout="constrained")
        for axis, (metric, title, reference, meaning) in zip(axes, panels, strict=True):
            _draw_panel(axis, curves, metric, reference, meaning)
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_xlabel("step")
        axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))
        axes[-1].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[-1].set_ylim(0, 1.02)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
        figure.savefig(path, dpi=150, metadata={"Software": None})
        plt.close(figure)


def _draw_panel(axis, curves: Curves, metric: str, reference: float | None, meaning: str) -> None:
    train, smooth, held_out = "#9db4c8", "#1f5582", "#d9622b"
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
    steps, values = _xy(curves.held_out.get(metric, []))
    if values:
        axis.plot(steps, values, color=held_out, linewidth=2, marker="o", markersize=5, label="held-out pairs")


def _xy(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
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


_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #1d2731 }
  body { max-width: 64rem; margin: 2.5rem auto; padding: 0 1rem }
  h1 { font-size: 1.6rem; margin-bottom: .2rem }
  h2 { font-size: 1.1rem; margin-top: 2rem }
  .headline { font-size: 1.2rem; color: #1f5582 }
  .note { color: #66707a }
  table { border-collapse: collapse }
  th, td { text-align: left; padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid #e3e7eb }
  td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
  img { width: 100%; height: auto }
  pre { background: #f5f7f9; padding: 1rem; overflow-x: auto; font-size: .85rem }
</style>
<h1>$title</h1>
<p class="headline">$headline</p>
$held_out
$named_sets
<h2>Curves</h2>
<img src="data:image/png;base64,$picture" alt="loss, reward margin and accuracy over the steps">
<h2>Run</h2>
<table>
$facts
</table>
<h2>Configuration</h2>
<details><summary class="note">every option; the same file starts the same run: --config $config_path</summary>
<pre>$config</pre></details>
</html>
""")


def _page(curves: Curves, config: Config, report: Report) -> str:
    folder = report.page.parent
    picture = base64.b64encode(report.picture.read_bytes()).decode()
    facts = "\n".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in _facts(curves, config)
    )
    return _PAGE.substitute(
        title=escape(f"{config.objective.title} run {folder.resolve().name}"),
        headline=escape(report.headline),
        held_out=_held_out_table(curves),
        named_sets=_named_sets_table(curves),
        picture=picture,
        facts=facts,
        config_path=escape(str(folder / CONFIG_FILE)),
        config=escape(to_yaml(config)),
    )


def headline_of(curves: Curves) -> str:
    """One sentence on how the held-out pairs fared, or the training batches where nothing else tells."""
    accuracy, margin = (curves.held_out.get(name, []) for name in ("rewards/accuracies", "rewards/margins"))
    if len(accuracy) < 2 or len(margin) < 2:
        why = "Held-out pairs were evaluated only once" if accuracy else "No held-out pairs were evaluated"
        return f"{why}{_of_training(curves)}."
    # The first set that has a name is the one that is told of.
    count, error, of_set = "", "", "".join(f" {name}" for name in list(curves.named)[:1])
    if "num_pairs" in curves.held_out:
        num_pairs, share = curves.held_out["num_pairs"][-1][1], accuracy[-1][1]
        count = f"{num_pairs:,.0f} "
        error = f" (standard error {math.sqrt(share * (1 - share) / num_pairs):.1%})"
    return (
        f"On {count}held-out pairs{of_set}, accuracy went from {accuracy[0][1]:.1%} to {accuracy[-1][1]:.1%}{error} "
        f"and the reward margin from {margin[0][1]:+.3f} to {margin[-1][1]:+.3f}."
    )


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


def before_and_after(metrics: Mapping[str, list[tuple[int, float]]]) -> list[tuple[str, str, str, str]]:
    """(title, before, after, meaning) of each metric of held-out pairs that was taken twice or more."""
    rows = []
    for metric, title, shape, meaning in _HELD_OUT_ROWS:
        points = metrics.get(metric, [])
        if len(points) > 1:
            rows.append((title, shape.format(points[0][1]), shape.format(points[-1][1]), meaning))
    return rows


def _held_out_table(curves: Curves) -> str:
    rows = [
        f'<tr><td>{escape(title)}</td><td class="number">{before}</td><td class="number">{after}</td>'
        f'<td class="note">{escape(meaning)}</td></tr>'
        for title, before, after, meaning in before_and_after(curves.held_out)
    ]
    if not rows:
        return ""
    number = '<th class="number">'
    heading = f"<tr><th>held-out pairs</th>{number}before</th>{number}after</th><th></th></tr>"
    return "<table>\n" + "\n".join([heading, *rows]) + "\n</table>"


def _named_sets_table(curves: Curves) -> str:
    """Each named set's numbers before and after, a row a set; nothing where one set says it all already."""
    if len(curves.named) < 2:
        return ""
    rows = _HELD_OUT_ROWS[:3]
    number = '<th class="number">'
    heading = "".join(f"{number}{escape(title)}</th>" for _, title, _, _ in rows)
    lines = [f"<tr><th>held-out set, before and after</th>{heading}</tr>"]
    for name, metrics in curves.named.items():
        cells = ""
        for metric, _, shape, _ in rows:
            points = metrics.get(metric, [])
            shown = " &rarr; ".join(shape.format(points[i][1]) for i in (0, -1)) if len(points) > 1 else "-"
            cells += f'<td class="number">{shown}</td>'
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


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
        ("peak_memory_gib", "peak memory", "{:.2f} GiB on the logging rank"),
    ):
        values = sorted(value for _, value in curves.training.get(name, []))
        if values:
            # The median: a first step carries start-up costs. Peak memory only ever grows.
            typical = values[-1] if name == "peak_memory_gib" else values[len(values) // 2]
            facts.append((title, shape.format(typical)))
    return facts
