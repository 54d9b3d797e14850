"""The inspection of data: its numbers are right on data made to be sick, and the tool prints and writes them."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_tokenizers import llama_like

from simpo_megatron.checkpoint.model_source import ModelSource
from simpo_megatron.commands import inspect
from simpo_megatron.config import load_config
from simpo_megatron.data import PairOptions, build_preference_dataset
from simpo_megatron.data.inspection import (
    histogram,
    inspect_dataset,
    num_leaked,
    read_as,
    show_pairs,
    summary,
    token_scan,
)
from simpo_megatron.data.rendering import FINDINGS, HARMLESS
from simpo_megatron.training.start import introduction, setup
from simpo_megatron.training.start.run_tokenizer import RunTokenizer

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "inspect_data.py"


def sick_file(path):
    rows = [{"prompt": f"q {i}", "chosen": "the answer " * 9, "rejected": f"no {i}"} for i in range(10)]
    rows += [rows[0]] * 2 + [{"prompt": "q 1", "chosen": "same", "rejected": "same"}] * 3
    rows += [{"prompt": "q 2", "chosen": "", "rejected": "no"}, {"prompt": "q", "chosen": "a <|eot_id|>"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def values(tmp_path):
    options = PairOptions(max_length=32, max_prompt_length=16, bad_record="skip", max_bad_fraction=1)
    dataset = build_preference_dataset([str(sick_file(tmp_path / "sick.jsonl"))], llama_like(), options, tmp_path / "c")
    valid = dataset.select(np.array([0, 3]))
    inspection = inspect_dataset(dataset, llama_like(), valid, micro_batch_size=12)
    return dataset, {f.name.strip(): f for rows in inspection.sections.values() for f in rows}


def test_the_inspection_counts_what_was_made_wrong(values):
    dataset, found = values
    assert found["records"].value == "17"
    assert found["pairs used"].value == "12"
    assert found["records dropped"].value.startswith("5, where bad_record is skip")
    assert found["identical_pair"].value.startswith("3, first at ")
    assert found["identical_pair"].value.endswith("sick.jsonl:13: chosen and rejected are the same text")
    assert found["empty_chosen"].warning
    assert found["missing_key:rejected"].warning
    assert found["pairs that repeat another one"].value == "2"
    assert found["different prompts"].value == "10, the most frequent 3 times"
    assert found["of them with a prompt of the training pairs"].value == "2"
    num_cut = int((dataset.lost[:, 1] > 0).sum())
    assert num_cut > 0
    assert found["responses without an end token, cut ones"].value == str(num_cut)
    assert found["responses without an end token, whole ones"].value == "0"
    assert found["two BOS at the start"].value == found["no BOS at the start"].value == "0"
    assert found["chosen is the longer response"].value == "100.0%"
    assert found["chosen is the longer response"].warning


def test_the_summary_of_a_run_names_every_loss(values):
    dataset, _ = values
    records, cut = summary(dataset, "validation ")
    path = dataset.report.first["identical_pair"].split(":13")[0]
    assert records.startswith("records   validation 17: 12 used, dropped 3 identical_pair (first at " + path + ":13), ")
    num_lost, num_left = int(dataset.lost.sum()), int(dataset.lengths.sum())
    num_cut = int((dataset.lost[:, 1] > 0).sum())
    assert cut == (
        f"cut       validation {num_cut} chosen (first at sick:1): {num_lost} tokens lost "
        f"({num_lost / (num_lost + num_left):.1%})"
    )
    assert num_leaked(dataset.select(np.array([0])), dataset) == 3


def test_the_summary_of_pairs_without_a_loss_is_one_line(tmp_path):
    path = tmp_path / "well.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "yes", "rejected": "no"}) + "\n")
    dataset = build_preference_dataset([str(path)], llama_like(), PairOptions(), tmp_path / "c")
    assert summary(dataset) == ["records   1: 1 used, dropped none"]


def test_the_summary_of_a_mixture_says_how_much_of_each_file_its_weights_take(tmp_path):
    for name, count in (("few", 2), ("many", 9)):
        rows = [{"prompt": f"{name} {i}", "chosen": "yes", "rejected": "no"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["0.5", str(tmp_path / "few.jsonl"), "0.5", str(tmp_path / "many.jsonl")]
    dataset = build_preference_dataset(files, llama_like(), PairOptions(), tmp_path / "c")
    assert summary(dataset)[1] == "files     2 of 2 pairs of few, 2 of 9 pairs of many"
    first, second, third = (dataset.where(index)[1] for index in (1, 2, 3))
    assert dataset.places([1, 2, 3, 0], 3) == f"few:{first}, many:{second}, {third} and 1 more"
    assert summary(dataset.select(np.array([0])))[1] == "files     1 of 2 pairs of few, 0 of 9 pairs of many"


def test_the_work_saved_is_counted_in_tokens(values):
    dataset, found = values
    longest = max(int(row[0] + row[1:].max()) for row in dataset.lengths)
    shared = int(dataset.lengths.sum())
    packed = shared + int(dataset.lengths[:, 0].sum())
    padded = 24 * longest
    assert found["tokens in padded batches of 12 pairs"].value == str(padded)
    assert found["tokens in packs"].value == f"{packed} ({padded / packed:.2f} times fewer)"
    assert found["tokens in packs that share prompts"].value == f"{shared} ({padded / shared:.2f} times fewer)"


def test_every_response_is_in_one_bin_of_the_histogram(values):
    dataset, _ = values
    assert histogram(dataset.lengths)[1].sum(axis=1).tolist() == [12, 12]


def test_shown_pairs_are_decoded_from_the_ids_that_are_trained_on(values):
    dataset, _ = values
    first, last = show_pairs(dataset, llama_like(), 2)
    assert (first.where, last.where) == ("sick:1", "sick:12")
    assert [name for name, _ in first.pieces] == ["prompt", "chosen", "cut", "rejected"]
    assert first.pieces[0][1].endswith("assistant<|end_header_id|>\n\n")
    assert first.pieces[2][1] == f"{dataset.lost[0, 1]} tokens of chosen"
    assert first.pieces[3][1] == "no 0<|eot_id|>"


def run_tool(arguments, folder, **variables):
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "120", **variables}
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment, check=False
    )


@pytest.mark.processes
def test_the_tool_prints_the_inspection_and_writes_a_page(tmp_path):
    llama_like().save_pretrained(tmp_path / "model")
    sick_file(tmp_path / "sick.jsonl")
    arguments = ["--model", "model", "--data", "sick.jsonl", "--valid-data", "held=sick.jsonl", "--show", "2"]
    arguments += ["--html", "page.html", "--preset", "mistral-base", "--max-length", "64", "--max-prompt-length", "32"]
    run = run_tool(arguments, tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert run.returncode == 0, run.stderr
    imported = set(re.findall(r"^import time: .* (\w+)[\w.]*$", run.stderr, re.MULTILINE))
    assert "transformers" in imported and not imported & {"torch", "megatron", "datasets"}
    assert re.search(r"files +sick.jsonl\b", run.stdout) and re.search(r"max_length +64\b", run.stdout)
    assert re.search(r"template_mode +princeton\b", run.stdout), "what the preset says"
    assert re.search(r"pairs used +12\b", run.stdout)
    assert re.search(r"identical_pair +3, first at sick.jsonl:13", run.stdout)
    assert "[rejected] <|start_header_id|>assistant<|end_header_id|>\n\nno 0<|eot_id|>" in run.stdout
    page = (tmp_path / "page.html").read_text()
    assert "identical_pair" in page
    assert "no 0&lt;|eot_id|&gt;" in page
    assert len(re.search(r'base64,([^"]+)"', page).group(1)) > 10_000


def test_a_tokenizer_without_a_template_is_told(tmp_path, capsys):
    tokenizer = copy.deepcopy(llama_like())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    told = ["--model", str(tmp_path / "model"), "--data", str(sick_file(tmp_path / "sick.jsonl"))]
    for options, is_told in (([], True), (["--chat-template", "none"], False)):
        assert inspect.main([*told, *options]) == 0
        assert ("none in the tokenizer: prompt and response" in capsys.readouterr().out) == is_told
        of_run = RunTokenizer(tmp_path / "model", load_config([*told, *options]).pairs)
        lines = introduction._describe_template(SimpleNamespace(tokenizer=of_run))
        assert [line[:34] for line in lines] == ["WARNING   chat_template: found none"[:34]] * is_told
    llama_like().save_pretrained(tmp_path / "model")
    of_run = RunTokenizer(tmp_path / "model", load_config(told).pairs)
    assert introduction._describe_template(SimpleNamespace(tokenizer=of_run)) == []


@pytest.mark.processes
def test_the_tool_says_in_one_line_what_it_cannot_read(tmp_path):
    llama_like().save_pretrained(tmp_path / "model")
    run = run_tool(["--model", "model", "--data", "missing.jsonl"], tmp_path)
    assert run.returncode == 3
    assert (
        run.stderr.strip().splitlines()[-1]
        == "ERROR simpo_megatron: missing.jsonl: found no such file, expected a preference file"
    )
    run = run_tool(["--model", "nowhere", "--data", "missing.jsonl"], tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("ERROR simpo_megatron: model: found no folder 'nowhere'")
    assert run.stderr.count("\n") == 1


def test_a_run_says_what_a_file_was_read_as_and_which_of_its_words_were_not(tmp_path):
    path = tmp_path / "notes.jsonl"
    row = {"prompt": "q", "chosen": "yes it is", "rejected": "no", "id": 7}
    rows = [row, row | {"prompt": "p", "note": "some words", "score_chosen": 1.0, "score_rejected": 2.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = build_preference_dataset([str(path)], llama_like(), PairOptions(), tmp_path / "c")
    assert read_as(dataset) == [
        "read as:  chosen/rejected texts with an explicit prompt",
        f"WARNING   columns with text that are not read: note (in 1, first at {path}:2)",
        "columns   not read, without text: id",
    ]
    found = {row.name.strip(): row for row in inspect_dataset(dataset, llama_like()).sections["Scores"]}
    assert found["pairs with scores"].value == "1 of 2"
    assert found["chosen has the lower score"].value == "1, first at notes:2"


def awkward_file(path):
    """Records of each kind that is dropped, cut, noted or read in part."""
    pair = {"prompt": "Which way does the river run?", "chosen": "To the sea.", "rejected": "Uphill."}
    rows = [
        pair,
        pair | {"rejected": pair["chosen"]},
        pair | {"chosen": ""},
        pair | {"prompt": "word " * 400},
        pair | {"chosen": pair["prompt"] + " To the sea.", "remark": "nobody reads these words", "id": 7},
        pair | {"prompt": [{"role": "wizard", "content": "?"}]},
        pair | {"chosen": "<think></think>To the sea. " + "Far " * 400},
        pair | {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt":\n\n')
    return str(path)


def test_an_inspection_and_a_run_give_the_same_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(setup, "build_on_first_ranks", lambda build: build(True))
    llama_like().save_pretrained(tmp_path / "model")
    told = ["--model", str(tmp_path / "model"), "--data", awkward_file(tmp_path / "awkward.jsonl")]
    told += ["--max-length", "64", "--max-prompt-length", "32", "--data-cache", str(tmp_path / "cache")]
    told += ["--bad-record", "skip", "--max-bad-fraction", "0.9"]
    config = load_config(told)
    sources = setup.Sources(model_source=ModelSource(tmp_path / "model"), train=config.data.data, valid={})
    of_run, _ = setup.load_data(config, sources, RunTokenizer(tmp_path / "model", config.pairs))
    run = read_as(of_run) + summary(of_run)

    assert inspect.main(told) == 0
    told_by_inspection = "".join(capsys.readouterr().out.split())  # a line may be broken anywhere

    def is_told(text):
        return "".join(text.split()) in told_by_inspection

    report, num_tokens = of_run.report, int(of_run.counted.sum())
    assert is_told(f"records {report.num_lines} pairs used {report.num_used}")
    [records] = [line for line in run if line.startswith("records")]
    assert records.startswith("records   10: 4 used")
    assert set(report.dropped) == {
        "identical_pair", "empty_chosen", "bad_role:prompt", "bad_weight:chosen", "bad_json", "blank_line"
    }  # fmt: skip
    for reason, count in report.dropped.items():
        place = report.place(reason)
        assert is_told(f"{reason} {count}, first at {place}:") and f"{count} {reason} (first at {place})" in records
    assert {"repeats_prompt", "empty_reasoning_in_text"} <= report.notes.keys()
    for name in FINDINGS.keys() & report.notes.keys():
        place, count = report.place(name), report.notes[name]
        assert is_told(f"{name} {count} pairs, first at {place}:")
        noted = any(line.startswith(f"noted     {count:,} {name} (first at {place})") for line in run)
        assert noted != (name in HARMLESS)
    column = f"remark (in 1, first at {tmp_path / 'awkward.jsonl'}:5)"
    assert is_told(f"with text {column}") and any(line.endswith(f"that are not read: {column}") for line in run)
    for part, (name, names) in enumerate((("prompt", "prompts"), ("chosen", "chosen"))):
        lost = of_run.lost[:, part]
        line = of_run.where(int(lost.argmax()))[1]
        assert is_told(f"{name} 1 cut (first at awkward:{line}), {lost.sum():,} tokens lost")
        assert f"1 {names} (first at awkward:{line})" in run[-1]
    assert is_told(f"response tokens, which the loss sees {num_tokens:,} (")


def test_the_look_at_every_token_equals_the_slow_one(tmp_path, monkeypatch):
    monkeypatch.setattr(token_scan, "_BLOCK_TOKENS", 40)
    user, words = {"role": "user", "content": "q"}, ("a", "the answer is", "no", "")
    rows = []
    for number in range(60):
        said = [{"role": "assistant", "content": f"{words[(number * step) % 3]} {number % 7}"} for step in (1, 2, 5)]
        several = [said[0], {"role": "user", "content": "w" * (number % 5) + "?"}, said[1]]
        rows.append({"chosen": [user, *several], "rejected": [user, said[2]]})
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, lines in zip(files, (rows[:40], rows[20:]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    options = PairOptions(responses="assistant", max_length=24, max_prompt_length=12, bad_record="skip")
    both = build_preference_dataset(list(map(str, files)), llama_like(), options, tmp_path / "cache")
    for dataset in (both, both.select(np.arange(len(both))[::-3])):
        first, last = token_scan.edges(dataset)
        pairs = [dataset[index] for index in range(len(dataset))]
        for pair, begin, (chosen, rejected) in zip(pairs, first.tolist(), last.tolist(), strict=True):
            assert begin == [*pair.prompt_ids[:2].tolist(), -1][:2]
            assert chosen == [-1, *pair.chosen_ids.tolist()][-2:]
            assert rejected == [-1, *pair.rejected_ids.tolist()][-2:]
        seen = [tuple(part.tobytes() for part in pair.marked()) for pair in pairs]
        hashes = token_scan.pair_hashes(dataset).tolist()
        assert len(set(zip(seen, hashes, strict=True))) == len(set(seen)) == len(set(hashes)) < len(pairs)
