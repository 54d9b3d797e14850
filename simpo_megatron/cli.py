"""The command `simpo`: imports and runs only the subcommand that was asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from typing import NoReturn

from simpo_megatron import __version__
from simpo_megatron.errors import ConfigError, StoppedBySignal, report_error
from simpo_megatron.logs import outlive_readers
from simpo_megatron.stop_signals import StopSignals, ignore_from_now_on

COMMANDS = {
    "train": "train a model on preference pairs",
    "sweep": "train many settings on the same ranks, and tell which is better",
    "generate": "let a model answer prompts",
    "pairs": "make preference pairs of a model's own answers",
    "evaluate": "score a model on MT-Bench, Arena-Hard or AlpacaEval 2, by their official code",
    "plan": "find a layout that fits GPUs: memory, speed, how to start it",
    "inspect": "see what would be trained on, and what is wrong with it",
    "convert": "Hugging Face folder to Megatron checkpoint, and back",
    "verify": "compare two models tensor by tensor",
    "merge": "average models",
    "families": "list the models that can be trained, and compare them with transformers",
    "report": "draw the curves of a run and write its page, or compare several",
    "fp8-check": "measure what FP8 does to log-probs and margins",
    "gpu-check": "check the GPU path on one GPU: exactness, speed, memory",
}
_ASKS_FOR_HELP = ("-h", "--help", "--help-all")


def run(argv: Sequence[str] | None = None, script: str | None = None) -> NoReturn:
    """Ends this process with the exit code of `main`; handles stop signals and a closed stdout."""
    argv = sys.argv[1:] if argv is None else argv
    outlive_readers()
    trains = argv[:1] in (["train"], ["sweep"])
    try:
        # From here on: importing torch and megatron takes longer than some launchers wait after a signal.
        with StopSignals() if argv[:1] != ["gpu-check"] else nullcontext() as signals:
            if signals is not None and not trains:
                signals.describe_end = lambda: "stopped before it was done; the same command starts or continues it"
            code = main(argv, script)
    except StoppedBySignal as stopped:
        code = report_error(stopped, rank=int(os.environ.get("RANK", 0)) if trains else None)
    ignore_from_now_on()
    sys.exit(code)


def main(argv: Sequence[str] | None = None, script: str | None = None) -> int:
    """The exit code of `simpo argv`, sys.argv's arguments when None; 2 for a command that does not exist.

    Args:
        script: the file that was started in place of the command, if any.
    """
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in _ASKS_FOR_HELP:
        print(_help())
        return 0
    if command == "--version":
        print(f"simpo {__version__}")
        return 0
    if command not in COMMANDS:
        nearest = "".join(f"; did you mean {name}?" for name in get_close_matches(command, COMMANDS, n=1, cutoff=0.5))
        return report_error(ConfigError(f"command: found {command[:60]!r}, expected {', '.join(COMMANDS)}{nearest}"))
    module = importlib.import_module(f"simpo_megatron.commands.{command.replace('-', '_')}")
    try:
        code: int = module.main(arguments, script or f"simpo {command}")
    except OSError as error:
        if error.filename is None:
            raise
        found = f"{error.filename}: cannot be used ({error.strerror}), expected a path that can; give another one"
        return report_error(ConfigError(found))
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            f"simpo {__version__}: SimPO (arXiv 2405.14734) on Megatron-Core",
            "",
            "usage: simpo COMMAND [options]",
            "       simpo COMMAND --help       the everyday options; --help-all shows all",
            "",
            *lines,
            "",
            "`simpo train` alone trains a tiny model on bundled pairs, in half a minute on a CPU.",
        ]
    )
