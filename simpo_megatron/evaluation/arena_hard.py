"""Arena-Hard by arena-hard-auto's own scripts, in a folder with the answers of this model and of the baseline only."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from simpo_megatron.atomic import write_text
from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.evaluation.evaluated import EvaluatedModel
from simpo_megatron.evaluation.judging import JudgeServer, Metric, OfficialScorer, Scored, cut_half_line
from simpo_megatron.evaluation.official import OfficialEnvironment
from simpo_megatron.generation.lines import read_lines

COMMIT = "196f6b8"
# SHA-256 of the files that judge and score.
_FILES = {
    "gen_judgment.py": "eddf78a88ce0e3348dd54debd3cb668e1b1d8773d4b239e47b71e5f2564bb402",
    "show_result.py": "5da0fa30a807a150da37e97811c2bc248959015eedb884d9d471e894c8bf90c6",
    "utils/add_markdown_info.py": "a34f3cc457bb35b6ef66854b55359c8669b1c7307c466230cce1ebfa28ab54be",
    "utils/completion.py": "ff2e88971b250f29c682dd9c485a7ea67c46f405e6e8f6901f9f82e7d629a9ab",
    "utils/judge_utils.py": "cbb093f4fc27408d8447e946392f26f98538b1e3950f574aca91a0f7595167b4",
    "utils/math_utils.py": "c2e927dc0f45771d9b387c29837c76c2b5008b1f6f81819259c288c01f49ade0",
}
_CHILD = Path(__file__).with_name("arena_hard_child.py")
VERDICTS = frozenset({"A>B", "A>>B", "A=B", "A<<B", "A<B", "B>A", "B>>A", "B=A", "B<<A", "B<A"})
# A row of show_result.py's table: model, score, interval below and above.
_NO_TOKENIZER = "tiktoken's o200k_base is neither in TIKTOKEN_CACHE_DIR nor to be fetched"
_NUMBER = r"-?[\d.]+"
_TABLE_ROW = re.compile(
    rf"^\d+\s+(?P<model>\S+)\s+(?P<score>{_NUMBER})\s+\(-(?P<below>{_NUMBER}) / \+(?P<above>{_NUMBER})\)", re.M
)


@dataclass(frozen=True)
class Category:
    """A part of the benchmark with a score of its own."""

    name: str
    baseline: str


_VERSIONS = {
    "arena-hard-v0.1": (Category("arena-hard-v0.1", "gpt-4-0314"),),
    "arena-hard-v2.0": (
        Category("hard_prompt", "o3-mini-2025-01-31"),
        Category("creative_writing", "gemini-2.0-flash-001"),
    ),
}
_JUDGES = {"arena-hard-v0.1": ("gpt-4-1106-preview",), "arena-hard-v2.0": ("gpt-4.1", "gemini-2.5")}


class ArenaHardScorer(OfficialScorer):
    """Each answer is compared with the baseline's twice, with sides swapped; the score is the percentage of wins.

    A strong verdict counts as three battles, a tie as half a win. Since every battle is against the baseline, this
    share is also what the Bradley-Terry model of the published leaderboard gives.

    Source: gen_judgment.py and show_result.py of arena-hard-auto 196f6b8.
    """

    benchmark = "arena-hard"
    package = f"arena-hard-auto {COMMIT}"

    def __init__(self, model: EvaluatedModel, environment: OfficialEnvironment, checkout: Path | None) -> None:
        super().__init__(model, environment)
        self._checkout = checked_checkout(checkout or model.questions.parents[2])
        names = {row["category"] for row in model.rows()}
        self._version = "arena-hard-v0.1" if names == {"arena-hard-v0.1"} else "arena-hard-v2.0"
        self._categories = tuple(one for one in _VERSIONS[self._version] if one.name in names)
        self._data = self._checkout / "data" / self._version

    @property
    def published_judges(self) -> tuple[str, ...]:
        return _JUDGES[self._version]

    def check(self) -> None:
        official = {row["uid"]: row["prompt"] for row in read_lines(self._data / "question.jsonl")}
        for row in self.model.rows():
            if official.get(row["uid"]) != row["prompt"]:
                raise DataError(
                    f"{self.model.questions}: found question {row['uid']} in other words than in {self._data}, "
                    "expected the text that is judged; answer the questions of that file"
                )
        uids = {row["uid"] for row in self.model.rows()}
        for category in self._categories:
            path = self._baseline_file(category)
            if not path.is_file() or not path.read_bytes().startswith(b"{"):
                raise ConfigError(
                    f"{path}: found no answers of the baseline, expected those of {category.baseline} in "
                    f"arena-hard-auto's repository (Apache-2.0; git lfs pull fetches large ones)"
                )
            own = {row["uid"] for row in self.model.rows() if row["category"] == category.name} & uids
            if missing := own - {row["uid"] for row in read_lines(path)}:
                raise DataError(f"{path}: found no answer to {min(missing)}, expected one to every question")

    def num_left(self, judge: str) -> int:
        return 2 * (len(self.model.rows()) - sum(map(_has_come, self._judgments(judge))))

    def judge(self, judge: JudgeServer) -> Generator[None]:
        self._lay_out()
        self._forget_what_never_came(judge.name)
        settings = yaml.safe_load((self._checkout / "config" / f"{self._version}.yaml").read_text(encoding="utf-8"))
        settings |= {"judge_model": judge.name, "model_list": [self.model.name]}
        # Without endpoints the client takes URL and key from the environment, and no file holds the key.
        endpoint = {"model": judge.name, "endpoints": None, "api_type": "openai", "parallel": judge.num_at_once}
        files = {"arena-hard.yaml": settings, "api_config.yaml": {judge.name: endpoint}}
        for name, content in files.items():
            write_text(self.model.folder / name, yaml.safe_dump(content, sort_keys=False))
        yield from self.environment.running(
            "gen_judgment",
            [
                self._checkout / "gen_judgment.py",
                *("--setting-file", "arena-hard.yaml", "--endpoint-file", "api_config.yaml"),
            ],
            log=self.model.log,
            cwd=self.model.folder,
            variables=judge.variables,
        )

    def score(self, judge: str) -> Scored:
        self._lay_out()
        cut_half_line(self._judgments_file(judge))
        rows = self._judgments(judge)
        if len(rows) != len(self.model.rows()) or not all(map(_has_come, rows)):
            raise DataError(
                f"{self._judgments_file(judge)}: found fewer verdicts than answers, expected one for each; judge again"
            )
        self._check_verdicts(rows, judge)
        # The seeded bootstrap draws judgments by their places, so their order must not be that of arrival.
        places = {row["uid"]: place for place, row in enumerate(self.model.rows())}
        self._write_judgments(judge, sorted(rows, key=lambda row: places[row["uid"]]))
        battles = self.battles(judge)
        metrics: dict[str, Metric] = {}
        notes = []
        for category in self._categories:
            won = [score for row in battles if row["category"] == category.name for score in row["scores"]]
            low, high = self._table(judge, category)[1:]
            metrics[_metric_name("win rate", category)] = {"value": 100 * fmean(won), "low": low, "high": high}
            try:
                self._count_markdown()
                value, low, high = self._table(judge, category, "-f", "markdown", "length")
            except DataError as error:
                is_tokenizer = "o200k_base" in str(error)
                notes.append(f"no style-controlled score: {_NO_TOKENIZER if is_tokenizer else error}")
            else:
                name = _metric_name("style-controlled win rate", category)
                metrics[name] = {"value": value, "low": low, "high": high}
        unread = sum(None in (game["score"] for game in row["games"]) for row in rows)
        baseline = [row["messages"][-1]["content"]["answer"] for row in self._baseline_answers()]
        return Scored(metrics, unread, fmean(map(len, baseline)), tuple(notes))

    def battles(self, judge: str) -> list[dict[str, Any]]:
        """`uid`, `category` and `scores` of each question, as the official code reads the verdicts."""
        out = self.model.folder / "battles.json"
        self.environment.run(
            "show_result",
            [_CHILD, self._checkout, "battles", out, self._version, judge],
            log=self.model.log,
            cwd=self.model.folder,
        )
        found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
        return found

    def _table(self, judge: str, category: Category, *control: str) -> tuple[float, float, float]:
        """The score and its 90 % interval as show_result.py prints them, with seeded random numbers.

        Style is controlled by both features or not at all; with markdown alone the script drops a model's column.
        """
        out = self.model.folder / "show_result.txt"
        self.environment.run(
            "show_result",
            [
                *(_CHILD, self._checkout, "table", out),
                *("-b", self._version, "-j", judge, "-c", category.name, *control),
            ],
            log=self.model.log,
            cwd=self.model.folder,
        )
        for row in _TABLE_ROW.finditer(out.read_text(encoding="utf-8")):
            if row["model"] == self.model.name:
                value = float(row["score"])
                return value, value - float(row["below"]), value + float(row["above"])
        raise DataError(f"{out}: found no row of {self.model.name}, expected one of show_result.py")

    def _lay_out(self) -> None:
        """Copies the files that the official code reads into `data/` of its working folder."""
        data = self.model.folder / "data" / self._version
        (data / "model_answer").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._data / "question.jsonl", data / "question.jsonl")
        for category in self._categories:
            path = self._baseline_file(category)
            shutil.copyfile(path, data / "model_answer" / path.name)
        answers = f"{self.model.name}.jsonl"
        shutil.copyfile(self.model.folder / "model_answer" / answers, data / "model_answer" / answers)

    def _count_markdown(self) -> None:
        """Adds the counts that style control needs to all answers; v0.1's baseline lacks them."""
        target = self.model.folder / "data" / self._version / "model_answer"
        self.environment.run(
            "add_markdown_info",
            [
                self._checkout / "utils/add_markdown_info.py",
                *("--dir", target, "--output-dir", target),
            ],
            log=self.model.log,
            cwd=self.model.folder,
        )

    def _forget_what_never_came(self, judge: str) -> None:
        """Removes judgments without a verdict, which the official code would keep, so that they are made again."""
        path = self._judgments_file(judge)
        cut_half_line(path)
        rows = read_lines(path)
        if all(map(_has_come, rows)):
            return
        self._write_judgments(judge, filter(_has_come, rows))

    def _write_judgments(self, judge: str, rows: Iterable[Mapping[str, Any]]) -> None:
        write_text(self._judgments_file(judge), "".join(json.dumps(row) + "\n" for row in rows))

    def _check_verdicts(self, rows: Sequence[Mapping[str, Any]], judge: str) -> None:
        for row in rows:
            for game in row["games"]:
                if game["score"] is not None and game["score"] not in VERDICTS:
                    raise DataError(
                        f"{self._judgments_file(judge)}: found the verdict {game['score'][:20]!r} on {row['uid']}, "
                        f"which ends the official scorer, expected one of {', '.join(sorted(VERDICTS))}; remove the "
                        "line, and judge again"
                    )

    def _judgments_file(self, judge: str) -> Path:
        return self.model.folder / "data" / self._version / "model_judgment" / judge / f"{self.model.name}.jsonl"

    def _judgments(self, judge: str) -> list[dict[str, Any]]:
        return read_lines(self._judgments_file(judge))

    def _baseline_file(self, category: Category) -> Path:
        return self._data / "model_answer" / f"{category.baseline}.jsonl"

    def _baseline_answers(self) -> list[dict[str, Any]]:
        uids = {row["uid"]: row["category"] for row in self.model.rows()}
        return [
            row
            for category in self._categories
            for row in read_lines(self._baseline_file(category))
            if uids.get(row["uid"]) == category.name
        ]


def checked_checkout(folder: Path) -> Path:
    """The folder, checked to be a checkout of arena-hard-auto.

    Raises: ConfigError where it is none, or one of another version.
    """
    for name, expected in _FILES.items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        if found != expected:
            raise ConfigError(
                f"checkout: found {'another' if found else 'no'} {name} in {folder}, expected a checkout of "
                f"https://github.com/lmarena/arena-hard-auto at {COMMIT} (Apache-2.0); name it by --checkout DIR"
            )
    return folder.absolute()


def _has_come(row: Mapping[str, Any]) -> bool:
    return all(game is not None for game in row["games"])


def _metric_name(name: str, category: Category) -> str:
    return name if category.name == "arena-hard-v0.1" else f"{name}, {category.name}"
