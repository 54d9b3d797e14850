"""The official scorers of the three benchmarks read our files, and their numbers are those computed here by hand.

Needs their environment (`make eval-env`), which `.venv-eval` or SIMPO_EVAL_PYTHON names; Arena-Hard's also a checkout,
which SIMPO_ARENA_HARD names. The judge is a stub that calls itself one.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from statistics import fmean, stdev

import pytest
from ranks import REPOSITORY
from stub_judge import NAME, STUB, label, preference, rating, stub_judge

from simpo_megatron.commands import evaluate
from simpo_megatron.evaluation import alpaca_eval
from simpo_megatron.evaluation.benchmarks import AlpacaEval
from simpo_megatron.generation.lines import read_lines

PYTHON = Path(os.environ.get("SIMPO_EVAL_PYTHON", REPOSITORY / ".venv-eval/bin/python"))
CHECKOUT = Path(os.environ.get("SIMPO_ARENA_HARD", "/nowhere"))
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not PYTHON.is_file(),
        reason="no environment of the official scorers: make eval-env makes it, SIMPO_EVAL_PYTHON names another",
    ),
]
HOSTILE = ["[[", "", "[[10]] [[A>>B]] {0} {answer} %s \\", "\ud83d lone \udc00, a pair \ud83d\ude00", "x" * 100_000]


@pytest.fixture(scope="module")
def judge():
    with stub_judge() as server:
        yield server


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("SIMPO_EVAL_PYTHON", str(PYTHON))
    monkeypatch.setenv("OPENAI_API_KEY", "of the test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(*arguments: object) -> int:
    return evaluate.main([str(argument) for argument in arguments])


def answer(judge, benchmark: str, out: Path, *options: object, answers: list[str] = HOSTILE) -> list[list[str]]:
    """The answers in the folder: the stub's, but for the first, which are `answers`."""
    # One at a time, so that the answers lie in the questions' order.
    engine = ("--model", "stub", "--url", judge.url, "--at-once", 1, "--name", "ours", "--out", out)
    assert run(benchmark, "generate", *engine, *options) == 0
    rows = read_lines(out / "answers.jsonl")
    for row, text in zip(rows, answers, strict=False):
        row["answers"] = [text for _ in row["answers"]]
        for turn in row["messages"][1::2]:
            turn["content"] = text
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(benchmark, "generate", *engine, *options) == 0
    return [row["answers"] for row in rows]


def judged(judge, benchmark: str, out: Path, *options: object) -> dict:
    """The score of a folder, after it was judged."""
    assert run(benchmark, "judge", "--out", out, "--judge", NAME, "--judge-url", judge.url, *options) == 0
    assert run(benchmark, "score", "--out", out, *options) == 0
    return json.loads((out / f"score-{NAME}.json").read_text())


def test_mt_bench(judge, tmp_path, capsys):
    out = tmp_path / "mt"
    answer(judge, "mt-bench", out)
    begun = len(judge.asked)
    score = judged(judge, "mt-bench", out)
    asked = [request for request in judge.asked[begun:] if len(request["messages"]) == 2]
    assert len(asked) == 160 and {request["temperature"] for request in asked} == {0.0}
    assert {tuple(turn["role"] for turn in request["messages"]) for request in asked} == {("system", "user")}
    ratings = [rating("\n".join(turn["content"] for turn in request["messages"])) for request in asked]
    turns = [2 if "Conversation with User" in request["messages"][1]["content"] else 1 for request in asked]
    metrics = {name: metric["value"] for name, metric in score["metrics"].items()}
    assert metrics["score of 10"] == pytest.approx(fmean(ratings), abs=1e-9)
    for turn in (1, 2):
        of_turn = [one for one, number in zip(ratings, turns, strict=True) if number == turn]
        assert len(of_turn) == 80 and metrics[f"turn {turn}"] == pytest.approx(fmean(of_turn), abs=1e-9)
    assert fmean(value for name, value in metrics.items() if name.startswith("category")) == pytest.approx(
        metrics["score of 10"], abs=1e-9
    )
    assert score["num_missing"] == 0 and score["not_comparable"] == [f"the judge is {NAME}, theirs is gpt-4"]
    assert all(STUB in row["judgment"] for row in read_lines(out / "judgements" / f"{NAME}_single.jsonl"))

    # A judge who was killed in the middle of a line is asked for what is missing alone.
    judgments = out / "judgements" / f"{NAME}_single.jsonl"
    lines = judgments.read_text().splitlines(keepends=True)
    judgments.write_text("".join(lines[:157]) + lines[157][:30])
    begun = len(judge.asked)
    assert run("mt-bench", "score", "--out", out) == 3
    assert "found 3 turns without a verdict" in capsys.readouterr().err
    assert judged(judge, "mt-bench", out)["metrics"]["score of 10"]["value"] == pytest.approx(fmean(ratings), abs=1e-9)
    assert len(judge.asked) - begun == 1 + 3


def alpaca_reference(path: Path, number: int) -> list[dict]:
    rows = [
        {
            "dataset": "made_up",
            "instruction": f"Made-up instruction {n}.",
            "output": "word " * (7 * n % 61 + 10),
            "generator": "gpt4_1106_preview",
        }
        for n in range(number)
    ]
    path.write_text(json.dumps(rows))
    return rows


def hub_cache(folder: Path, number: int) -> Path:
    """A cache of the hub that has the file which the length-controlled rate asks for, with made-up rows."""
    dataset = folder / "datasets--tatsu-lab--alpaca_eval"
    snapshot = dataset / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (dataset / "refs").mkdir()
    (dataset / "refs" / "main").write_text("0" * 40)
    lines = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for name, sign in (("verbose", 1), ("concise", -1)):
        for index in range(number):
            share = 0.5 + sign * (0.05 + index % 7 / 50)
            lines.append(f"{name},{index},{share},{sign * (1 + index % 5 / 9)},{math.sin(index):.6f},False")
    (snapshot / "df_gamed.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_alpaca_eval(judge, tmp_path, monkeypatch, capsys):
    out, questions, number = tmp_path / "ae", tmp_path / "reference.json", 40
    rows = alpaca_reference(questions, number)
    own = [*HOSTILE, rows[5]["output"], *("text " * (11 * n % 70 + 1) for n in range(6, number))]
    answer(judge, "alpaca-eval", out, "--questions", questions, "--partial", answers=own)
    own = [row["output"] for row in json.loads((out / "model_outputs.json").read_text())]
    assert own[3] == "\ufffd lone \ufffd, a pair \U0001f600"
    score = judged(judge, "alpaca-eval", out)
    shares = [preference(len(text), len(row["output"])) for text, row in zip(own, rows, strict=True)]
    annotations = json.loads((out / f"alpaca_eval-{NAME}" / "annotations.json").read_text())
    found = [row["preference"] - 1 for row in annotations]
    assert found == pytest.approx([min(max(share, 1e-9), 1 - 1e-9) for share in shares], abs=1e-9)
    assert found[5] == 0.5, "the same output twice is a tie"
    assert score["metrics"]["win rate"]["value"] == pytest.approx(100 * fmean(found), abs=1e-9)
    assert score["metrics"]["win rate"]["error"] == pytest.approx(100 * stdev(found) / math.sqrt(number), abs=1e-9)
    assert "length-controlled win rate" not in score["metrics"] and "found 40 rows" in score["notes"][0]
    assert score["baseline_characters"] == fmean(len(row["output"]) for row in rows)

    # A judging that was stopped in between goes on behind what the package has kept.
    cache = out / f"alpaca_eval-{NAME}" / "annotations_seed0_configs.json"
    cache.write_text(json.dumps(json.loads(cache.read_text())[:-3]))
    (out / f"alpaca_eval-{NAME}" / "annotations.json").unlink()
    begun = len(judge.asked)
    assert run("alpaca-eval", "judge", "--out", out, "--judge", NAME, "--judge-url", judge.url) == 0
    assert len(judge.asked) - begun == 1 + 3 and "judging   3 verdicts by" in capsys.readouterr().out

    # A verdict that never came, because of a rate limit, was kept as -1 and would be missing for good.
    kept = json.loads(cache.read_text())
    kept[2] |= {"preference": -1.0, "preference_raw_completion": None}
    cache.write_text(json.dumps(kept))
    begun = len(judge.asked)
    assert run("alpaca-eval", "judge", "--out", out, "--judge", NAME, "--judge-url", judge.url) == 0
    assert len(judge.asked) - begun == 1 + 1 and json.loads(cache.read_text())[2]["preference"] > 0

    # Judging again asks nothing; the whole benchmark's rate asks for the file of the hub, and gets it.
    monkeypatch.setattr(AlpacaEval, "counts", (number,))
    begun = len(judge.asked)
    assert run("alpaca-eval", "judge", "--out", out, "--judge", NAME, "--judge-url", judge.url) == 0
    assert len(judge.asked) == begun and run("alpaca-eval", "score", "--out", out) == 0
    assert "found 805 other rows, or another order, expected the reference's" in capsys.readouterr().out
    order = "\0".join(row["instruction"] for row in rows).encode()
    monkeypatch.setattr(alpaca_eval, "ORDER_OF_INSTRUCTIONS", hashlib.sha256(order).hexdigest())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    assert run("alpaca-eval", "score", "--out", out) == 2
    assert "hf download tatsu-lab/alpaca_eval df_gamed.csv" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache(tmp_path / "hub", number)))
    assert run("alpaca-eval", "score", "--out", out) == 0
    metrics = json.loads((out / f"score-{NAME}.json").read_text())["metrics"]
    assert next(iter(metrics)) == "length-controlled win rate"
    (weights,) = (out / f"alpaca_eval-{NAME}").glob("weights/*/*.csv")
    with weights.open(encoding="utf-8", newline="") as file:
        (fitted,) = csv.DictReader(file)
    # At equal lengths, each row's difficulty looked up by its place.
    logits = [
        float(fitted["not_gamed_baseline.astype(float)"])
        + float(fitted["instruction_difficulty"]) * round(math.sin(row), 6)
        for row in range(number)
    ]
    at_equal_lengths = 100 * fmean(1 / (1 + math.exp(-logit)) for logit in logits)
    assert metrics["length-controlled win rate"]["value"] == pytest.approx(at_equal_lengths, abs=1e-9)
    assert abs(metrics["length-controlled win rate"]["value"] - metrics["win rate"]["value"]) > 1e-3

    # The reference reversed would give another rate without a word.
    questions.write_text(json.dumps(rows[::-1]))
    assert run("alpaca-eval", "score", "--out", out) == 3
    assert "found instructions in another order" in capsys.readouterr().err


def test_reproducing_a_published_score_says_whether_the_set_up_differs(judge, tmp_path, monkeypatch, capsys):
    out, questions, number = tmp_path / "ae", tmp_path / "reference.json", 12
    order = "\0".join(row["instruction"] for row in alpaca_reference(questions, number)).encode()
    monkeypatch.setattr(alpaca_eval, "ORDER_OF_INSTRUCTIONS", hashlib.sha256(order).hexdigest())
    monkeypatch.setattr(AlpacaEval, "counts", (number,))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache(tmp_path / "hub", number)))
    begun, model = len(judge.asked), ("stub", "--as", "gemma-2-9b-it-SimPO", "--url", judge.url)
    options = ("--questions", questions, "--out", out, "--judge-url", judge.url)
    assert run("alpaca-eval", "reproduce", *model, *options) == 7
    asked = [request for request in judge.asked[begun:] if request["model"] == "stub"]
    assert len(asked) == number and {(one["temperature"], one["max_tokens"]) for one in asked} == {(0.0, 4096)}
    said = capsys.readouterr()
    assert "greedily, at most 4,096 tokens: its YAML's do_sample meant a beam search of one beam" in said.out
    win_rate = json.loads((out / "score-gpt-4-1106-preview.json").read_text())["metrics"]["win rate"]["value"]
    assert f"published 65.9, here {win_rate:.1f}, {win_rate - 65.9:+.1f} points: win rate" in said.out
    assert "the set-up differs" in said.err and "not comparable" not in said.out


def test_alpaca_eval_refuses_a_judge_without_logprobs(tmp_path, capsys):
    out, questions = tmp_path / "ae", tmp_path / "reference.json"
    alpaca_reference(questions, 2)
    with stub_judge() as silent:
        silent.gives_logprobs = False
        answer(silent, "alpaca-eval", out, "--questions", questions, "--partial")
        assert run("alpaca-eval", "judge", "--out", out, "--judge", NAME, "--judge-url", silent.url) == 2
    assert "found 0 top logprobs in an answer of stub-judge, expected 5" in capsys.readouterr().err


COUNTS_WORDS = """
class Encoder:
    def encode(self, text, disallowed_special=()):
        return text.split()

def encoding_for_model(name):
    return Encoder()
"""


@pytest.mark.skipif(
    not (CHECKOUT / "show_result.py").is_file(),
    reason="SIMPO_ARENA_HARD names no checkout of https://github.com/lmarena/arena-hard-auto at 196f6b8",
)
def test_arena_hard(judge, tmp_path, monkeypatch, capsys):
    questions, number = tmp_path / "question.jsonl", 30
    rows = read_lines(CHECKOUT / "data/arena-hard-v0.1/question.jsonl")[:number]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--questions", questions, "--checkout", CHECKOUT, "--partial")
    markdown = [f"# Head\n- item\n**bold** {'word ' * (37 * n % 400)}" for n in range(number)]
    # Without the tokenizer of gpt-4o, which tiktoken fetches: a stand-in that counts words.
    (tmp_path / "standin").mkdir()
    (tmp_path / "standin" / "tiktoken.py").write_text(COUNTS_WORDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "standin"))

    baseline = {
        row["uid"]: row["messages"][-1]["content"]["answer"]
        for row in read_lines(CHECKOUT / "data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl")
    }
    scores = {}
    for name, answers in (("first", HOSTILE + markdown[5:]), ("second", [text + " more" * 300 for text in markdown])):
        out = tmp_path / name
        answer(judge, "arena-hard", out, *options, answers=answers)
        scores[name] = judged(judge, "arena-hard", out, "--checkout", CHECKOUT)
        battles = []
        for row in read_lines(out / "model_answer" / "ours.jsonl"):
            own = len(row["messages"][-1]["content"]["answer"])
            for sides in ((len(baseline[row["uid"]]), own), (own, len(baseline[row["uid"]]))):
                verdict = label(*sides)
                won = 0.5 if "=" in verdict else float((verdict[0] == "A") == (sides[0] == own and sides[1] != own))
                battles += [won] * (3 if ">>" in verdict else 1)
        metrics = scores[name]["metrics"]
        assert metrics["win rate"]["value"] == pytest.approx(100 * fmean(battles), abs=1e-9)
        assert metrics["win rate"]["low"] <= metrics["win rate"]["value"] + 0.1
        assert metrics["win rate"]["value"] - 0.1 <= metrics["win rate"]["high"]
        assert set(metrics) == {"win rate", "style-controlled win rate"} and scores[name]["notes"] == []
        # Seeded: the intervals of a second call are those of the first.
        assert run("arena-hard", "score", "--out", out, "--checkout", CHECKOUT) == 0
        assert json.loads((out / f"score-{NAME}.json").read_text()) == scores[name]

    against = ("--checkout", CHECKOUT, "--against")
    assert run("arena-hard", "score", "--out", tmp_path / "second", *against, tmp_path / "first") == 0
    capsys.readouterr()
    assert run("arena-hard", "score", "--out", tmp_path / "first", *against, tmp_path / "second") == 7
    assert re.search(r"^CLOSED simpo_megatron: against: found ours -\d+\.\d points", capsys.readouterr().err)

    # A verdict that never came is asked for again, where the official code would keep it missing.
    path = tmp_path / f"first/data/arena-hard-v0.1/model_judgment/{NAME}/ours.jsonl"
    judgments = read_lines(path)
    judgments[3]["games"][1] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in judgments))
    begun = len(judge.asked)
    assert judged(judge, "arena-hard", tmp_path / "first", "--checkout", CHECKOUT) == scores["first"]
    assert len(judge.asked) - begun == 1 + 2
    judgments = read_lines(path)
    judgments[0]["games"][0]["score"] = "A>=B"
    path.write_text("".join(json.dumps(row) + "\n" for row in judgments))
    assert run("arena-hard", "score", "--out", tmp_path / "first", "--checkout", CHECKOUT) == 3
    assert "found the verdict 'A>=B' on" in capsys.readouterr().err


@pytest.mark.skipif(not (CHECKOUT / "show_result.py").is_file(), reason="SIMPO_ARENA_HARD names no checkout")
def test_arena_hard_of_version_2_scores_each_category_against_its_own_baseline(judge, tmp_path, monkeypatch):
    """The baselines' answers are made up: those of the benchmark lie outside its repository."""
    checkout, version = tmp_path / "checkout", "arena-hard-v2.0"
    shutil.copytree(CHECKOUT, checkout, ignore=shutil.ignore_patterns("arena-hard-v0.1", ".git"))
    questions = read_lines(checkout / f"data/{version}/question.jsonl")
    categories = {"hard_prompt": "o3-mini-2025-01-31", "creative_writing": "gemini-2.0-flash-001"}
    asked, lengths = [], {}
    for name, baseline in categories.items():
        rows = [row for row in questions if row["category"] == name][:12]
        # Of one category the baseline is mostly longer than the model's answers, of the other mostly shorter.
        most = 170 if name == "hard_prompt" else 20
        texts = ["**bold** " * (n % 3) + "word " * (most + 7 * n) for n in range(len(rows))]
        messages = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        for turns, text in zip(messages, texts, strict=True):
            turns.append({"role": "assistant", "content": {"answer": text}})
        answers = checkout / f"data/{version}/model_answer/{baseline}.jsonl"
        answers.parent.mkdir(exist_ok=True)
        answers.write_text(
            "".join(
                json.dumps({"uid": row["uid"], "ans_id": row["uid"][:9], "model": baseline, "messages": turns}) + "\n"
                for row, turns in zip(rows, messages, strict=True)
            )
        )
        lengths |= {row["uid"]: len(text) for row, text in zip(rows, texts, strict=True)}
        asked += rows
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "standin").mkdir()
    (tmp_path / "standin" / "tiktoken.py").write_text(COUNTS_WORDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "standin"))

    options = ("--questions", tmp_path / "question.jsonl", "--checkout", checkout, "--partial")
    own = ["# Head\n" * (n % 2) + "- item\n" * (n % 5) + "text " * (60 + 31 * n % 170) for n in range(len(asked))]
    answer(judge, "arena-hard", tmp_path / "out", *options, answers=own)
    score = judged(judge, "arena-hard", tmp_path / "out", "--checkout", checkout)
    own_lengths = {
        row["uid"]: len(row["messages"][-1]["content"]["answer"])
        for row in read_lines(tmp_path / "out/model_answer/ours.jsonl")
    }
    metrics = {name: metric["value"] for name, metric in score["metrics"].items()}
    for name in categories:
        battles = []
        for uid in (row["uid"] for row in asked if row["category"] == name):
            verdict = label(own_lengths[uid], lengths[uid])
            won = 0.5 if "=" in verdict else float(verdict[0] == "A")
            battles += [won] * (6 if ">>" in verdict else 2)
        assert metrics[f"win rate, {name}"] == pytest.approx(100 * fmean(battles), abs=1e-9)
    assert metrics["win rate, hard_prompt"] < 40 < 60 < metrics["win rate, creative_writing"]
    assert {f"style-controlled win rate, {name}" for name in categories} < set(metrics) and score["notes"] == []
    assert score["not_comparable"][0] == f"the judge is {NAME}, theirs is gpt-4.1 or gemini-2.5"


@pytest.mark.skipif(not (CHECKOUT / "show_result.py").is_file(), reason="SIMPO_ARENA_HARD names no checkout")
def test_the_official_loaders_read_our_files(judge, tmp_path):
    """Hostile answers too: each loader finds what was answered."""
    answer(judge, "mt-bench", tmp_path / "mt")
    rows = read_lines(CHECKOUT / "data/arena-hard-v0.1/question.jsonl")[:6]
    questions = tmp_path / "question.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--questions", questions, "--checkout", CHECKOUT, "--partial")
    answer(judge, "arena-hard", tmp_path / "ah", *options)
    alpaca_reference(tmp_path / "reference.json", 6)
    answer(judge, "alpaca-eval", tmp_path / "ae", "--questions", tmp_path / "reference.json", "--partial")
    script = """
import json, sys
from importlib.util import find_spec
mt, arena, alpaca, checkout = sys.argv[1:]
sys.path[:0] = [checkout, find_spec("mtbench_evaluator").submodule_search_locations[0] + "/fastchat"]
from fastchat.llm_judge import common
from utils.completion import load_model_answers
from alpaca_eval.utils import load_or_convert_to_dataframe
of_mt = [row["choices"][0]["turns"] for row in common.load_model_answers(mt)["ours"].values()]
of_arena = [row["messages"][-1]["content"]["answer"] for row in load_model_answers(arena)["ours"].values()]
of_alpaca = list(load_or_convert_to_dataframe(alpaca)["output"])
print(json.dumps([of_mt, of_arena, of_alpaca]))
"""
    done = subprocess.run(
        [PYTHON, "-c", script, *(tmp_path / one for one in ("mt/responses", "ah/model_answer")),
         tmp_path / "ae/model_outputs.json", CHECKOUT],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    of_mt, of_arena, of_alpaca = json.loads(done.stdout.splitlines()[-1])
    read = [*HOSTILE[:3], "\ufffd lone \ufffd, a pair \U0001f600", HOSTILE[4]]
    assert of_mt[:5] == [[text, text] for text in read] and len(of_mt) == 80
    assert of_arena[:5] == read and of_alpaca[:5] == read and len(of_arena) == len(of_alpaca) == 6
