"""Answers a chat benchmark as its authors ask, in the file that its official scorer reads, and says how to judge it.

simpo evaluate mt-bench --questions question.jsonl --model DIR --name mine --out eval/mt-bench
simpo evaluate alpaca-eval --questions gpt4_baseline.json --model NAME --url URL --name mine --out eval/alpaca

Temperatures and the most tokens of an answer are the benchmark's. Judging and scoring are the official packages', whose
commands are printed; the questions come from there too. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from simpo_megatron.commands.generate import add_engine_options, engine_of
from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.errors import SimPOError, report_error, require, visible
from simpo_megatron.evaluation.benchmarks import BENCHMARKS, read_questions
from simpo_megatron.generation.answering import Decoding, answer_prompts, read_answers
from simpo_megatron.generation.prompts import read_prompts


def parse_arguments(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--questions", required=True, type=Path, metavar="FILE", help="the benchmark's own file")
    parser.add_argument("--name", required=True, help="name of the model in the scorer's tables")
    add_engine_options(parser)
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer; the benchmark's by default")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of sampling, default 42")
    parser.add_argument("--partial", action="store_true", help="take a part of the questions, for a try")
    return parser.parse_args(argv)


def main(argv: Sequence[str], prog: str = "simpo evaluate") -> int:
    """The exit code: 0 when every question is answered and written, else that of the error, which is printed."""
    arguments = parse_arguments(argv, prog)
    try:
        for line in _evaluate(arguments):
            print(visible(line), flush=True)
    except SimPOError as error:
        return report_error(error)
    return 0


def _evaluate(arguments: argparse.Namespace) -> Iterator[str]:
    name = arguments.name
    require(name == Path(name).name and name not in ("", ".", ".."), "name", name, "a name that is no path")
    benchmark, items = BENCHMARKS[arguments.benchmark], read_prompts(arguments.questions)
    questions = read_questions(arguments.questions, benchmark, items, partial=arguments.partial)
    decoding = Decoding(
        max_new_tokens=arguments.max_new_tokens or benchmark.max_new_tokens,
        temperatures=benchmark.temperatures,
        seed=arguments.seed,
    )
    yield from answer_prompts(engine_of(arguments), arguments.questions, arguments.out, decoding)
    answers = {row["id"]: row for row in read_answers(arguments.out)}
    path = benchmark.write(questions, [answers[item.id] for item in items], name, arguments.out)
    yield f"written   {path}, for the official scorer of {benchmark.name}"
    if len(questions) not in benchmark.counts:
        yield f"WARNING   {len(questions)} questions are not {benchmark.name}: compare no score with a published one"
    yield "to judge and score:"
    yield from benchmark.next_commands(path, name)
