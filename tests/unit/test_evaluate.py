"""Benchmarks are answered under their own settings, and the files are those that the official scorers read."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from stub_judge import stub_judge

from simpo_megatron.commands import evaluate
from simpo_megatron.demo import prepare_demo
from simpo_megatron.errors import ConfigError, DataError, GateClosed
from simpo_megatron.evaluation import judge_watch, judging, reproduction
from simpo_megatron.evaluation.arena_hard import checked_checkout
from simpo_megatron.evaluation.benchmarks import encodable
from simpo_megatron.evaluation.gate import paired_difference
from simpo_megatron.generation import item_progress
from simpo_megatron.generation.engines import Engine
from simpo_megatron.generation.lines import read_lines
from simpo_megatron.generation.server import ChatServer

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
    return evaluate.main([benchmark, "generate", *asked, "--max-new-tokens", "5", *options])


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
    assert "WARNING   2 questions are a part of mt-bench" in told


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
        ("arena-hard", ARENA, ["--partial", "--name", "gpt-4-0314"], "expected another than the baseline's"),
    ],
)
def test_questions_of_another_benchmark_or_a_part_of_it_are_refused(
    benchmark, rows, options, said, model, tmp_path, capsys
):
    assert run(benchmark, rows, model, tmp_path, *options) in (2, 3)
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_lone_surrogates_are_replaced_and_pairs_joined():
    assert encodable("a \ud83d b \ude00 c") == "a \ufffd b \ufffd c"
    assert encodable("\ud83d\ude00 [[ \x00") == "\U0001f600 [[ \x00" and encodable("") == ""


def battles(*scores):
    return [{"uid": str(number), "scores": list(one)} for number, one in enumerate(scores)]


def test_the_gate_s_difference_is_that_of_the_win_rates_and_pairs_the_questions():
    ours, others = battles([1, 1], [0, 0.5], [1, 1, 1, 0]), battles([1, 1], [0, 0], [0, 1])
    found = paired_difference(ours, others)
    assert found.value == pytest.approx(100 * (5.5 / 8 - 3 / 6), abs=1e-9) and found.num_questions == 3
    assert found == paired_difference(ours[::-1], others) and found.low <= found.value <= found.high
    # Hard and easy questions alike for both: the spread among questions is none of the difference's.
    hard = battles(*([float(number % 2)] * 2 for number in range(400)))
    easier = battles(*([float(number % 2 or number % 20 == 0)] * 2 for number in range(400)))
    worse = paired_difference(hard, easier)
    assert worse.value == pytest.approx(-5.0) and -8 < worse.low < -5 < worse.high < -2.5
    assert worse.is_worse(0) and not worse.is_worse(5) and not paired_difference(easier, hard).is_worse(0)
    assert paired_difference(hard, hard).value == paired_difference(hard, hard).high == 0
    with pytest.raises(DataError, match="found 0 questions judged in both"):
        paired_difference(hard, [{"uid": "x", "scores": [1.0]}])


@pytest.mark.parametrize("seed", range(3))
def test_the_gate_stays_open_to_equals(seed):
    """Two models of the same strength: 2.5 % of all such pairs look worse by chance, and no more."""
    import numpy as np

    rng, closed = np.random.default_rng(seed), 0
    for _ in range(40):
        skill = rng.uniform(0.1, 0.9, 100)
        ours, others = (battles(*(rng.random((100, 2)) < skill[:, None]).astype(float)) for _ in range(2))
        closed += paired_difference(ours, others).is_worse(0)
    assert closed <= 5, "more than 5 of 40 at 2.5 % happen once in 2,000 times"


class NamedStops(Engine):
    """An engine that only says what it is."""

    def __init__(self, stops, shows="<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"):
        self.stops, self.shows = stops, shows

    def identity(self):
        return {} if self.stops is None else {"stop_ids": self.stops}

    def rendered(self, messages):
        return self.shows.format(messages[-1]["content"])

    def complete(self, messages, **_):
        raise NotImplementedError


def test_a_published_run_is_repeated_as_it_really_was():
    run = reproduction.published_run("alpaca-eval", "gemma-2-9b-it-SimPO")
    assert reproduction.published_decoding(run, 1).temperature == 0 and "beam" in run.why
    sampled = reproduction.published_run("alpaca-eval", "Mistral-7B-Instruct-SimPO")
    assert reproduction.published_decoding(sampled, 1).temperature == 0.5
    assert list(reproduction.check_engine(NamedStops([1, 107, 5]), run, "Hello?")) == []
    (told,) = reproduction.check_engine(NamedStops([1, 107], "{}"), run, "Hello?")
    assert "is shown 'Hello?'" in told
    (told,) = reproduction.check_engine(NamedStops(None), run, "Hello?")
    assert "cannot be checked from here" in told
    with pytest.raises(ConfigError, match="found the stop ids \\[1\\], expected 107 too"):
        list(reproduction.check_engine(NamedStops([1]), run, "Hello?"))
    with pytest.raises(ConfigError, match="as: found 'mine', expected one whose settings are published: Llama-3-Base"):
        reproduction.published_run("arena-hard", "mine")


def score_of(length_controlled, win_rate, *reasons, **other):
    metrics = {"length-controlled win rate": {"value": length_controlled}, "win rate": {"value": win_rate}}
    return {"metrics": metrics, "not_comparable": list(reasons), "notes": [], **other}


def test_a_reproduction_says_whether_the_set_up_differs():
    run = reproduction.published_run("alpaca-eval", "Llama-3-Instruct-8B-SimPO")
    *lines, verdict = reproduction.compare_with_published("it", run, score_of(43.9, 42.1))
    assert lines[0] == "published 44.7, here 43.9, -0.8 points: length-controlled win rate" and len(lines) == 2
    assert "can be trusted" in verdict
    with pytest.raises(
        GateClosed, match="found it -9.9 points from its published score, expected at most 3; the set-up differs"
    ):
        list(reproduction.compare_with_published("it", run, score_of(34.8, 40.0)))
    with pytest.raises(ConfigError, match="found no score to compare \\(the judge is stub"):
        list(reproduction.compare_with_published("it", run, score_of(44.7, 40.5, "the judge is stub")))
    without = score_of(44.7, 40.5, notes=["found 40 rows"])
    del without["metrics"]["length-controlled win rate"]
    with pytest.raises(ConfigError, match="found no length-controlled win rate \\(found 40 rows\\)"):
        list(reproduction.compare_with_published("it", run, without))


def test_what_is_missing_is_one_sentence_with_its_source_and_licence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIMPO_EVAL_PYTHON", str(tmp_path / "none"))
    options = ["--model", "m", "--url", "http://127.0.0.1:1/v1", "--name", "n", "--out", str(tmp_path / "out")]
    for benchmark, said in (
        ("mt-bench", "run make eval-env, or name one by SIMPO_EVAL_PYTHON"),
        ("arena-hard", "question.jsonl of arena-hard-auto (Apache-2.0)"),
        ("alpaca-eval", "the following arguments are required: --questions"),
    ):
        try:
            code = evaluate.main([benchmark, "generate", *options])
        except SystemExit as stopped:
            code = stopped.code
        error = capsys.readouterr().err
        assert code == 2 and said in error and error.count("\n") == 1
    (tmp_path / "show_result.py").write_text("")
    with pytest.raises(ConfigError, match="found no gen_judgment.py in .* at 196f6b8 \\(Apache-2.0\\); name it by"):
        checked_checkout(tmp_path)
    (tmp_path / "gen_judgment.py").write_text("another version")
    with pytest.raises(ConfigError, match="found another gen_judgment.py"):
        checked_checkout(tmp_path)
    assert evaluate.main(["mt-bench", "score", "--out", str(tmp_path)]) == 2
    assert "make it with simpo evaluate mt-bench generate --out" in capsys.readouterr().err


def test_nemo_evaluator_gets_the_same_task(model, tmp_path, capsys):
    asked = ["--name", "mine", "--out", str(tmp_path), "--emit", "nemo-evaluator"]
    assert evaluate.main(["mt-bench", "generate", "--model", model, *asked]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["defaults"] == [{"execution": "local"}, {"deployment": "vllm"}, "_self_"]
    assert config["deployment"]["checkpoint_path"] == model and config["evaluation"] == {"tasks": [{"name": "mtbench"}]}
    served = ["--model", "served", "--url", "http://host:1/v1", "--questions", "none.json"]
    assert evaluate.main(["arena-hard", "generate", *served, *asked]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["target"]["api_endpoint"]["url"] == "http://host:1/v1/chat/completions"
    assert config["evaluation"]["tasks"] == [{"name": "ns_arena_hard_v2"}]
    assert evaluate.main(["alpaca-eval", "generate", *served, *asked]) == 2
    assert "which it has tasks for" in capsys.readouterr().err


def write_score(folder, benchmark, model, value, characters, **other):
    folder.mkdir(parents=True, exist_ok=True)
    score = {
        "benchmark": benchmark,
        "model": model,
        "judge": "stub",
        "package": "made up",
        "metrics": {"win rate": {"value": value, "error": 1.25}, "category math": {"value": 1.0}},
        "num_questions": 805,
        "num_missing": 0,
        "answers": {"mean_characters": characters, "mean_tokens": 400.0, "cut": 0.01, "repetition": 0.02},
        "baseline_characters": 2049.0,
        "not_comparable": ["the judge is stub"],
        "notes": [],
    }
    (folder / "score-stub.json").write_text(json.dumps({**score, **other}))
    return folder


def test_a_leaderboard_ranks_within_one_benchmark_and_judge(tmp_path, capsys):
    folders = [
        write_score(tmp_path / "a", "alpaca-eval", "short", 40.0, 1825.0),
        write_score(tmp_path / "b", "alpaca-eval", "<long>", 52.5, 12_345.0),
        write_score(tmp_path / "c", "arena-hard", "short", 30.0, 1800.0),
    ]
    page = tmp_path / "page.html"
    assert evaluate.main(["leaderboard", *map(str, folders), "--page", str(page)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "alpaca-eval, judged by stub" and "<long>" in told[1] and "52.50 +- 1.25" in told[1]
    assert "12,345 characters" in told[1] and "short" in told[2] and told[3] == "arena-hard, judged by stub"
    text = page.read_text()
    assert text.index("&lt;long&gt;") < text.index("<td>short</td>") and "category math" not in text
    assert text.count('<table class="sortable">') == 2 and "short: the judge is stub" in text
    assert evaluate.main(["leaderboard", str(tmp_path), "--page", str(page)]) == 2
    assert "found no score" in capsys.readouterr().err


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# The command `simpo evaluate`, whose work is a scorer that starts a process of its own and waits.
WAITS = """
import sys, time
from pathlib import Path
from simpo_megatron import cli
from simpo_megatron.evaluation.official import OfficialEnvironment

scorer = '''
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
'''
cli.main = lambda *_: OfficialEnvironment(Path(sys.executable)).run("judging", ["-c", scorer], log=Path(sys.argv[1]))
cli.run(["evaluate"])
"""


@pytest.mark.processes
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_official_scorer_and_what_it_started_end_with_the_command(tmp_path, number, code):
    log = tmp_path / "log"
    command = subprocess.Popen([sys.executable, "-c", WAITS, str(log)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (log.exists() and log.read_text().endswith("\n")):
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    command.send_signal(number)
    said = command.communicate(timeout=120)[1]
    assert command.returncode == code
    assert number == signal.SIGKILL or "the same command starts or continues it" in said
    for pid in map(int, log.read_text().split()):
        while is_running(pid):
            assert time.monotonic() < deadline, f"process {pid} runs on"
            time.sleep(0.05)


def test_a_score_that_is_no_number_is_none():
    nan, metrics = float("nan"), {"score of 10": {"value": 5.0, "error": 0.1}, "category math": {"value": float("nan")}}
    scored = judging._finite(judging.Scored(metrics, 3, notes=("a note",)), "j")
    assert list(scored.metrics) == ["score of 10"] and scored.num_missing == 3
    assert scored.notes == ("a note", "no verdict could be read of: category math")
    for metric in ({"value": nan}, {"value": 5.0, "low": nan, "high": 6.0}, {"value": float("inf")}):
        with pytest.raises(DataError, match="found no score, for 160 verdicts of j could not be read"):
            judging._finite(judging.Scored({"score of 10": metric}, 160), "j")


class EndlessScorer:
    """Asks for ever, as an official scorer does that tries a dead server again; one of four verdicts has come."""

    is_closed = False

    def judge(self, judge):
        try:
            while True:
                yield
        finally:
            self.is_closed = True

    def num_left(self, judge):
        return 3


def failing():
    """An official scorer that ends with an error."""
    raise DataError("gen_judgment: found exit code 1")
    yield


def test_a_judge_that_stays_away_is_told_and_ends_the_scorer(monkeypatch):
    for module, name in (
        (judge_watch, "_SECONDS_BETWEEN_LOOKS"),
        (judge_watch, "_MAX_SECONDS_AWAY"),
        (item_progress, "_SECONDS_BETWEEN_LINES"),
    ):
        monkeypatch.setattr(module, name, 0.0)
    scorer, url, told = EndlessScorer(), "http://127.0.0.1:1/v1", []
    with pytest.raises(DataError, match=f"judge: found no answer of {url} .* run the same command again"):
        told.extend(judging._asking(scorer, judging.JudgeServer("j", url), 4))
    assert scorer.is_closed

    scorer.judge = lambda _: failing()
    with pytest.raises(DataError, match=f"judge: found no answer of {url} "):
        list(judging._asking(scorer, judging.JudgeServer("j", url), 4))
    monkeypatch.setattr(ChatServer, "failure", lambda _: None)
    with pytest.raises(DataError, match="gen_judgment: found exit code 1"):
        list(judging._asking(scorer, judging.JudgeServer("j", url), 4))

    looks = iter(["refused", None, None, None])
    monkeypatch.setattr(ChatServer, "failure", lambda _: next(looks))
    asking = judging._asking(EndlessScorer(), judging.JudgeServer("j", url), 4)
    told = [next(asking) for _ in range(4)]
    assert told[0] == f"WARNING   {url} does not answer (refused); judging ends after 0 s of this"
    assert told[1] == f"judge     {url} answers again"
    assert told[2].startswith("judging   1 of 4 verdicts in 0:00:00, about 0:00:0") and told[3][:9] == "judging  "


def test_a_server_answers_even_if_it_is_busy_or_knows_no_models(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("simpo_megatron.generation.server._LOOK_SECONDS", 0.5)
    with stub_judge() as stub:
        assert ChatServer(stub.url, "j").failure() is None, "a stub without GET"
    assert "refused" in str(ChatServer(stub.url, "j").failure())
    # It takes the connection and answers nothing.
    with socket.create_server(("127.0.0.1", 0)) as busy:
        assert ChatServer(f"http://127.0.0.1:{busy.getsockname()[1]}/v1", "j").failure() is None
