"""A page of many models' scores beside the length of their answers, because judges prefer long ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo_megatron.atomic import write_text
from simpo_megatron.errors import DataError, require, visible
from simpo_megatron.evaluation.evaluated import read_scores
from simpo_megatron.evaluation.judging import shown
from simpo_megatron.reporting.rendering import render


def write_leaderboard(folders: Sequence[Path], page: Path) -> Iterator[str]:
    """Writes `page` with a table for each benchmark and judge, best first; yields the lines to print.

    Raises: ConfigError for a folder without a score; DataError for a score with values of other types.
    """
    require(page.suffix == ".html", "page", str(page), "a file that ends in .html")
    tables: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one, score in ((folder, score) for folder in folders for score in read_scores(folder)):
        _check(one, score)
        tables.setdefault((score["benchmark"], score["judge"]), []).append(score)
    shown_tables = [_table(benchmark, judge, scores) for (benchmark, judge), scores in sorted(tables.items())]
    page.parent.mkdir(parents=True, exist_ok=True)
    # Names in scores are other people's, and a lone surrogate cannot be written.
    write_text(page, visible(render("leaderboard.html", title="Leaderboard", tables=shown_tables), keep="\n\t"))
    for table in shown_tables:
        yield table["title"]
        for row in table["rows"]:
            yield f"  {row['model']:32} {row['cells'][0]:>26}  {row['characters']:>6} characters"
    yield f"written   {page}"


def _check(folder: Path, score: Mapping[str, Any]) -> None:
    try:
        _table(score["benchmark"], score["judge"], [score])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise DataError(
            f"{folder}: found a score of {score['judge'][:60]!r} with values of other types ({type(error).__name__}: "
            f"{error}), expected one that simpo evaluate score wrote; score it again"
        ) from None


def _table(benchmark: str, judge: str, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of one benchmark and one judge; scores of different judges are never mixed."""
    names = list(dict.fromkeys(name for score in scores for name in score["metrics"] if _has_column(name)))
    first = names[0]
    ranked = sorted(scores, key=lambda score: score["metrics"].get(first, {}).get("value", float("-inf")), reverse=True)
    baseline = next((score["baseline_characters"] for score in scores if score["baseline_characters"]), None)
    return {
        "title": f"{benchmark}, judged by {judge}",
        "metrics": names,
        "rows": [
            {
                "model": score["model"],
                "cells": [shown(score["metrics"][name]) if name in score["metrics"] else "-" for name in names],
                "characters": f"{score['answers']['mean_characters']:,.0f}",
                "tokens": f"{score['answers']['mean_tokens']:,.0f}",
                "cut": f"{score['answers']['cut']:.1%}",
                "repetition": f"{score['answers']['repetition']:.1%}",
                "num_questions": score["num_questions"],
                "num_missing": score["num_missing"],
            }
            for score in ranked
        ],
        "baseline": None if baseline is None else f"{baseline:,.0f}",
        # A reason that all rows share is the judge's and is printed once; others are a model's.
        "warnings": sorted({f"{score['model']}: {why}" for score in ranked for why in score["not_comparable"]}),
        "packages": ", ".join(sorted({score["package"] for score in scores})),
    }


def _has_column(metric: str) -> bool:
    return not metric.startswith("category ")
