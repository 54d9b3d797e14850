"""A folder of one model's answers to one benchmark, with its judgments and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from simpo_megatron.errors import ConfigError, DataError, listed, require
from simpo_megatron.evaluation.benchmarks import BENCHMARKS, Row
from simpo_megatron.generation.answering import ANSWERS_FILE, RECORD_FILE, read_answers, summarize
from simpo_megatron.generation.lines import keep_settings, read_record, read_settings, write_record
from simpo_megatron.generation.prompts import read_prompts, read_rows

EVALUATION_FILE = "evaluation.json"
_SCORE_FILE = "score-{}.json"


@dataclass(frozen=True)
class EvaluatedModel:
    """One model's answers to the questions of one benchmark."""

    folder: Path
    benchmark: str
    name: str
    """The model's name in tables."""
    questions: Path

    @property
    def log(self) -> Path:
        """The output of the official scorers."""
        return self.folder / "official.log"

    def rows(self) -> list[Row]:
        """The questions."""
        return read_rows(self.questions)

    def is_whole(self) -> bool:
        """True when every question of the benchmark was asked."""
        return len(self.rows()) in BENCHMARKS[self.benchmark].counts

    def answers(self) -> list[dict[str, Any]]:
        """A line of `answers.jsonl` for each question, in the questions' order.

        Raises: DataError where some are not there yet.
        """
        by_id = {row["id"]: row for row in read_answers(self.folder, num_tokens=int)}
        items = read_prompts(self.questions)
        if missing := [item.id for item in items if item.id not in by_id]:
            raise DataError(
                f"{self.folder / ANSWERS_FILE}: found no answer to {listed(missing, 3)}, expected one to every "
                "question; run the same generate command again"
            )
        return [by_id[item.id] for item in items]

    def decoding(self) -> dict[str, Any]:
        """The settings that the answers were made with."""
        return _settings(self.folder / RECORD_FILE, max_new_tokens=int)

    def facts_of_answers(self) -> dict[str, float]:
        """Mean length in tokens and in characters, and the shares that were cut, are empty or repeat."""
        answers = self.answers()
        characters = fmean(len(text) for row in answers for text in row["answers"])
        return {**summarize(answers), "mean_characters": characters}

    def judges(self) -> list[str]:
        """The judges with verdicts in the folder, complete or not."""
        return [str(_settings(path, judge=str)["judge"]) for path in self._judge_records()]

    def keep_judge(self, judge: str, settings: Mapping[str, Any]) -> None:
        """Records the settings of `judge`.

        Raises: ConfigError naming what differs from how it was begun.
        """
        keep_settings(self.folder / f"judge-{slug(judge)}.json", {"judge": judge, **settings})

    def write_score(self, judge: str, score: Mapping[str, Any]) -> Path:
        """Writes `score`; returns the file."""
        path = self.folder / _SCORE_FILE.format(slug(judge))
        write_record(path, score)
        return path

    def _judge_records(self) -> list[Path]:
        return sorted(self.folder.glob("judge-*.json"))


def keep_evaluated(folder: Path, benchmark: str, name: str, questions: Path) -> EvaluatedModel:
    """The folder, recorded to be this model's.

    Raises: ConfigError where it is another's: an official scorer would take both for one.
    """
    is_name = name == Path(name).name and name not in ("", ".", "..")
    require(is_name, "name", name, "a name that is no path")
    taken = BENCHMARKS[benchmark].names_taken
    require(name not in taken, "name", name, f"another than the baseline's ({', '.join(taken)})")
    folder.mkdir(parents=True, exist_ok=True)
    found = EvaluatedModel(folder.absolute(), benchmark, name, questions.absolute())
    kept = {key: str(value) for key, value in asdict(found).items() if key != "folder"}
    keep_settings(folder / EVALUATION_FILE, kept)
    return found


def read_evaluated(folder: Path, benchmark: str) -> EvaluatedModel:
    """The folder that `simpo evaluate BENCHMARK generate` wrote.

    Raises: ConfigError where it is none.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        raise ConfigError(
            f"out: found no {EVALUATION_FILE} in {folder}, expected a folder of answers; make it with "
            f"simpo evaluate {benchmark} generate --out {folder}"
        )
    kept = _settings(path, benchmark=str, name=str, questions=str)
    require(kept["benchmark"] == benchmark, "out", str(folder), f"answers to {benchmark}, not to {kept['benchmark']}")
    return EvaluatedModel(folder.absolute(), benchmark, kept["name"], Path(kept["questions"]))


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """The scores in a folder, one for each judge.

    Raises: ConfigError where there is none; DataError where a file of one holds none.
    """
    found = []
    for path in sorted(folder.glob(_SCORE_FILE.format("*"))):
        score = read_record(path)
        if score is None or not all(isinstance(score.get(key), str) for key in ("benchmark", "judge", "model")):
            raise DataError(f"{path}: found no score, expected one that simpo evaluate score wrote; score it again")
        found.append(score)
    if not found:
        raise ConfigError(f"{folder}: found no score, expected one; make it with simpo evaluate BENCHMARK score")
    return found


def _settings(path: Path, **fields: type) -> dict[str, Any]:
    """The settings in the record `path`, each of `fields` of its type.

    Raises: ConfigError naming the first that is not.
    """
    settings = read_settings(path)
    for name, kind in fields.items():
        if type(settings.get(name)) is not kind:
            raise ConfigError(
                f"{path}: found {str(settings.get(name))[:60]!r} for {name}, expected the record that simpo evaluate "
                "wrote; name another folder"
            )
    return settings


def slug(judge: str) -> str:
    """The name of a judge as a part of file names, as the official scorers write it."""
    return judge.strip("/").replace("/", "--")
