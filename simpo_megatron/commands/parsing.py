"""The argument parser that the commands share: one line for a mistake, everyday options first."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from simpo_megatron.errors import ConfigError, report_error


class CommandParser(argparse.ArgumentParser):
    """A parser of one command, whose `description` is shown as it is written.

    Args:
        takes_trainer_options: the trainer's options may follow the command's own, and `--help-all` shows both.
    """

    def __init__(
        self, prog: str, description: str | None = None, *, takes_trainer_options: bool = False, **keywords: Any
    ) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter, allow_abbrev=False, **keywords)
        if takes_trainer_options:
            self.add_argument("--help-all", action=_HelpAll, help="show the trainer's options too, and exit")
        else:
            self.add_argument("--help-all", action="help", help="the same as --help")

    def error(self, message: str) -> NoReturn:
        """Exit with 2 after one line, as every command does for a mistake in what was asked."""
        raise SystemExit(report_error(ConfigError(f"command line: {message}; see {self.prog} --help")))


class _HelpAll(argparse.Action):
    """Print the help of the command, then that of the trainer, and exit with 0."""

    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **keywords)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from simpo_megatron.config import load_config

        parser.print_help()
        print("\nThe trainer's options:\n", flush=True)
        load_config(["--help-all"])
