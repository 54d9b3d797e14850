"""Scores of answers: by a reward model in this process, by a judge behind a URL, or from a file."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo_megatron.data import PairOptions, load_tokenizer
from simpo_megatron.data.records import BadRecord
from simpo_megatron.data.rendering import chat_template_of
from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.generation.lines import is_finite_number, read_lines
from simpo_megatron.generation.prompts import Message
from simpo_megatron.generation.server import ChatServer

_JUDGE_TOKENS = 1024
_FIRST_REPLIES = 16
"""Replies of a judge that rates nothing, after which it is asked no more."""
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_INSTRUCTION = (
    "You judge answers. Below stands a conversation that ends with an answer of the assistant. Rate that answer for "
    "helpfulness, correctness and honesty, from 1 (useless or harmful) to 10 (could not be better). Length is no "
    "merit. Give your reasons in two sentences, then the rating in double square brackets, as in [[7]]."
)


class Scorer(ABC):
    """A judge of answers; a higher score is better."""

    num_at_once = 1
    """Answers that are scored at a time, by calls of `score` in several threads."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Facts that determine the scores, as JSON values."""

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027 - only a file can be known beforehand
        """Returns where `rows` can be scored.

        Raises: DataError.
        """

    @abstractmethod
    def score(self, row: Mapping[str, Any]) -> float | None:
        """The score of one line of the answers, whose conversation ends with the answer; None where it gets none.

        Raises: DataError.
        """


class RewardModel(Scorer):
    """A sequence classifier of one output in this process, with its own chat template."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        from simpo_megatron.checkpoint.fingerprint import sampled_fingerprint
        from simpo_megatron.mcore import device
        from simpo_megatron.mcore.hf import load_transformers_model

        self._tokenizer = load_tokenizer(folder)
        template = chat_template_of(self._tokenizer, PairOptions())
        if template is None:
            raise ConfigError(f"reward_model: found no chat template in {folder}, expected one that renders answers")
        self._template, self._fingerprint = template, sampled_fingerprint(folder)
        self._model = load_transformers_model(AutoModelForSequenceClassification, folder)
        if self._model.config.num_labels != 1:
            raise ConfigError(
                f"reward_model: found {self._model.config.num_labels} outputs in {folder}, expected one, the score"
            )
        if device.has_cuda():
            self._model.to("cuda")

    def identity(self) -> dict[str, Any]:
        return {"scorer": "reward model", "model": self._fingerprint}

    def score(self, row: Mapping[str, Any]) -> float:
        import torch

        try:
            text = self._template.render([dict(turn) for turn in row["messages"]])
        except BadRecord as error:
            raise DataError(
                f"{row['id']}: found a conversation that the reward model's template refuses ({error}), expected "
                "one that it takes"
            ) from None
        ids = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(self._model.device)
        most = getattr(self._model.config, "max_position_embeddings", None)
        if most is not None and ids.shape[1] > most:
            raise DataError(f"{row['id']}: found {ids.shape[1]} tokens, expected at most {most} of the reward model")
        with torch.inference_mode():
            return float(self._model(ids).logits[0, 0])


class Judge(Scorer):
    """A chat model that rates an answer from 1 to 10, greedily."""

    def __init__(self, server: ChatServer, num_at_once: int = 16) -> None:
        self._server, self.num_at_once = server, num_at_once
        self._num_unread, self._has_rated = 0, False

    def identity(self) -> dict[str, Any]:
        return {"scorer": "judge", "url": self._server.url, "model": self._server.model}

    def score(self, row: Mapping[str, Any]) -> float | None:
        asked = [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": _as_text(row["messages"])}]
        said = self._server.chat(asked, max_tokens=_JUDGE_TOKENS, temperature=0.0, seed=0).text
        ratings = [float(found) for found in _RATING.findall(said)]
        if ratings and 1 <= ratings[-1] <= 10:
            self._has_rated = True
            return ratings[-1]
        self._num_unread += 1
        if self._num_unread >= _FIRST_REPLIES and not self._has_rated:
            raise DataError(
                f"judge: found no rating in {self._num_unread} replies of {self._server.model}, the last "
                f"{said[:80]!r}, expected [[1]] to [[10]]; judge with another model"
            )
        return None


class ScoresOfFile(Scorer):
    """Scores from a file: lines of id, sample and score."""

    def __init__(self, path: Path) -> None:
        self._path = path
        rows = read_lines(path, id=str, sample=int)
        self._digest = hashlib.sha256(path.read_bytes()).hexdigest() if rows else ""
        self._scores = {(row["id"], row["sample"]): row.get("score") for row in rows}
        if not self._scores:
            raise ConfigError(f"scores: found nothing in {path}, expected lines of id, sample and score")

    def identity(self) -> dict[str, Any]:
        return {"scorer": "file", "file": self._path.name, "scores": self._digest}

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self.score(row)

    def score(self, row: Mapping[str, Any]) -> float:
        found = self._scores.get((row["id"], row["sample"]))
        if not is_finite_number(found):
            raise DataError(
                f"{self._path}: found {'no score' if found is None else repr(found)[:80]} of id {row['id']!r}, sample "
                f"{row['sample']}, expected a finite score of each answer"
            )
        return float(found)


def _as_text(messages: Sequence[Message]) -> str:
    return "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in messages)
