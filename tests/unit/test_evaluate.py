"""Benchmarks are answered under their own settings, and the files are those that the official scorers read."""

from __future__ import annotations

import json

import pytest

from simpo_megatron.commands import evaluate
from simpo_megatron.demo import prepare_demo
from simpo_megatron.generation.lines import read_lines

MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Make it rhyme."]},
    {"question_id": 111, "category": "math", "turns": ["What is 2 + 2?", "Twice that?"], "reference": ["4", "8"]},
]
ARENA = [{"uid": f"{n:032x}", "category": "hard_prompt", "prompt": f"Question {n}?"} for n in range(2)]
ALPACA = [
    {"dataset": "made_up", "instruction": f"Name {what}.", "output": "No.", "generator": "baseline"}
    for what in ("a colour", "a bird", "a tree")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(prepare_demo(tmp_path_factory.mktemp("evaluate")).model_dir)


def run(benchmark, rows, model, folder, *options):
    questions = folder / "questions.json"
    questions.write_text(json.dumps(rows))
    asked = ["--questions", str(questions), "--model", model, "--name", "ours", "--out", str(folder / "out")]
    return evaluate.main([benchmark, *asked, "--max-new-tokens", "5", *options])


def test_mt_bench_takes_its_temperatures_and_both_turns(model, tmp_path, capsys):
    assert run("mt-bench", MT_BENCH, model, tmp_path, "--partial") == 0
    answers = read_lines(tmp_path / "out" / "answers.jsonl")
    assert [row["temperature"] for row in answers] == [0.7, 0.0]
    rows = read_lines(tmp_path / "out" / "responses" / "ours.jsonl")
    assert rows[1] == {
        "question_id": 111,
        "answer_id": "ours-111",
        "model_id": "ours",
        "choices": [{"index": 0, "turns": answers[1]["answers"]}],
        "tstamp": 0.0,
    }
    assert len(answers[1]["answers"]) == 2 and answers[1]["messages"][2]["content"] == "Twice that?"
    told = capsys.readouterr().out
    assert "WARNING   2 questions are not mt-bench" in told and f"--output_path {tmp_path / 'out'}" in told


def test_arena_hard_and_alpaca_eval_keep_the_order_and_the_words_of_their_questions(model, tmp_path):
    for name in ("arena", "alpaca"):
        (tmp_path / name).mkdir()
    assert run("arena-hard", ARENA, model, tmp_path / "arena", "--partial") == 0
    rows = read_lines(tmp_path / "arena" / "out" / "model_answer" / "ours.jsonl")
    assert [row["uid"] for row in rows] == [question["uid"] for question in ARENA]
    assert rows[0]["messages"][0] == {"role": "user", "content": "Question 0?"} and rows[0]["model"] == "ours"
    assert set(rows[0]["messages"][1]["content"]) == {"answer"}

    assert run("alpaca-eval", ALPACA, model, tmp_path / "alpaca", "--partial") == 0
    # Lines in another order, as a server's answers come: the file still has the reference's.
    answers = tmp_path / "alpaca" / "out" / "answers.jsonl"
    answers.write_text("".join(reversed(answers.read_text().splitlines(keepends=True))))
    assert run("alpaca-eval", ALPACA, model, tmp_path / "alpaca", "--partial") == 0
    outputs = json.loads((tmp_path / "alpaca" / "out" / "model_outputs.json").read_text())
    assert [row["instruction"] for row in outputs] == [question["instruction"] for question in ALPACA]
    by_id = {row["id"]: row["answers"][0] for row in read_lines(answers)}
    assert [row["output"] for row in outputs] == [by_id[str(n)] for n in (1, 2, 3)]
    assert {(row["dataset"], row["generator"]) for row in outputs} == {("made_up", "ours")}
    assert len({row["output"] for row in outputs}) > 1


@pytest.mark.parametrize(
    ("benchmark", "rows", "options", "said"),
    [
        ("mt-bench", MT_BENCH, [], "found 2 questions, expected the 80 of mt-bench"),
        ("alpaca-eval", ALPACA, [], "expected the 805 of alpaca-eval"),
        ("arena-hard", ARENA, [], "expected the 500 or 750 of arena-hard"),
        ("mt-bench", ALPACA, ["--partial"], "questions.json:1: found no question_id with two turns"),
        ("mt-bench", [{**MT_BENCH[0], "category": "songs"}], ["--partial"], "found the category 'songs'"),
        ("arena-hard", MT_BENCH, ["--partial"], "found no uid with one prompt"),
        ("alpaca-eval", ARENA, ["--partial"], "found no instruction with its dataset"),
        ("alpaca-eval", ALPACA, ["--partial", "--name", "../x"], "name: found '../x'"),
    ],
)
def test_questions_of_another_benchmark_or_a_part_of_it_are_refused(
    benchmark, rows, options, said, model, tmp_path, capsys
):
    assert run(benchmark, rows, model, tmp_path, *options) in (2, 3)
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
