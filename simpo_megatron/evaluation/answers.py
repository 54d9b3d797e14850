"""Answers to a benchmark's questions, in the file that its official scorer reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from simpo_megatron.evaluation.benchmarks import BENCHMARKS, Row, read_questions
from simpo_megatron.evaluation.evaluated import keep_evaluated
from simpo_megatron.generation.answering import Decoding, answer_prompts
from simpo_megatron.generation.engines import Engine
from simpo_megatron.generation.prompts import read_prompts


def check_questions(benchmark: str, questions: Path, *, partial: bool) -> list[Row]:
    """The questions of `path`, checked to be the benchmark's.

    Raises: DataError where they are not, or not all unless `partial`.
    """
    return read_questions(questions, BENCHMARKS[benchmark], read_prompts(questions), partial=partial)


def benchmark_decoding(benchmark: str, *, seed: int, max_new_tokens: int | None = None) -> Decoding:
    """The settings that the benchmark's authors ask for."""
    one = BENCHMARKS[benchmark]
    return Decoding(max_new_tokens=max_new_tokens or one.max_new_tokens, temperatures=one.temperatures, seed=seed)


def answer_benchmark(
    engine: Engine, benchmark: str, name: str, questions: Path, folder: Path, decoding: Decoding
) -> Iterator[str]:
    """Answers the questions that have no answer in `folder` yet; yields lines of progress.

    Raises: ConfigError, DataError, as `answer_prompts` does; ConfigError where the folder is another model's.
    """
    model = keep_evaluated(folder, benchmark, name, questions)
    yield from answer_prompts(engine, questions, folder, decoding)
    path = BENCHMARKS[benchmark].write(model.rows(), model.answers(), name, model.folder)
    yield f"written   {path}, for the official scorer of {benchmark}"
    if not model.is_whole():
        yield f"WARNING   {len(model.rows())} questions are a part of {benchmark}: published scores are of all"
