"""Answers are the model's own, reproducible, and say how they were made."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from questions import QUESTION, written
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo_megatron.commands import generate
from simpo_megatron.data.ngrams import repetition
from simpo_megatron.demo import prepare_demo
from simpo_megatron.errors import DataError
from simpo_megatron.generation.answering import Decoding, answer_prompts
from simpo_megatron.generation.engines import Completion, Engine, TransformersEngine, prompt_ids
from simpo_megatron.generation.lines import read_lines
from simpo_megatron.generation.prompts import PromptItem, read_prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return prepare_demo(tmp_path_factory.mktemp("generation")).model_dir


@pytest.fixture(scope="module")
def engine(model):
    return TransformersEngine(model)


@pytest.mark.parametrize(
    ("row", "item"),
    [
        ({"prompt": "a"}, PromptItem("1", ({"role": "user", "content": "a"},))),
        ({"id": 7, "instruction": "a", "dataset": "d"}, PromptItem("7", ({"role": "user", "content": "a"},))),
        (
            {"question_id": 81, "category": "math", "turns": ["a", "b"]},
            PromptItem("81", ({"role": "user", "content": "a"},), ("b",), "math"),
        ),
        ({"uid": "x", "messages": [*QUESTION]}, PromptItem("x", QUESTION)),
        ({"prompt": [*QUESTION], "chosen": "y", "rejected": "z"}, PromptItem("1", QUESTION)),
        ({"chosen": [*QUESTION, {"role": "assistant", "content": "b"}], "rejected": []}, PromptItem("1", QUESTION)),
    ],
)
def test_prompts_come_in_the_forms_that_benchmarks_and_pairs_have(tmp_path, row, item):
    assert read_prompts(written(tmp_path / "p.jsonl", row)) == [item]
    (tmp_path / "list.json").write_text(json.dumps([row]))
    assert read_prompts(tmp_path / "list.json") == [item]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found no row"),
        ("{", "p.jsonl:1: found no JSON"),
        ('{"prompt": "a"}\n\n{"prompt": "b\n', "p.jsonl:3: found no JSON"),
        ('{"prompt": "half \\ud83d of a pair"}\n', "p.jsonl:1: found half of a surrogate pair"),
        ('{"id": "\\udc00", "prompt": "a"}\n', "p.jsonl:1: found half of a surrogate pair"),
        ("3\n", "p.jsonl:1: found int"),
        ('{"id": 1}\n', "p.jsonl:1: found no prompt that ends with a turn of the user"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "found no prompt that ends"),
        ('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}\n', "p.jsonl:2: found the id '1' a second time"),
    ],
)
def test_prompts_that_are_none_are_named(tmp_path, text, said):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        read_prompts(tmp_path / "p.jsonl")


def test_greedy_answers_are_those_of_whole_forward_passes(engine, model):
    """Token by token without a cache, by the model itself, from the prompt that training renders."""
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    ids = tokenizer("<|begin|><|user|>How do I boil an egg?<|end|><|assistant|>")["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
    found = engine.complete(QUESTION, max_new_tokens=12, temperature=0.0, seed=0)
    assert found.text == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert (found.num_tokens, found.is_cut) == (12, True)
    assert tokenizer.eos_token_id not in ids[start:]


def test_an_answer_ends_at_any_stop_id_of_the_folder_and_its_other_settings_do_not_act(model, tmp_path):
    whole = TransformersEngine(model)
    tokens = whole._model.generate(
        torch.tensor([prompt_ids(whole._tokenizer, whole.rendered(QUESTION))]), max_new_tokens=12, do_sample=False
    )[0, -12:].tolist()
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stops = {"eos_token_id": [2, tokens[5]], "do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(stops))
    stopped = TransformersEngine(tmp_path)
    found = stopped.complete(QUESTION, max_new_tokens=12, temperature=0.0, seed=0)
    assert found.num_tokens == tokens.index(tokens[5]) + 1 and not found.is_cut
    assert stopped.identity()["stop_ids"] == [2, tokens[5]]


def test_a_prompt_has_one_bos_or_is_refused(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert prompt_ids(tokenizer, "<|begin|><|user|>a")[:2] == [1, 4]
    with pytest.raises(DataError, match=r"found 2 BOS tokens \(<\|begin\|>\) at its beginning, expected one"):
        prompt_ids(tokenizer, "<|begin|><|begin|><|user|>a")
    # This one adds none by itself, as Qwen's; one that does wants it in its template.
    assert prompt_ids(tokenizer, "<|user|>a")[0] == 4
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
    )
    with pytest.raises(DataError, match="found 0 BOS tokens"):
        prompt_ids(tokenizer, "<|user|>a")


def test_answers_are_the_same_whoever_was_killed_in_between(model, tmp_path, capsys):
    rows = [{"id": "a", "prompt": "One?"}, {"id": "b", "turns": ["Two?", "Three?"], "category": "writing"}]
    prompts = written(tmp_path / "prompts.jsonl", *rows)
    options = ["--model", str(model), "--prompts", str(prompts), "--samples", "2", "--temperature", "1.5"]
    options += ["--temperature-of", "writing=0.7", "--max-new-tokens", "6"]
    assert generate.main([*options, "--out", str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "whole" / "answers.jsonl").read_text()
    killed = tmp_path / "killed"
    assert generate.main([*options, "--out", str(killed)]) == 0
    lines = whole.splitlines(keepends=True)
    # As a process leaves it that was killed in the middle of its third line.
    (killed / "answers.jsonl").write_text(lines[3] + lines[0] + lines[1][:20])
    assert generate.main([*options, "--out", str(killed)]) == 0
    assert "2 of 4 answers are there already" in capsys.readouterr().out
    assert sorted((killed / "answers.jsonl").read_text().splitlines()) == sorted(whole.splitlines())
    found = read_lines(tmp_path / "whole" / "answers.jsonl")
    assert [(row["id"], row["sample"], row["temperature"]) for row in found][::3] == [("a", 0, 1.5), ("b", 1, 0.7)]
    assert len({tuple(row["answers"]) for row in found}) == 4
    assert [turn["role"] for turn in found[2]["messages"]] == ["user", "assistant", "user", "assistant"]
    record = json.loads((killed / "generation.json").read_text())
    assert record["settings"]["first_prompt"] == "<|begin|><|user|>One?<|end|><|assistant|>"
    assert record["answers"]["num_answers"] == 4 and record["answers"]["cut"] == 1.0
    assert record["answers"]["mean_tokens"] == (6 + 6 + 12 + 12) / 4

    assert generate.main([*options, "--seed", "1", "--out", str(killed)]) == 2
    error = capsys.readouterr().err
    assert "begun with other settings (seed 42 before, 1 now)" in error


class ThreadedEngine(Engine):
    """Answers from two threads, and remembers the threads in which prompts were rendered."""

    num_at_once = 2

    def __init__(self):
        self.did = []

    def identity(self):
        return {"engine": "threads"}

    def rendered(self, messages):
        self.did.append((threading.current_thread() is threading.main_thread(), messages[-1]["content"]))
        if messages[-1]["content"] == "Refused?":
            raise DataError("prompt: found a conversation that the chat template refuses: no")
        return ""

    def complete(self, messages, **settings):
        self.did.append("answer")
        return Completion("So.", 1, is_cut=False)


def test_every_prompt_is_rendered_in_the_main_thread_before_the_first_answer(tmp_path):
    engine, prompts = ThreadedEngine(), tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Which?", "Why?", "Who?")))
    list(answer_prompts(engine, prompts, tmp_path / "out", Decoding(num_samples=2, temperature=0.5)))
    assert set(engine.did[: engine.did.index("answer")]) == {(True, text) for text in ("Which?", "Why?", "Who?")}
    prompts.write_text(prompts.read_text() + json.dumps({"prompt": "Refused?"}) + "\n")
    refusing = ThreadedEngine()
    with pytest.raises(DataError, match="refuses"):
        list(answer_prompts(refusing, prompts, tmp_path / "other", Decoding()))
    assert "answer" not in refusing.did


def test_several_greedy_answers_and_prompts_without_room_are_refused(model, tmp_path, capsys):
    prompts = written(tmp_path / "prompts.jsonl", {"prompt": "word " * 600})
    options = ["--model", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert generate.main([*options, "--samples", "2"]) == 2
    assert generate.main([*options, "--max-new-tokens", "500"]) == 3
    error = capsys.readouterr().err
    assert "samples: found 2, expected 1 at temperature 0" in error and "expected at most 512 together" in error
    assert "simpo_megatron: id 1: prompt: found 6" in error
    assert generate.main(["--model", str(tmp_path), *options[2:]]) == 2
    assert "simpo convert mcore-to-hf" in capsys.readouterr().err


def test_repetition_counts_grams_that_were_there_before():
    assert repetition(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 - 4 / 5)
    assert repetition([1, 2, 3]) == 0.0
