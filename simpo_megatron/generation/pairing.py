"""Preference pairs of a model's own answers: the best against the worst of each prompt, with their scores."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from simpo_megatron.atomic import write_text
from simpo_megatron.errors import DataError
from simpo_megatron.generation.answering import ANSWERS_FILE, read_answers
from simpo_megatron.generation.answering import RECORD_FILE as ANSWERS_RECORD
from simpo_megatron.generation.item_progress import Progress, work_through
from simpo_megatron.generation.lines import (
    append,
    appending,
    held_folder,
    is_finite_number,
    keep_settings,
    read_lines,
    read_settings,
    write_record,
)
from simpo_megatron.generation.prompts import is_unicode
from simpo_megatron.generation.scoring import Scorer

PAIRS_FILE, SCORES_FILE, RECORD_FILE = "pairs.jsonl", "scores.jsonl", "pairs.json"


@dataclass(frozen=True)
class Pairing:
    """The rules that make pairs of answers."""

    min_score_gap: float = 0.0
    """Smallest difference of the scores of a pair; a tie is never a pair."""
    keeps_cut: bool = False
    """True when answers that ended at max_new_tokens may be in a pair."""


def make_pairs(scorer: Scorer, answers: Path, folder: Path, pairing: Pairing) -> Iterator[str]:
    """Scores the answers in the folder `answers` and writes their pairs; yields lines of progress.

    `scores.jsonl` gets a line for each answer as it is scored, `pairs.jsonl` appears whole at the end, in a form that
    `--data` reads. `pairs.json` holds the sources, and the counts of prompts by outcome.

    Raises:
        ConfigError: the folder was begun with another scorer or other answers, or is another process's.
        DataError: there are no answers, one cannot be scored, or they make no pair.
    """
    rows = read_answers(answers)
    if not rows:
        raise DataError(f"{answers}: found no {ANSWERS_FILE}, expected answers; make them with simpo generate")
    several = next((row["id"] for row in rows if len(row["answers"]) > 1), None)
    if several is not None:
        raise DataError(f"{several}: found answers to several turns, expected one; samples differ in the earlier ones")
    scorer.check(rows)
    record = answers / ANSWERS_RECORD
    provenance = read_settings(record) if record.exists() else None
    with held_folder(folder):
        keep_settings(folder / RECORD_FILE, {"answers": provenance, **scorer.identity()})
        yield from _score(scorer, rows, folder / SCORES_FILE)
        scored = _read_scores(folder / SCORES_FILE)
        scores = {key: score for key, score in scored.items() if score is not None}
        if len(scores) < len(scored):
            yield f"scores    {len(scored) - len(scores):,} of {len(scored):,} answers got none and are left out"
        if not scores:
            raise DataError(
                f"{folder / SCORES_FILE}: found no score of any answer, expected some; score with another model, into "
                "another folder"
            )
        pairs, became = pair_up(rows, scores, pairing)
        write_text(folder / PAIRS_FILE, "".join(json.dumps(pair) + "\n" for pair in pairs))
        settings = {"answers": provenance, **scorer.identity()}
        write_record(folder / RECORD_FILE, {"settings": settings, "pairing": vars(pairing), "prompts": dict(became)})
    told = ", ".join(f"{count:,} {what}" for what, count in became.items())
    if not pairs:
        raise DataError(
            f"{answers}: found no pair among {sum(became.values()):,} prompts ({told}), expected some; sample more "
            "answers of each prompt, at a higher temperature"
        )
    yield f"prompts   {sum(became.values()):,}: {told}"
    yield f"written   {folder / PAIRS_FILE} ({len(pairs):,} pairs, for --data); settings in {folder / RECORD_FILE}"


def pair_up(
    rows: Sequence[Mapping[str, Any]], scores: Mapping[tuple[str, int], float], pairing: Pairing
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """(pairs, counts of prompts by outcome): the best answer of each prompt against the worst.

    Among equal scores the first sample is taken. Equal texts are one answer, with the score of the first sample. An
    answer without a score, such as one with half of a surrogate pair, is in no pair.
    """
    pairs, became = [], Counter[str]()
    in_order = sorted(rows, key=lambda row: (row["id"], row["sample"]))
    for identity, group in groupby(in_order, key=lambda row: row["id"]):
        every = list(group)
        ended = [row for row in every if row["answers"][0] and (pairing.keeps_cut or not row["is_cut"])]
        usable = [row for row in ended if (identity, row["sample"]) in scores]
        distinct = list({row["answers"][0]: row for row in reversed(usable)}.values())[::-1]
        if len(distinct) < 2:
            has_answers = len({row["answers"][0] for row in ended}) > 1
            became["without two scores" if has_answers else "without two answers that end and differ"] += 1
            continue
        scored = [(scores[identity, row["sample"]], -row["sample"], row) for row in distinct]
        best, worst = max(scored, key=lambda one: one[:2]), min(scored, key=lambda one: (one[0], -one[1]))
        gap = best[0] - worst[0]
        if gap <= 0 or gap < pairing.min_score_gap:
            became["with scores too near"] += 1
            continue
        became["paired"] += 1
        pairs.append(_pair(best[2], best[0], worst[2], worst[0], len(every)))
    return pairs, became


def _pair(
    best: Mapping[str, Any], best_score: float, worst: Mapping[str, Any], worst_score: float, num_answers: int
) -> dict[str, Any]:
    """A record for `--data`, with the scores of both answers and their samples."""
    return {
        "id": best["id"],
        "prompt": best["messages"][:-1],
        "chosen": best["messages"][-1:],
        "rejected": worst["messages"][-1:],
        "chosen_score": best_score,
        "rejected_score": worst_score,
        "chosen_sample": best["sample"],
        "rejected_sample": worst["sample"],
        "num_answers": num_answers,
    }


def _read_scores(path: Path) -> dict[tuple[str, int], float | None]:
    """The score of each (id, sample) in the file, None for an answer that got none."""
    scores = {}
    for number, row in enumerate(read_lines(path, id=str, sample=int), 1):
        score = row.get("score")
        if score is not None and not is_finite_number(score):
            raise DataError(
                f"{path}:{number}: score: found {str(score)[:80]!r}, expected a finite number; remove the line"
            )
        scores[row["id"], row["sample"]] = score
    return scores


def _score(scorer: Scorer, rows: Sequence[Mapping[str, Any]], path: Path) -> Iterator[str]:
    """Appends the score of each answer without a line; yields lines of progress."""
    known = _read_scores(path).keys()
    rows = [row for row in rows if is_unicode(*row["answers"])]
    left = [row for row in rows if (row["id"], row["sample"]) not in known]
    if len(left) < len(rows):
        yield f"resume    {len(rows) - len(left):,} of {len(rows):,} scores are there already"
    writing = threading.Lock()
    with appending(path) as file:

        def work(row: Mapping[str, Any]) -> None:
            score = scorer.score(row)
            if score is not None and not math.isfinite(score):
                raise DataError(
                    f"{row['id']}: found the score {score} of sample {row['sample']}, expected a finite one"
                )
            with writing:
                append(file, {"id": row["id"], "sample": row["sample"], "score": score})

        yield from work_through(work, left, scorer.num_at_once, Progress("scores", "answers", len(left)))
