"""AlpacaEval 2 by alpaca-eval's own command, the length-controlled rate included."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Generator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from simpo_megatron.atomic import write_text
from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.evaluation.evaluated import slug
from simpo_megatron.evaluation.judging import JudgeServer, Metric, OfficialScorer, Scored
from simpo_megatron.evaluation.official import VERSIONS
from simpo_megatron.generation.prompts import read_rows

_PACKAGE = "alpaca-eval"
_JUDGE = "gpt-4-1106-preview"
_ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
# SHA-256 of the 805 instructions in the reference's own order, joined by NUL.
ORDER_OF_INSTRUCTIONS = "bfe8c45991f635de0b1f94abeeb1335ef665d58eddd87ddf6fa71b7b0c2ce7a5"
# The command alpaca_eval, which may lie in another folder than its Python.
_COMMAND = "from alpaca_eval.main import main; main()"


class AlpacaEvalScorer(OfficialScorer):
    """Each answer is set against GPT-4 Turbo's; the score is the mean probability that it is preferred, in percent.

    The judge's preference is the probability of one token of two. The length-controlled rate is a logistic regression's
    answer to what the rate would be at equal lengths.

    Source: alpaca_eval 0.6.6.
    """

    benchmark = "alpaca-eval"
    package = f"{_PACKAGE} {VERSIONS[_PACKAGE]}"
    needs_logprobs = True

    @property
    def published_judges(self) -> tuple[str, ...]:
        return (_JUDGE,)

    def check(self) -> None:
        for number, row in enumerate(self.model.rows(), 1):
            if not isinstance(row.get("output"), str) or not isinstance(row.get("generator"), str):
                raise DataError(
                    f"{self.model.questions}:{number}: found no output and generator, expected the answers of the "
                    "baseline, as alpaca_eval_gpt4_baseline.json of the dataset tatsu-lab/alpaca_eval has them "
                    "(CC-BY-NC-4.0)"
                )
        outputs = read_rows(self._outputs)
        if [row["instruction"] for row in outputs] != [row["instruction"] for row in self.model.rows()]:
            raise DataError(
                f"{self._outputs}: found instructions in another order than in {self.model.questions}, expected the "
                "same, by which difficulties are looked up; write the answers again with simpo evaluate alpaca-eval "
                "generate"
            )

    def num_left(self, judge: str) -> int:
        come = {(row["instruction"], row["output_2"]) for row in self._kept(judge) if _has_come(row)}
        left = sum((row["instruction"], row["output"]) not in come for row in read_rows(self._outputs))
        return left if self._is_annotated(judge) else max(1, left)

    def judge(self, judge: JudgeServer) -> Generator[None]:
        folder = self._folder(judge.name)
        folder.mkdir(parents=True, exist_ok=True)
        self._forget_what_never_came(judge.name)
        write_text(folder / "configs.yaml", yaml.safe_dump(self._annotator(judge.name), sort_keys=False))
        clients = folder / "clients.yaml"
        # The client takes the key from the environment.
        write_text(clients, yaml.safe_dump({"default": [{"base_url": judge.url}]}))
        variables = {**judge.variables, "OPENAI_CLIENT_CONFIG_PATH": str(clients)}
        variables["OPENAI_MAX_CONCURRENCY"] = str(judge.num_at_once)
        yield from self._evaluating(judge.name, ["--fn_metric", "get_winrate", "--sort_by", "win_rate"], variables)

    def score(self, judge: str) -> Scored:
        if not self._is_annotated(judge):
            raise DataError(
                f"{self._folder(judge)}: found fewer verdicts than answers, expected one for each; judge again"
            )
        missing = sum(row["preference"] is None for row in self._annotations(judge))
        notes: tuple[str, ...] = ()
        if reason := self.reason_against_length_control():
            notes = (f"no length-controlled rate: {reason}",)
            options = ["--fn_metric", "get_winrate", "--sort_by", "win_rate"]
        else:
            # The regression's weights are kept here, not among the package's own files, which is its default.
            options = ["--metric_kwargs", json.dumps({"save_weights_dir": str(self._folder(judge) / "weights")})]
        for _ in self._evaluating(judge, options, {"OPENAI_API_KEY": "none"}):
            pass
        with (self._folder(judge) / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
            (row,) = csv.DictReader(file)
        metrics: dict[str, Metric] = {}
        if not notes:
            value, error = float(row["length_controlled_winrate"]), float(row["lc_standard_error"])
            metrics["length-controlled win rate"] = {"value": value, "error": error}
        metrics["win rate"] = {"value": float(row["win_rate"]), "error": float(row["standard_error"])}
        return Scored(metrics, missing, fmean(len(row["output"]) for row in self.model.rows()), notes)

    def reason_against_length_control(self) -> str | None:
        """The reason why the length-controlled rate would be wrong; None where it is right."""
        rows = self.model.rows()
        if not self.model.is_whole():
            return f"found {len(rows)} rows, expected the reference's 805, whose order gives the difficulties"
        found = hashlib.sha256("\0".join(row["instruction"] for row in rows).encode()).hexdigest()
        if found != ORDER_OF_INSTRUCTIONS:
            return (
                "found 805 other rows, or another order, expected the reference's, whose order gives the difficulties"
            )
        return None

    @property
    def _outputs(self) -> Path:
        return self.model.folder / "model_outputs.json"

    def _folder(self, judge: str) -> Path:
        return self.model.folder / f"alpaca_eval-{slug(judge)}"

    def _annotator(self, judge: str) -> dict[str, Any]:
        """The official annotator with another model as the judge, by its name in the verdicts."""
        official = self.environment.folder_of(_PACKAGE) / "evaluators_configs"
        config = yaml.safe_load((official / _ANNOTATOR / "configs.yaml").read_text(encoding="utf-8"))[_ANNOTATOR]
        config["prompt_template"] = str(official / config["prompt_template"])
        # Otherwise the client guesses from the model's name whether it takes messages.
        config["completions_kwargs"] |= {"model_name": judge, "requires_chatml": True}
        return {_ANNOTATOR if judge == _JUDGE else slug(judge): config}

    def _evaluating(self, judge: str, options: list[str], variables: dict[str, str]) -> Generator[None]:
        folder = self._folder(judge)
        paths = {
            "model_outputs": self._outputs,
            "reference_outputs": self.model.questions,
            "annotators_config": folder / "configs.yaml",
            "output_path": folder,
        }
        try:
            yield from self.environment.running(
                "alpaca_eval",
                [
                    *(
                        "-c",
                        _COMMAND,
                        "evaluate",
                        "--name",
                        json.dumps(self.model.name),
                        "--precomputed_leaderboard",
                        "None",
                    ),
                    *(part for name, path in paths.items() for part in (f"--{name}", path)),
                    *options,
                ],
                log=self.model.log,
                variables=variables,
            )
        except DataError as error:
            if "metric_kwargs" in options[0] and "df_gamed" in self.model.log.read_text(encoding="utf-8")[-20_000:]:
                raise ConfigError(
                    "df_gamed.csv: found no copy in the hub's cache and no way to the hub, expected the file of the "
                    "dataset tatsu-lab/alpaca_eval (CC-BY-NC-4.0), which the length-controlled rate needs; fetch it "
                    "with hf download tatsu-lab/alpaca_eval df_gamed.csv --repo-type dataset"
                ) from None
            raise error

    def _annotations(self, judge: str) -> list[dict[str, Any]]:
        path = self._folder(judge) / "annotations.json"
        return read_rows(path) if path.is_file() else []

    def _kept(self, judge: str) -> list[dict[str, Any]]:
        """The verdicts that the package has kept, in chunks of 128, to continue from."""
        path = self._cache_file(judge)
        try:
            return read_rows(path) if path.is_file() else []
        except DataError:
            # It is being written.
            return []

    def _forget_what_never_came(self, judge: str) -> None:
        """Removes kept verdicts that the judge never gave, as under a rate limit, so that they are asked for again."""
        kept = self._kept(judge)
        if not all(map(_has_come, kept)):
            write_text(self._cache_file(judge), json.dumps(list(filter(_has_come, kept)), indent=2))

    def _cache_file(self, judge: str) -> Path:
        return self._folder(judge) / "annotations_seed0_configs.json"

    def _is_annotated(self, judge: str) -> bool:
        """True when every answer has a verdict."""
        found = [(row["instruction"], row["output_2"]) for row in self._annotations(judge)]
        return found == [(row["instruction"], row["output"]) for row in read_rows(self._outputs)]


def _has_come(row: Mapping[str, Any]) -> bool:
    """True for a verdict that the judge gave, be it readable or not; identical outputs need none."""
    return row.get("preference_raw_completion") is not None or row["output_1"] == row["output_2"]
