"""Answers the prompts of a file, into a folder that also holds the settings."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from simpo_megatron.data.ngrams import repetition
from simpo_megatron.errors import DataError, require
from simpo_megatron.generation.engines import Completion, Engine
from simpo_megatron.generation.item_progress import Progress, work_through
from simpo_megatron.generation.lines import append, appending, held_folder, keep_settings, read_lines, write_record
from simpo_megatron.generation.prompts import PromptItem, read_prompts

ANSWERS_FILE, RECORD_FILE = "answers.jsonl", "generation.json"


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The settings of decoding; only the temperature may depend on a prompt's category."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """Temperatures of prompts, by their category."""
    seed: int = 42
    num_samples: int = 1
    """Answers for each prompt."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "a number above 0")
        require(self.num_samples > 0, "samples", self.num_samples, "a number above 0")
        for temperature in (self.temperature, *self.temperatures.values()):
            require(temperature >= 0, "temperature", temperature, "a number not below 0; 0 is greedy")
        all_greedy = self.num_samples > 1 and min((self.temperature, *self.temperatures.values())) == 0
        require(not all_greedy, "samples", self.num_samples, "1 at temperature 0, where all are the same")

    def temperature_of(self, item: PromptItem) -> float:
        return self.temperatures.get(item.category or "", self.temperature)

    def seed_of(self, item: PromptItem, sample: int) -> int:
        """The seed of one answer, independent of the others."""
        digest = hashlib.sha256(f"{self.seed} {sample} {item.id}".encode()).digest()
        return int.from_bytes(digest[:4], "little") >> 1


def answer_prompts(engine: Engine, prompts: Path, folder: Path, decoding: Decoding) -> Iterator[str]:
    """Answers the prompts without an answer in `folder`, and writes a line for each; yields lines of progress.

    `answers.jsonl` has for each prompt and sample its id, the whole conversation, the answers in it, their tokens,
    whether one was cut, temperature and seed. `generation.json` holds the settings and a summary.

    Raises:
        ConfigError: the folder was begun with other settings, or is another process's.
        DataError: a prompt cannot be rendered with one BOS, or leaves no room for an answer.
    """
    items = read_prompts(prompts)
    with held_folder(folder):
        settings = {
            **engine.identity(),
            **vars(decoding),
            "temperatures": dict(decoding.temperatures),
            "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest(),
            "first_prompt": engine.rendered(items[0].messages),
        }
        keep_settings(folder / RECORD_FILE, settings)
        known = {(row["id"], row["sample"]) for row in read_answers(folder, num_tokens=int)}
        asked = [(item, sample) for item in items for sample in range(decoding.num_samples)]
        left = [(item, sample) for item, sample in asked if (item.id, sample) not in known]
        if len(left) < len(asked):
            yield f"resume    {len(asked) - len(left):,} of {len(asked):,} answers are there already"
        yield from _answer(engine, left, decoding, folder / ANSWERS_FILE)
        summary = summarize(read_answers(folder, num_tokens=int))
        write_record(folder / RECORD_FILE, {"settings": settings, "answers": summary})
    shares = f"{summary['cut']:.1%} cut, {summary['empty']:.1%} empty, {summary['repetition']:.1%} of 4-grams repeated"
    yield f"answers   {summary['num_answers']:,}, {summary['mean_tokens']:.0f} tokens on average; {shares}"
    yield f"written   {folder / ANSWERS_FILE}; settings in {folder / RECORD_FILE}"


def read_answers(folder: Path, **fields: type) -> list[dict[str, Any]]:
    """The answers in `folder`, checked to have `fields` of these types; none where there are none yet.

    Raises: DataError for a line that is no answer.
    """
    path = folder / ANSWERS_FILE
    rows = read_lines(path, id=str, sample=int, messages=list, answers=list, is_cut=bool, **fields)
    for number, row in enumerate(rows, 1):
        turns = [isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in row["messages"]]
        if not row["answers"] or not all(isinstance(text, str) for text in row["answers"]) or not all(turns):
            raise DataError(f"{path}:{number}: found no answer as text, expected one to each turn; remove the line")
    return rows


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`num_answers`, `mean_tokens`, and shares of all answers; an answer of several turns counts once."""
    return {
        "num_answers": len(rows),
        "mean_tokens": fmean(row["num_tokens"] for row in rows),
        "cut": fmean(row["is_cut"] for row in rows),
        "empty": fmean(not all(row["answers"]) for row in rows),
        "repetition": fmean(repetition(" ".join(row["answers"]).split()) for row in rows),
    }


def _answer(engine: Engine, left: Sequence[tuple[PromptItem, int]], decoding: Decoding, path: Path) -> Iterator[str]:
    """Appends an answer to `path` for each of `left`; yields lines of progress. The first error ends the others."""
    writing = threading.Lock()
    # In the main thread, where the kernel's signals can interrupt a chat template, and before the first answer.
    for item in {id(item): item for item, _ in left}.values():
        with _naming(item):
            engine.check(item.messages, decoding.max_new_tokens)
    with appending(path) as file:

        def work(asked: tuple[PromptItem, int]) -> None:
            row = _converse(engine, *asked, decoding)
            with writing:
                append(file, row)

        yield from work_through(work, left, engine.num_at_once, Progress("answers", "answers", len(left)))


@contextmanager
def _naming(item: PromptItem) -> Iterator[None]:
    """An error on the data of a prompt begins with the prompt's id."""
    try:
        yield
    except DataError as error:
        raise DataError(f"id {item.id}: {error}") from None


def _converse(engine: Engine, item: PromptItem, sample: int, decoding: Decoding) -> dict[str, Any]:
    """One line of the answers: every turn of the prompt answered in order, after the answers before it."""
    temperature, seed = decoding.temperature_of(item), decoding.seed_of(item, sample)
    messages, completions = [dict(turn) for turn in item.messages], list[Completion]()
    for turn in (None, *item.later_turns):
        if turn is not None:
            messages.append({"role": "user", "content": turn})
        with _naming(item):
            completions.append(
                engine.complete(messages, max_new_tokens=decoding.max_new_tokens, temperature=temperature, seed=seed)
            )
        messages.append({"role": "assistant", "content": completions[-1].text})
    return {
        "id": item.id,
        "sample": sample,
        **({} if item.category is None else {"category": item.category}),
        "messages": messages,
        "answers": [one.text for one in completions],
        "num_tokens": sum(one.num_tokens for one in completions),
        "is_cut": any(one.is_cut for one in completions),
        "temperature": temperature,
        "seed": seed,
    }
