"""Judging and scoring by the official scorers: the judge, the scorers, and the checks beforehand."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.evaluation.benchmarks import BENCHMARKS
from simpo_megatron.evaluation.evaluated import EvaluatedModel
from simpo_megatron.evaluation.judge_watch import JudgeWatch
from simpo_megatron.evaluation.official import OfficialEnvironment
from simpo_megatron.evaluation.published import PUBLISHED
from simpo_megatron.generation.item_progress import Progress
from simpo_megatron.generation.lines import appending, held_folder
from simpo_megatron.generation.server import API_KEY, ChatServer

_MAX_MISSING = 0.01
"""Largest share of unreadable verdicts in a score; published leaderboards have some, too."""
Metric = Mapping[str, float]
"""`value`, with `error` (a standard error) or with `low` and `high`; in percent, for MT-Bench from 1 to 10."""


@dataclass(frozen=True)
class JudgeServer:
    """The judge: a model behind a URL."""

    name: str
    url: str
    num_at_once: int = 16

    @property
    def server(self) -> ChatServer:
        return ChatServer(self.url, self.name)

    @property
    def variables(self) -> dict[str, str]:
        """The variables by which an OpenAI client finds the judge; the key is `none` where none is needed."""
        return {"OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": os.environ.get(API_KEY, "none")}


@dataclass(frozen=True)
class Scored:
    """The scores by one judge."""

    metrics: Mapping[str, Metric]
    """The metrics, the benchmark's main one first."""
    num_missing: int
    """Verdicts that could not be read; the official scorer leaves them out."""
    baseline_characters: float | None = None
    notes: tuple[str, ...] = ()


class OfficialScorer(ABC):
    """One benchmark's judging and scoring, by its official code in `environment`."""

    benchmark: ClassVar[str]
    package: ClassVar[str]
    """The official code and its version."""
    needs_logprobs: ClassVar[bool] = False

    def __init__(self, model: EvaluatedModel, environment: OfficialEnvironment) -> None:
        self.model, self.environment = model, environment

    @property
    @abstractmethod
    def published_judges(self) -> tuple[str, ...]:
        """The judges of published scores."""

    @abstractmethod
    def check(self) -> None:
        """Returns when the official code will read the answers correctly.

        Raises: ConfigError, DataError.
        """

    @abstractmethod
    def num_left(self, judge: str) -> int:
        """The number of missing verdicts."""

    @abstractmethod
    def judge(self, judge: JudgeServer) -> Generator[None]:
        """Asks the judge for the missing verdicts; yields every few seconds. Closing the iterator ends the asking.

        Raises: DataError where the official code fails.
        """

    @abstractmethod
    def score(self, judge: str) -> Scored:
        """The scores.

        Raises: DataError where the official code fails, or would return a wrong number.
        """


def judge_model(scorer: OfficialScorer, judge: JudgeServer) -> Iterator[str]:
    """Judges a model's answers, continuing an earlier call; yields lines of progress.

    Raises: ConfigError, DataError.
    """
    scorer.model.answers()
    scorer.check()
    with held_folder(scorer.model.folder):
        scorer.model.keep_judge(judge.name, {"package": scorer.package})
        left = scorer.num_left(judge.name)
        if left:
            _probe(judge, needs_logprobs=scorer.needs_logprobs)
            yield f"judging   {left:,} verdicts by {judge.name} at {judge.url}; {scorer.model.log} has the output"
            yield from _asking(scorer, judge, left)
            left = scorer.num_left(judge.name)
    if left:
        yield f"WARNING   {left:,} verdicts are missing; the same command asks for them again"
    yield f"judged    by {judge.name}; simpo evaluate {scorer.benchmark} score --out {scorer.model.folder}"


def _asking(scorer: OfficialScorer, judge: JudgeServer, num_asked: int) -> Iterator[str]:
    """Asks for `num_asked` verdicts; yields lines of progress, and on a judge that does not answer.

    Raises: DataError, as `OfficialScorer.judge` and `JudgeWatch.lines` do.
    """
    watch, progress = JudgeWatch(judge.server), Progress("judging", "verdicts", num_asked)
    try:
        with closing(scorer.judge(judge)) as asking:
            for _ in asking:
                yield from watch.lines()
                if not watch.is_away:
                    yield from progress.lines(lambda: num_asked - scorer.num_left(judge.name))
    except DataError as error:
        raise watch.cause_of(error) from None


def score_model(scorer: OfficialScorer, judge: str) -> Iterator[str]:
    """Scores a judged model and writes `score-JUDGE.json`; yields the lines to print.

    Raises: ConfigError, DataError.
    """
    model = scorer.model
    scorer.check()
    with held_folder(model.folder):
        scored = _finite(scorer.score(judge), judge)
        reasons = reasons_against_comparing(scorer, judge, scored)
        facts = model.facts_of_answers()
        path = model.write_score(
            judge,
            {
                "benchmark": model.benchmark,
                "model": model.name,
                "judge": judge,
                "package": scorer.package,
                "metrics": scored.metrics,
                "num_questions": len(model.rows()),
                "num_missing": scored.num_missing,
                "answers": facts,
                "baseline_characters": scored.baseline_characters,
                "not_comparable": reasons,
                "notes": scored.notes,
            },
        )
    for name, metric in scored.metrics.items():
        yield f"score     {shown(metric):24} {name}"
    baseline = f" (the baseline's {scored.baseline_characters:,.0f})" if scored.baseline_characters else ""
    yield (
        f"answers   {facts['mean_characters']:,.0f} characters{baseline}, {facts['mean_tokens']:,.0f} tokens, "
        f"{facts['cut']:.1%} cut"
    )
    yield from (f"note      {note}" for note in scored.notes)
    yield from (f"WARNING   not comparable with published scores: {reason}" for reason in reasons)
    yield f"written   {path}"


def _finite(scored: Scored, judge: str) -> Scored:
    """The scores without those that are no numbers, such as a category's in which no verdict could be read.

    Raises: DataError where the main one is none.
    """
    lost = [name for name, metric in scored.metrics.items() if not all(map(math.isfinite, metric.values()))]
    if next(iter(scored.metrics)) in lost:
        raise DataError(
            f"judge: found no score, for {scored.num_missing} verdicts of {judge} could not be read, expected some in "
            "the benchmark's form; judge with another model"
        )
    metrics = {name: metric for name, metric in scored.metrics.items() if name not in lost}
    notes = (*scored.notes, *(f"no verdict could be read of: {name}" for name in lost))
    return replace(scored, metrics=metrics, notes=notes)


def shown(metric: Metric) -> str:
    """A metric as text, with its error or interval."""
    if "error" in metric:
        return f"{metric['value']:.2f} +- {metric['error']:.2f}"
    if "low" in metric:
        return f"{metric['value']:.2f} ({metric['low']:.1f} to {metric['high']:.1f})"
    return f"{metric['value']:.2f}"


def reasons_against_comparing(scorer: OfficialScorer, judge: str, scored: Scored) -> list[str]:
    """The reasons why this score cannot be compared with published ones; none where it can."""
    model, reasons = scorer.model, list[str]()
    if judge not in scorer.published_judges:
        reasons.append(f"the judge is {judge}, theirs is {' or '.join(scorer.published_judges)}")
    if not model.is_whole():
        reasons.append(f"{len(model.rows())} questions are only a part of {model.benchmark}")
    if scored.num_missing > _MAX_MISSING * len(model.rows()):
        reasons.append(f"{scored.num_missing} verdicts could not be read and are left out")
    limits = {BENCHMARKS[model.benchmark].max_new_tokens} | {
        run.max_new_tokens for run in PUBLISHED.get(model.benchmark, {}).values()
    }
    if (limit := model.decoding()["max_new_tokens"]) not in limits:
        reasons.append(f"answers have at most {limit} tokens, theirs {max(limits)}")
    return reasons


def cut_half_line(path: Path) -> None:
    """Removes an incomplete last line of a killed process, which no official loader reads."""
    if path.exists():
        with appending(path):
            pass


def _probe(judge: JudgeServer, *, needs_logprobs: bool) -> None:
    """Asks the judge one question, because the official scorers wait minutes for a judge that is absent.

    Raises: ConfigError where it gives no top logprobs and they are needed; DataError where it does not answer.
    """
    if not needs_logprobs:
        judge.server.chat([{"role": "user", "content": "Say yes."}], max_tokens=1, temperature=0.0, seed=0)
        return
    found = judge.server.top_logprobs([{"role": "user", "content": "Say m or M."}], num=5)
    if found < 5:
        raise ConfigError(
            f"judge: found {found} top logprobs in an answer of {judge.name}, expected 5, of which AlpacaEval makes "
            "its preference; serve it with vLLM, as simpo evaluate serve-judge does"
        )
