"""A server is asked as was meant; scores are those of the model, the judge or the file; pairs are best and worst."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from questions import QUESTION, written
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from simpo_megatron.commands import generate, pairs
from simpo_megatron.demo import prepare_demo
from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.generation.lines import read_lines
from simpo_megatron.generation.pairing import Pairing, pair_up
from simpo_megatron.generation.scoring import Judge, RewardModel, ScoresOfFile
from simpo_megatron.generation.server import ChatServer, Reply


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return prepare_demo(tmp_path_factory.mktemp("generation")).model_dir


@pytest.fixture(scope="module")
def reward_model(model, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("reward_model"), AutoTokenizer.from_pretrained(model)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Stub(BaseHTTPRequestHandler):
    """A server that repeats what it was asked, after refusing the first request as one that is overloaded does."""

    asked: list[dict] = []

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request)
        status, said = 200, f"STUB {request['messages'][-1]['content'][-20:]} [[1]] then [[7.5]]"
        if len(self.asked) == 1:
            status = 503
        if request["model"] == "nobody":
            status = 404
        usage = {"completion_tokens": 5}
        choice = {"message": {"content": said}, "finish_reason": "length"}
        body = json.dumps({"choices": [choice], "usage": usage}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("simpo_megatron.generation.server._FIRST_PAUSE_SECONDS", 0.01)
    Stub.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as stub:
        thread = threading.Thread(target=stub.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{stub.server_port}/v1"
        stub.shutdown()
        thread.join()


def test_a_server_answers_with_settings_as_given_and_is_asked_again(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("simpo_megatron.generation.item_progress._SECONDS_BETWEEN_LINES", 0.0)
    prompts = written(tmp_path / "prompts.jsonl", *({"id": n, "prompt": f"question {n}"} for n in range(5)))
    options = ["--model", "served", "--url", server, "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert generate.main([*options, "--temperature", "0.3", "--max-new-tokens", "9", "--at-once", "3"]) == 0
    rows = read_lines(tmp_path / "out" / "answers.jsonl")
    assert {row["id"]: row["answers"] for row in rows}["4"] == ["STUB question 4 [[1]] then [[7.5]]"]
    assert all(row["is_cut"] and row["num_tokens"] == 5 for row in rows) and len(Stub.asked) == 6
    assert {(one["model"], one["temperature"], one["max_tokens"]) for one in Stub.asked} == {("served", 0.3, 9)}
    assert {one["seed"] for one in Stub.asked} == {row["seed"] for row in rows}
    said = capsys.readouterr()
    assert said.err.count(f"WARNING simpo_megatron: {server}: found 503") == 1, said.err
    assert said.out.count(" of 5 answers in 0:0") == 5 and "answers   1 of 5 answers" in said.out
    assert generate.main(["--model", "nobody", *options[2:-1], str(tmp_path / "other")]) == 2


def test_scores_come_from_a_reward_model_a_judge_or_a_file(reward_model, server, tmp_path, monkeypatch):
    messages = [*QUESTION, {"role": "assistant", "content": "In water, for eight minutes."}]
    row = {"id": "a", "sample": 0, "messages": messages}
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    plain = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    text = "<|begin|><|user|>How do I boil an egg?<|end|><|assistant|>In water, for eight minutes.<|end|>"
    with torch.no_grad():
        expected = float(plain(tokenizer(text, return_tensors="pt")["input_ids"]).logits)
    assert RewardModel(reward_model).score(row) == expected
    judge = Judge(ChatServer(server, "judge"))
    assert judge.score(row) == 7.5, "the last rating counts"
    for said in ("nan", "11", "0", "-3"):
        monkeypatch.setattr(
            "simpo_megatron.generation.server.ChatServer.chat", lambda *_, s=said, **__: Reply(f"[[{s}]]", 1, None)
        )
        assert judge.score(row) is None
    # Sixteen such replies and no rating: the rest would be asked, and paid, for nothing.
    unread = Judge(ChatServer(server, "judge"))
    for _ in range(15):
        assert unread.score(row) is None
    with pytest.raises(DataError, match=r"found no rating in 16 replies of judge, the last '\[\[-3\]\]'"):
        unread.score(row)
    assert [judge.score(row) for _ in range(20)] == [None] * 20, "it has rated one"
    monkeypatch.undo()
    assert "[assistant]\nIn water, for eight minutes." in Stub.asked[-1]["messages"][1]["content"]
    scores = ScoresOfFile(written(tmp_path / "s.jsonl", {"id": "a", "sample": 0, "score": -2}))
    assert scores.score(row) == -2.0
    with pytest.raises(DataError, match="found no score of id 'a', sample 1"):
        scores.score({**row, "sample": 1})
    with pytest.raises(ConfigError, match="expected http://"):
        ChatServer("ftp://host", "judge")


def answer(identity, sample, text, is_cut=False):
    messages = [*QUESTION, {"role": "assistant", "content": text}]
    return {"id": identity, "sample": sample, "messages": messages, "answers": [text], "is_cut": is_cut}


def test_the_best_is_set_against_the_worst_and_what_is_no_pair_is_counted():
    rows = [
        *(answer("plain", n, text) for n, text in enumerate(["a", "b", "c", "b"])),
        *(answer("same", n, "x") for n in range(3)),
        *(answer("tie", n, text) for n, text in enumerate("ab")),
        *(answer("near", n, text) for n, text in enumerate("ab")),
        answer("cut", 0, "a"),
        answer("cut", 1, "b", is_cut=True),
        answer("empty", 0, ""),
        answer("empty", 1, "b"),
    ]
    scores = {(row["id"], row["sample"]): 1.0 for row in rows}
    scores |= {("plain", 0): 3.0, ("plain", 1): 5.0, ("plain", 2): -1.0, ("plain", 3): 9.0, ("near", 0): 1.05}
    found, became = pair_up(rows, scores, Pairing(min_score_gap=0.1))
    (pair,) = found
    assert (pair["chosen_sample"], pair["rejected_sample"], pair["num_answers"]) == (1, 2, 4), "b has its first score"
    assert (pair["chosen_score"], pair["rejected_score"]) == (5.0, -1.0)
    assert pair["prompt"] == [*QUESTION] and pair["chosen"] == [{"role": "assistant", "content": "b"}]
    assert became == {"paired": 1, "without two answers that end and differ": 3, "with scores too near": 2}
    everything, _ = pair_up(rows, {**scores, ("cut", 1): 2.0}, Pairing(keeps_cut=True))
    assert {pair["id"] for pair in everything} == {"plain", "near", "cut"}


def test_scoring_goes_on_where_it_was_stopped_and_mixes_no_scorers(reward_model, tmp_path, capsys):
    answers, out = tmp_path / "answers", tmp_path / "pairs"
    answers.mkdir()
    written(answers / "answers.jsonl", *(answer(f"{n}", s, f"answer {s}") for n in range(3) for s in range(2)))
    options = ["--answers", str(answers), "--out", str(out)]
    assert pairs.main([*options, "--reward-model", str(reward_model)]) == 0
    whole = (out / "pairs.jsonl").read_text()
    scores = (out / "scores.jsonl").read_text().splitlines(keepends=True)
    (out / "scores.jsonl").write_text("".join(scores[:4]) + scores[4][:9])
    (out / "pairs.jsonl").unlink()
    assert pairs.main([*options, "--reward-model", str(reward_model)]) == 0
    assert "4 of 6 scores are there already" in capsys.readouterr().out
    assert (out / "pairs.jsonl").read_text() == whole and whole.count("\n") == 3
    numbers = [(str(n), sample) for n in range(3) for sample in range(2)]
    by_file = written(tmp_path / "s.jsonl", *({"id": n, "sample": sample, "score": sample} for n, sample in numbers))
    assert pairs.main([*options, "--scores", str(by_file)]) == 2
    assert "begun with other settings" in capsys.readouterr().err
    written(answers / "answers.jsonl", {**answer("a", 0, "x"), "answers": ["x", "y"]})
    assert pairs.main([*options, "--reward-model", str(reward_model)]) == 3
    assert "a: found answers to several turns" in capsys.readouterr().err


def test_scores_of_a_file_are_those_in_it_now_and_all_there_before_the_first_is_used(tmp_path, capsys):
    answers = tmp_path / "answers"
    answers.mkdir()
    written(answers / "answers.jsonl", *(answer("a", sample, f"answer {sample}") for sample in range(2)))

    def made(out, *scores):
        by_file = written(tmp_path / "s.jsonl", *({"id": "a", "sample": n, "score": s} for n, s in enumerate(scores)))
        return pairs.main(["--answers", str(answers), "--out", str(tmp_path / out), "--scores", str(by_file)])

    assert made("out", 1) == 3 and made("out", 1, float("nan")) == 3 and not (tmp_path / "out").exists()
    assert "found no score of id 'a', sample 1" in (error := capsys.readouterr().err) and "found nan of id 'a'" in error
    assert made("out", 1, 10**400) == 3 and "found 1000" in capsys.readouterr().err
    assert made("out", 1, 2) == made("out", 1, 2) == 0
    assert made("out", 2, 1) == 2 and "begun with other settings (scores " in capsys.readouterr().err
    assert made("tied", 1, 1) == 3
    assert "found no pair among 1 prompts (1 with scores too near), expected some" in capsys.readouterr().err


def test_answers_that_get_no_score_are_in_no_pair(tmp_path, monkeypatch, capsys):
    """A judge who names no rating, and half of a surrogate pair, which is not asked for."""
    answers, texts = tmp_path / "answers", ["one", "two", "none", "half \ud83d"]
    answers.mkdir()
    written(answers / "answers.jsonl", *(answer("a", sample, text) for sample, text in enumerate(texts)))
    ratings = {"one": "[[3]]", "two": "[[9.5]]", "none": "I cannot rate this."}
    monkeypatch.setattr(
        ChatServer, "chat", lambda _, asked, **__: Reply(ratings[asked[1]["content"].split()[-1]], 1, None)
    )
    options = ["--answers", str(answers), "--judge-url", "http://127.0.0.1:9/v1", "--judge", "stub"]
    for _ in range(2):
        assert pairs.main([*options, "--out", str(tmp_path / "out")]) == 0
        assert "1 of 3 answers got none and are left out" in capsys.readouterr().out
    (pair,) = read_lines(tmp_path / "out" / "pairs.jsonl")
    assert (pair["chosen_score"], pair["rejected_score"], pair["num_answers"]) == (9.5, 3.0, 4)


def test_a_server_that_does_not_answer_in_time_is_asked_once(monkeypatch):
    monkeypatch.setattr("simpo_megatron.generation.server._TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = ChatServer(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "m")
        with pytest.raises(DataError, match="found no answer in 0 s, expected one; look at the server"):
            server.chat(QUESTION, max_tokens=1, temperature=0.0, seed=0)
