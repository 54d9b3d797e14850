"""Evaluates a model on MT-Bench, Arena-Hard or AlpacaEval 2 by their official scorers, in three steps.

simpo evaluate mt-bench generate --model DIR --name mine --out eval/mt-bench
simpo evaluate mt-bench judge --out eval/mt-bench --judge NAME --judge-url URL
simpo evaluate mt-bench score --out eval/mt-bench
simpo evaluate alpaca-eval reproduce DIR --as Llama-3-Instruct-8B-SimPO --questions FILE --out eval/reproduced
simpo evaluate serve-judge DIR --port 8000        a judge of your own, by vLLM
simpo evaluate leaderboard eval/* --page leaderboard.html

Temperatures and the most tokens of an answer are the benchmark's. The official packages judge and score, in an
environment of their own (`make eval-env`); Arena-Hard needs a checkout. The same command continues a stopped step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from simpo_megatron.commands.generate import add_engine_options, engine_of
from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.commands.printing import print_lines
from simpo_megatron.errors import ConfigError, GateClosed, require
from simpo_megatron.evaluation.benchmarks import BENCHMARKS
from simpo_megatron.evaluation.evaluated import EvaluatedModel, read_evaluated, read_scores
from simpo_megatron.evaluation.judging import JudgeServer, OfficialScorer, judge_model, score_model
from simpo_megatron.evaluation.official import official_environment
from simpo_megatron.evaluation.published import JUDGE, PUBLISHED

_OPENAI = "https://api.openai.com/v1"


def parse_arguments(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog, __doc__)
    every = parser.add_subparsers(dest="what", required=True, metavar="BENCHMARK", title="benchmarks and other work")
    for name in BENCHMARKS:
        about = f"Evaluates a model on {name}."
        steps = every.add_parser(name, description=about, help=", ".join(_steps(name))).add_subparsers(
            dest="step", required=True, metavar="STEP", title="steps"
        )
        parsers = {step: steps.add_parser(step, description=text, help=text) for step, text in _steps(name).items()}
        _add_generate(parsers["generate"], name)
        judge = parsers["judge"]
        judge.add_argument("--judge", required=True, metavar="NAME", help="name of the judge's model")
        _add_judge(judge, name)
        _add_score(parsers["score"], name)
        if "reproduce" in parsers:
            _add_reproduce(parsers["reproduce"], name)
    about = "Writes a page of many models' scores."
    board = every.add_parser("leaderboard", description=about, help=about)
    board.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders that were scored")
    board.add_argument("--page", type=Path, default=Path("leaderboard.html"), metavar="FILE", help="page to write")
    about = "Serves a model of yours as a judge, with vLLM."
    serve = every.add_parser("serve-judge", description=about, help=about)
    serve.add_argument("model", metavar="DIR", help="Hugging Face folder or hub name of the judge")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="port of the server, default 8000")
    serve.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs for its weights, default 1")
    return parser.parse_args(argv)


def _steps(benchmark: str) -> dict[str, str]:
    """The steps of a benchmark, each with what it does."""
    steps = {
        "generate": "Answers the benchmark's questions.",
        "judge": "Asks a judge for a verdict on each answer.",
        "score": "Computes the score from the verdicts.",
    }
    return {**steps, "reproduce": "Repeats a published evaluation."} if benchmark in PUBLISHED else steps


def _add_generate(parser: argparse.ArgumentParser, benchmark: str) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder, or with --url a name")
    parser.add_argument("--name", required=True, help="name of the model in tables")
    _add_answering(parser, benchmark)
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="most tokens of an answer; the benchmark's by default"
    )
    parser.add_argument("--partial", action="store_true", help="allow a part of the questions, for a try")
    parser.add_argument(
        "--emit", choices=("nemo-evaluator",), help="only print the same task for NeMo Evaluator's launcher"
    )


def _add_answering(parser: argparse.ArgumentParser, benchmark: str) -> None:
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        required=benchmark == "alpaca-eval",
        help=f"the benchmark's questions: {BENCHMARKS[benchmark].questions_from}",
    )
    add_engine_options(parser)
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of sampling, default 42")
    _add_checkout(parser, benchmark)


def _add_judge(parser: argparse.ArgumentParser, benchmark: str, *, has_folder: bool = False) -> None:
    if not has_folder:
        parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the answers")
        parser.add_argument("--at-once", type=int, default=16, metavar="N", help="requests at a time, default 16")
        _add_checkout(parser, benchmark)
    parser.add_argument(
        "--judge-url",
        default=_OPENAI,
        metavar="URL",
        help=f"server of the judge, default {_OPENAI}, with the key in OPENAI_API_KEY",
    )


def _add_score(parser: argparse.ArgumentParser, benchmark: str) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the answers")
    parser.add_argument("--judge", metavar="NAME", help="judge of the verdicts; needed only if there are several")
    _add_checkout(parser, benchmark)
    if benchmark == "arena-hard":
        parser.add_argument(
            "--against", type=Path, metavar="DIR", help="another model's folder; exit code 7 where this one is worse"
        )
        parser.add_argument(
            "--margin",
            type=float,
            default=0.0,
            metavar="X",
            help="with --against: points it may be worse beyond chance, default 0",
        )


def _add_reproduce(parser: argparse.ArgumentParser, benchmark: str) -> None:
    parser.add_argument("model", metavar="DIR", help="Hugging Face folder of the released model, or with --url a name")
    parser.add_argument(
        "--as", required=True, dest="published", metavar="NAME", help=f"one of {', '.join(PUBLISHED[benchmark])}"
    )
    _add_answering(parser, benchmark)
    _add_judge(parser, benchmark, has_folder=True)


def _add_checkout(parser: argparse.ArgumentParser, benchmark: str) -> None:
    if benchmark == "arena-hard":
        parser.add_argument("--checkout", type=Path, metavar="DIR", help="checkout of arena-hard-auto")


def main(argv: Sequence[str], prog: str = "simpo evaluate") -> int:
    """The exit code: 0 when done, 7 when a gate is closed, else that of the error, which is printed."""
    arguments = parse_arguments(argv, prog)
    work = {
        "generate": _generate,
        "judge": _judge,
        "score": _score,
        "reproduce": _reproduce,
        "leaderboard": _leaderboard,
        "serve-judge": _serve_judge,
    }[getattr(arguments, "step", arguments.what)]
    return print_lines(work(arguments))


def _generate(arguments: argparse.Namespace) -> Iterator[str]:
    from simpo_megatron.evaluation.answers import answer_benchmark, benchmark_decoding, check_questions

    if arguments.emit is not None:
        from simpo_megatron.evaluation.nemo_evaluator import launcher_config

        config = launcher_config(arguments.what, arguments.model, arguments.name, arguments.url, arguments.out)
        yield from config.splitlines()
        return
    questions = _questions(arguments)
    check_questions(arguments.what, questions, partial=arguments.partial)
    decoding = benchmark_decoding(arguments.what, seed=arguments.seed, max_new_tokens=arguments.max_new_tokens)
    with closing(engine_of(arguments)) as engine:
        yield from answer_benchmark(engine, arguments.what, arguments.name, questions, arguments.out, decoding)


def _judge(arguments: argparse.Namespace) -> Iterator[str]:
    yield from judge_model(_scorer(arguments, arguments.out), _judge_server(arguments, arguments.judge))


def _score(arguments: argparse.Namespace) -> Iterator[str]:
    scorer = _scorer(arguments, arguments.out)
    judge = arguments.judge or _only_judge(scorer.model)
    yield from score_model(scorer, judge)
    if getattr(arguments, "against", None) is not None:
        yield from _gate(arguments, judge)


def _gate(arguments: argparse.Namespace, judge: str) -> Iterator[str]:
    from simpo_megatron.evaluation.arena_hard import ArenaHardScorer
    from simpo_megatron.evaluation.gate import paired_difference

    require(arguments.margin >= 0, "margin", arguments.margin, "a number not below 0")
    scorers = [_scorer(arguments, folder) for folder in (arguments.out, arguments.against)]
    ours, others = (one.battles(judge) for one in scorers if isinstance(one, ArenaHardScorer))
    difference, other = paired_difference(ours, others), scorers[1].model.name
    yield f"gate      {difference} against {other}"
    if difference.is_worse(arguments.margin):
        raise GateClosed(
            f"against: found {scorers[0].model.name} {difference} against {other}, expected none worse beyond chance "
            f"and a margin of {arguments.margin:g}"
        )


def _reproduce(arguments: argparse.Namespace) -> Iterator[str]:
    from simpo_megatron.evaluation import reproduction
    from simpo_megatron.evaluation.answers import answer_benchmark, check_questions

    run = reproduction.published_run(arguments.what, arguments.published)
    questions = _questions(arguments)
    first = check_questions(arguments.what, questions, partial=False)[0]
    decoding = reproduction.published_decoding(run, arguments.seed)
    how = "greedily" if run.temperature == 0 else f"at temperature {run.temperature:g}"
    yield f"decoding  {how}, at most {run.max_new_tokens:,} tokens{': ' + run.why if run.why else ''}"
    with closing(engine_of(arguments)) as engine:
        yield from reproduction.check_engine(engine, run, str(first.get("instruction") or first.get("prompt")))
        yield from answer_benchmark(engine, arguments.what, arguments.published, questions, arguments.out, decoding)
    scorer = _scorer(arguments, arguments.out)
    yield from judge_model(scorer, _judge_server(arguments, JUDGE))
    yield from score_model(scorer, JUDGE)
    (score,) = [one for one in read_scores(arguments.out) if one["judge"] == JUDGE]
    yield from reproduction.compare_with_published(arguments.published, run, score)


def _leaderboard(arguments: argparse.Namespace) -> Iterator[str]:
    from simpo_megatron.evaluation.leaderboard import write_leaderboard

    yield from write_leaderboard(arguments.folders, arguments.page)


def _serve_judge(arguments: argparse.Namespace) -> Iterator[str]:
    from simpo_megatron.generation.vllm_environment import serve, vllm_python

    vllm_python()
    yield f"judge     {arguments.model} at http://127.0.0.1:{arguments.port}/v1 when vLLM is ready; Ctrl-C ends it"
    yield f"          simpo evaluate BENCHMARK judge --judge {arguments.model} --judge-url http://127.0.0.1:{arguments.port}/v1"
    serve(arguments.model, port=arguments.port, tensor_parallel_size=arguments.tp)


def _questions(arguments: argparse.Namespace) -> Path:
    """The file of questions that was named, or else the official package's."""
    if arguments.questions is not None:
        return Path(arguments.questions)
    if arguments.what == "mt-bench":
        from simpo_megatron.evaluation.mt_bench import questions_of

        return questions_of(official_environment())
    if arguments.checkout is None:
        raise ConfigError(
            "questions: found none, expected --checkout DIR or --questions FILE: "
            f"{BENCHMARKS['arena-hard'].questions_from}"
        )
    return Path(arguments.checkout) / "data" / "arena-hard-v0.1" / "question.jsonl"


def _scorer(arguments: argparse.Namespace, folder: Path) -> OfficialScorer:
    model, environment = read_evaluated(folder, arguments.what), official_environment()
    if arguments.what == "mt-bench":
        from simpo_megatron.evaluation.mt_bench import MTBenchScorer

        return MTBenchScorer(model, environment)
    if arguments.what == "arena-hard":
        from simpo_megatron.evaluation.arena_hard import ArenaHardScorer

        return ArenaHardScorer(model, environment, arguments.checkout)
    from simpo_megatron.evaluation.alpaca_eval import AlpacaEvalScorer

    return AlpacaEvalScorer(model, environment)


def _judge_server(arguments: argparse.Namespace, name: str) -> JudgeServer:
    return JudgeServer(name, arguments.judge_url, max(1, arguments.at_once))


def _only_judge(model: EvaluatedModel) -> str:
    judges = model.judges()
    if len(judges) != 1:
        raise ConfigError(
            f"judge: found judgments by {', '.join(judges) or 'nobody'}, expected one judge; name one by --judge, or "
            "judge first"
        )
    return judges[0]
