"""The results of a comparison: an HTML page, JSON, lines for the terminal, and the best setting as YAML."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simpo_megatron.atomic import write_text
from simpo_megatron.config import Config, to_yaml
from simpo_megatron.config.reading import Axes
from simpo_megatron.loss import SimPOObjective
from simpo_megatron.reporting.rendering import render
from simpo_megatron.sweep.comparison import GAP_QUANTILES, Ranking, Row
from simpo_megatron.sweep.heat_maps import draw_heat_map, draw_scatter
from simpo_megatron.sweep.points import SEED, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_FILE, DATA_FILE, BEST_FILE = "sweep.html", "sweep.json", "best.yaml"
COMPARISON_FILE = "comparison.html"


@dataclass(frozen=True)
class Picture:
    """A picture and its alternative text."""

    png: str
    """Base64."""
    text: str


def write_results(folder: Path, found: Ranking, axes: Axes, earlier: Mapping[str, Ranking] | None = None) -> None:
    """Write the page of a sweep into its folder, its data, and the configuration of the best setting.

    Args:
        earlier: rounds of shorter trials, by their titles.
    """
    data = as_json(found) | {"earlier_rounds": {title: as_json(one) for title, one in (earlier or {}).items()}}
    write_text(folder / DATA_FILE, json.dumps(_finite(data), indent=1, allow_nan=False) + "\n")
    html = page(found, title=f"Sweep {folder.resolve().name}", axes=axes, earlier=earlier)
    write_text(folder / PAGE_FILE, html)
    if found.best is not None:
        write_text(folder / BEST_FILE, _best_yaml(folder, found.best.runs[0].config))


def page(found: Ranking, *, title: str, axes: Axes, earlier: Mapping[str, Ranking] | None = None) -> str:
    """The HTML page of a comparison, self-contained."""
    every = [found, *(earlier or {}).values()]
    return render(
        "sweep.html",
        title=title,
        headline=found.headline,
        scatter=_scatter(found) if found.rows else None,
        last=_shown(found, axes),
        earlier={name: _shown(one, axes) for name, one in (earlier or {}).items()},
        ruled_out=[(row.name, "; ".join(row.ruled_out)) for one in every for row in one.rows if row.ruled_out],
        failed=[failure for one in every for failure in one.failed.items()],
        gaps=_gap_lines(found),
    )


def _shown(found: Ranking, axes: Axes) -> dict[str, Any]:
    """The heat maps and the table's rows of one round."""
    varied = [name for name, values in axes.items() if len(values) > 1 and name != SEED]
    maps = [drawn for pair in combinations(varied, 2) if (drawn := _heat_map(found, *pair)) is not None]
    return {"maps": maps, "rows": [cells(row) for row in found.rows]}


def _scatter(found: Ranking) -> Picture:
    said = [f"{row.name} {_accuracy(row)}, {_moved(row)}" for row in found.rows]
    if found.against_start is not None:
        said.append(f"the model they started from {found.against_start.accuracy.mean:.1%}")
    return _picture(draw_scatter(found.rows, found.against_start), "; ".join(said))


def lines(found: Ranking) -> list[str]:
    """The comparison for the terminal: a table and notes."""
    heads = ("setting", "accuracy", "points behind", "by chance", "gap", "chosen moved", "verdict")
    table: list[tuple[str, ...]] = [heads]
    for row in found.rows:
        shown = cells(row)
        table.append(tuple(shown[name] for name in ("name", "accuracy", "behind", "chance", "gap", "moved", "verdict")))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    text += [f"ruled out {row.name}: {'; '.join(row.ruled_out)}" for row in found.rows if row.ruled_out]
    text += [f"failed    {name}: {why}" for name, why in found.failed.items()]
    return [*text, *_gap_lines(found), found.headline]


def cells(row: Row) -> dict[str, str]:
    """The numbers of a setting as text."""
    accuracy, gap = row.standing.accuracy, row.standing.gap
    seeds = ", ".join(f"{share:.1%}" for share in row.accuracies) if len(row.runs) > 1 else ""
    return {
        "name": row.name,
        "folder": str(row.runs[0].folder),
        "accuracy": f"{accuracy.mean:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%})",
        "seeds": seeds,
        "behind": "" if row.ruled_out else f"{row.standing.behind * 100:.1f}",
        "chance": "" if row.ruled_out else f"{row.standing.chance * 100:.1f}",
        "gap": f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})",
        "moved": "-" if row.displacement is None else f"{row.displacement:+.3f}",
        "length_correlation": f"{row.length_correlation:+.2f}",
        "repetition": "-" if row.repetition is None else f"{row.repetition:.0%}",
        "verdict": row.verdict,
    }


def as_json(found: Ranking) -> dict[str, Any]:
    """The comparison as JSON values: accuracies as shares, gaps and displacements in nats per token."""
    quantiles = None
    if found.initial_gaps_P is not None:
        at = np.quantile(found.initial_gaps_P, GAP_QUANTILES)
        quantiles = {f"{share:g}": round(float(gap), 6) for share, gap in zip(GAP_QUANTILES, at, strict=True)}
    return {
        "headline": found.headline,
        "best": None if found.best is None else found.best.name,
        "level": [row.name for row in found.level],
        "num_validation_pairs": found.num_pairs,
        "initial_gap_quantiles": quantiles,
        "better_than_start": None if found.against_start is None else not found.against_start.is_level,
        "settings": [_row_json(row) for row in found.rows],
        "failed": dict(found.failed),
    }


def _row_json(row: Row) -> dict[str, Any]:
    standing = row.standing
    return {
        "name": row.name,
        "options": dict(row.options),
        "folders": [str(run.folder) for run in row.runs],
        "verdict": row.verdict,
        "ruled_out": list(row.ruled_out),
        "accuracy": vars(standing.accuracy),
        "accuracies": row.accuracies,
        "gap": vars(standing.gap),
        "behind": standing.behind,
        "behind_by_chance": standing.chance,
        "displacement": row.displacement,
        "length_correlation": row.length_correlation,
        "repetition": row.repetition,
    }


def _finite(value: Any) -> Any:
    """`value` with None for every number that JSON has no form for."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _gap_lines(found: Ranking) -> list[str]:
    """Lines on what beta and gamma mean on these pairs, from the quantiles of the initial gaps."""
    if found.initial_gaps_P is None:
        return []
    at = np.quantile(found.initial_gaps_P, GAP_QUANTILES)
    shown = ", ".join(f"{gap:+.3f} at {share:.0%}" for share, gap in zip(GAP_QUANTILES, at, strict=True))
    said = [f"initial gap (chosen less rejected, nats per token): {shown}"]
    objectives = [run.config.objective for row in found.rows for run in row.runs]
    # gamma and beta are of nats per token where rewards are averages.
    simpo = [one for one in objectives if isinstance(one, SimPOObjective) and one.length_normalization == "mean"]
    for ratio in sorted({one.gamma_beta_ratio for one in simpo}):
        said.append(f"gamma_beta_ratio {ratio:g} was reached by {found.beyond(ratio):.0%} of the pairs before training")
    for beta in sorted({one.beta for one in simpo}):
        said.append(f"beta {beta:g} spreads the middle half of these gaps over {beta * (at[3] - at[1]):.2f} of reward")
    return said


def _heat_map(found: Ranking, down: str, across: str) -> Picture | None:
    """The map of two options; None with fewer than two places in it. Settings of some objectives lack an option."""
    values = {
        name: sorted({row.options[name] for row in found.rows if name in row.options}, key=_order)
        for name in (down, across)
    }
    at: dict[tuple[int, int], Row] = {}
    # Where other options differ too, the best setting is shown: rows are sorted.
    for row in found.rows:
        if down in row.options and across in row.options:
            place = (values[down].index(row.options[down]), values[across].index(row.options[across]))
            at.setdefault(place, row)
    if len(at) < 2:
        return None
    labels = {name: [written(value) for value in of_axis] for name, of_axis in values.items()}
    figure = draw_heat_map(at, down, labels[down], across, labels[across])
    said = "; ".join(f"{row.name} {_accuracy(row)} {row.verdict}" for row in at.values())
    return _picture(figure, f"accuracy by {down} and {across}: {said}")


def _order(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value


def _picture(figure: Figure, text: str) -> Picture:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    return Picture(base64.b64encode(image.getvalue()).decode(), text)


def _accuracy(row: Row) -> str:
    return f"{row.standing.accuracy.mean:.1%}"


def _moved(row: Row) -> str:
    return "chosen moved by an unknown amount" if row.displacement is None else f"chosen moved {row.displacement:+.3f}"


def _best_yaml(folder: Path, config: Config) -> str:
    final = replace(config, run=replace(config.run, save=str(folder / "best")))
    head = f"# The best setting of the sweep in {folder}: simpo train --config {folder / BEST_FILE} trains it again.\n"
    return head + to_yaml(final)


def compared_page(found: Ranking, folder: Path) -> Path:
    """Writes the page on runs outside a sweep into `folder`; returns its path."""
    path = folder / COMPARISON_FILE
    write_text(path, page(found, title="Ranking of runs", axes={}))
    return path
