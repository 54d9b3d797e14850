"""A trained Llama-3 is served by vLLM as its folder was exported, and answers token for token as in transformers.

Needs vLLM, whose torch need not be this package's: `make test-vllm`, or SIMPO_VLLM_PYTHON names a Python that has it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ranks import REPOSITORY
from tiny_models import write_llama3
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo_megatron.commands import generate
from simpo_megatron.generation.lines import read_lines

PYTHON = os.environ.get("SIMPO_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="no vllm here, and SIMPO_VLLM_PYTHON names no Python that has it"),
]
QUESTIONS = ["What is the weather where you are?", "Name a good test.", "the people of the house"]
MAX_TOKENS = 24


def run(*command: str) -> None:
    environment = {**os.environ, "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The export of a short run on a random Llama 3, with heads of 32, the smallest that vLLM serves."""
    folder = tmp_path_factory.mktemp("vllm")
    write_llama3(
        folder / "source",
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,  # Answers of smaller weights are one token over and over.
    )
    options = {"model": "source", "save": "run", "data-cache": "cache", "export-hf": "hf"}
    run(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "examples/pretrain_simpo.py"),
        *(part for name, path in options.items() for part in (f"--{name}", str(folder / path))),
        *("--data", "demo", "--max-length", "512", "--max-prompt-length", "256", "--tokens-per-microbatch", "2048"),
        *("--global-batch-size", "16", "--train-iters", "2", "--lr", "1e-3", "--resume", "none"),
    )
    return folder / "hf"


def test_vllm_answers_as_transformers_does_and_stops_at_both_ids(exported: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    stops = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    another = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"questions": QUESTIONS, "max_tokens": MAX_TOKENS, "forced": [*stops, another]}))
    run(PYTHON, str(Path(__file__).with_name("vllm_worker.py")), str(exported), str(job))
    *answers, first_stop, second_stop, no_stop = json.loads(job.read_text())

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(question, answer)
        asked = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        prompt = inputs["input_ids"][0].tolist()
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=stops[0])
        assert answer["prompt"] == prompt and answer["ids"] == expected[0, len(prompt) :].tolist()
        assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.bos_token_id) == 1
    assert len({tuple(answer["ids"]) for answer in answers}) == len(QUESTIONS)
    assert any(len(set(answer["ids"])) > MAX_TOKENS // 2 for answer in answers)
    assert [answer["ids"] for answer in (first_stop, second_stop)] == [[stop] for stop in stops]
    assert {first_stop["ended"], second_stop["ended"]} == {"stop"}
    assert no_stop["ids"] == [another] * MAX_TOKENS and no_stop["ended"] == "length"


def test_the_engine_of_simpo_generate_answers_as_transformers_does(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both turns of a conversation too; and an answer ends at any stop id of the folder."""
    monkeypatch.setenv("SIMPO_VLLM_PYTHON", str(PYTHON))
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": question} for question in QUESTIONS] + [{"turns": QUESTIONS[:2]}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "folder"
    shutil.copytree(exported, folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = [{"role": "user", "content": QUESTIONS[0]}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)[0, inputs["input_ids"].shape[1] :]
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [*settings["eos_token_id"], int(answer[5])]
    (folder / "generation_config.json").write_text(json.dumps(settings))

    found = {}
    for engine in ("transformers", "vllm"):
        options = ["--prompts", str(prompts), "--max-new-tokens", str(MAX_TOKENS), "--dtype", "float32"]
        out = ["--engine", engine, "--out", str(tmp_path / engine)]
        out += ["--gpu-memory-utilization", "0.3"] if engine == "vllm" else []
        assert generate.main(["--model", str(folder), *options, *out]) == 0
        found[engine] = sorted(read_lines(tmp_path / engine / "answers.jsonl"), key=lambda row: row["id"])
    assert found["vllm"] == found["transformers"]
    first = found["vllm"][0]
    assert first["num_tokens"] == answer.tolist().index(int(answer[5])) + 1 and not first["is_cut"]
