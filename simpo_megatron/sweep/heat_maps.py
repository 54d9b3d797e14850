"""The pictures of a comparison: accuracy over two options, and accuracy against the chosen responses' displacement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from simpo_megatron.sweep.comparison import Row
from simpo_megatron.sweep.ranking import Standing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"best": "#1f5582", "level with the best": "#5b93c5", "behind": "#b3bcc5", "ruled out": "#c8324b"}


def draw_heat_map(
    at: Mapping[tuple[int, int], Row], down: str, down_labels: Sequence[str], across: str, across_labels: Sequence[str]
) -> Figure:
    """Accuracy by two options; the best and those level with it are framed, those ruled out are crossed out."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    shares = np.full((len(down_labels), len(across_labels)), np.nan)
    for place, row in at.items():
        shares[place] = row.standing.accuracy.mean
    size = (2.2 + 1.25 * len(across_labels), 1.4 + 0.75 * len(down_labels))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    low, high = np.nanmin(shares), np.nanmax(shares)
    # The colour scale spans at least two points of accuracy, so that tiny differences look tiny.
    middle, reach = (low + high) / 2, max(high - low, 0.02) / 2
    axis.imshow(shares, cmap="Blues", vmin=middle - 1.6 * reach, vmax=middle + 1.6 * reach, aspect="auto")
    for (i, j), row in at.items():
        is_dark = shares[i, j] > middle + 0.4 * reach
        text = f"{shares[i, j]:.1%}" + ("\nruled out" if row.ruled_out else "")
        axis.text(j, i, text, ha="center", va="center", color="white" if is_dark else "#1d2731", fontsize=10)
        if row.verdict in ("best", "level with the best"):
            width = 3.0 if row.verdict == "best" else 1.5
            axis.add_patch(
                Rectangle((j - 0.47, i - 0.46), 0.94, 0.92, fill=False, edgecolor="#d9622b", linewidth=width)
            )
    axis.set_xticks(range(len(across_labels)), across_labels)
    axis.set_yticks(range(len(down_labels)), down_labels)
    axis.set_xlabel(across)
    axis.set_ylabel(down)
    axis.tick_params(length=0)
    axis.set_title("accuracy; framed: best, level with it", fontsize=10, loc="left")
    return figure


def draw_scatter(rows: Sequence[Row], start: Standing | None) -> Figure:
    """Accuracy of every setting, with its interval, against the change of the chosen responses' log-prob.

    The model they started from, if it is known, is a hollow circle. The numbers are the settings' places in `rows`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.5, 4.0), layout="constrained")
    axis = figure.subplots()
    for verdict, color in _COLORS.items():
        shown = [row for row in rows if row.verdict == verdict]
        if not shown:
            continue
        accuracies = [row.standing.accuracy for row in shown]
        means = [one.mean for one in accuracies]
        errors = [[one.mean - one.low for one in accuracies], [one.high - one.mean for one in accuracies]]
        moved = [row.displacement or 0.0 for row in shown]
        axis.errorbar(moved, means, yerr=errors, fmt="o", color=color, label=verdict, capsize=3, elinewidth=1)
    for number, row in enumerate(rows, 1):
        place = (row.displacement or 0.0, row.standing.accuracy.mean)
        axis.annotate(str(number), place, xytext=(5, 3), textcoords="offset points", fontsize=9)
    if start is not None:
        one = start.accuracy
        error = [[one.mean - one.low], [one.high - one.mean]]
        axis.errorbar([0], [one.mean], yerr=error, fmt="o", color="#777777", mfc="white", label="start", capsize=3)
    axis.axvline(0, color="#777777", linewidth=1, linestyle=(0, (4, 3)))
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("change of chosen responses' log-prob since step 0, nats per token")
    axis.set_ylabel("accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(loc="outside upper right", ncols=5, frameon=False, fontsize=9)
    return figure
