"""Makes preference pairs from a model's own answers: the best scored answer of each prompt against the worst.

simpo generate --model DIR --prompts prompts.jsonl --samples 5 --temperature 0.8 --out answers
simpo pairs --answers answers --reward-model RM_DIR --out pairs
simpo train --model DIR --data pairs/pairs.jsonl --save runs/round1

Answers are scored by a sequence classifier (--reward-model), by a chat model behind a URL (--judge-url), or by a file
of scores. Equal answers count once, ties make no pair, and answers that were cut are left out. The same command
continues where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.commands.printing import print_lines
from simpo_megatron.errors import require
from simpo_megatron.generation.pairing import Pairing, make_pairs
from simpo_megatron.generation.scoring import Judge, RewardModel, Scorer, ScoresOfFile
from simpo_megatron.generation.server import ChatServer


def parse_arguments(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("--answers", required=True, type=Path, metavar="DIR", help="folder that simpo generate wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for pairs, scores and settings")
    by = parser.add_mutually_exclusive_group(required=True)
    by.add_argument("--reward-model", type=Path, metavar="DIR", help="sequence classifier of one output")
    by.add_argument("--judge-url", metavar="URL", help="server that speaks OpenAI's protocol, with --judge NAME")
    by.add_argument("--scores", type=Path, metavar="FILE", help="JSON Lines of id, sample and score")
    parser.add_argument("--judge", default="", metavar="NAME", help="name of the judge's model")
    parser.add_argument(
        "--at-once", type=int, default=16, metavar="N", help="requests to the judge at a time, default 16"
    )
    parser.add_argument(
        "--min-score-gap",
        type=float,
        default=0.0,
        metavar="X",
        help="smallest difference of a pair's scores, default 0",
    )
    parser.add_argument("--keep-cut", action="store_true", help="also use answers that ended at --max-new-tokens")
    return parser.parse_args(argv)


def main(argv: Sequence[str], prog: str = "simpo pairs") -> int:
    """The exit code: 0 with the pairs written, else that of the error, which is printed."""
    return print_lines(_pairs(parse_arguments(argv, prog)))


def _pairs(arguments: argparse.Namespace) -> Iterator[str]:
    gap = arguments.min_score_gap
    require(gap >= 0, "min_score_gap", gap, "a number not below 0")
    pairing = Pairing(min_score_gap=gap, keeps_cut=arguments.keep_cut)
    yield from make_pairs(_scorer(arguments), arguments.answers, arguments.out, pairing)


def _scorer(arguments: argparse.Namespace) -> Scorer:
    if arguments.reward_model is not None:
        return RewardModel(arguments.reward_model)
    if arguments.scores is not None:
        return ScoresOfFile(arguments.scores)
    require(bool(arguments.judge), "judge", arguments.judge, "the name of the judge's model; add --judge NAME")
    return Judge(ChatServer(arguments.judge_url, arguments.judge), max(1, arguments.at_once))
