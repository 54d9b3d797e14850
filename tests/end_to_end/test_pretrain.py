"""The one command, as a user types it: it starts what is missing, trains, evaluates, and leaves a model that loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_records import SPEED_KEYS, without_speed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from twin import response_log_probs

from simpo_megatron.config import load_config
from simpo_megatron.data import build_preference_dataset
from simpo_megatron.demo import prepare_demo
from tools import convert_hf, verify_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = "examples/pretrain_simpo.py"
NUM_STEPS = 3
# Validation sets by name, and which lines of the bundled validation pairs they hold.
SETS = {"front": slice(0, 32), "back": slice(32, 50)}
STEP_KEYS = {
    "iteration",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "response_length/chosen",
    "response_length/rejected",
    "grad_norm",
    "learning_rate",
    *SPEED_KEYS,
}


def torchrun(*arguments: str, timeout: float = 400) -> subprocess.CompletedProcess:
    """`torchrun ARGUMENTS` from the repository's folder, where it would start one rank if not told otherwise."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        cwd=REPOSITORY,
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def write_set(folder: Path, name: str, lines: slice) -> Path:
    path = folder / f"{name}.jsonl"
    bundled = prepare_demo(folder / "cache" / "demo").valid_file.read_text().splitlines()
    path.write_text("\n".join(bundled[lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what was printed, the run's folder, the options) of a short run of the embedded default on two ranks.

    Its model is exported as it was trained, in fp32, so that numbers can be held against the trainer's.
    """
    folder = tmp_path_factory.mktemp("pretrain")
    options = ["--tp", "2", "--train-iters", str(NUM_STEPS), "--log-interval", "1", "--global-batch-size", "16"]
    options += ["--save", str(folder / "run"), "--save-interval", "2", "--export-hf", str(folder / "hf")]
    options += ["--data-cache", str(folder / "cache"), "--export-dtype", "stored"]
    options += ["--profile", "--use-pytorch-profiler", "--profile-step-start", "2", "--profile-step-end", "3"]
    options += ["--valid-data", *(f"{name}={write_set(folder, name, lines)}" for name, lines in SETS.items())]
    done = torchrun(SCRIPT, *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done, folder, options


def records_of(folder: Path, name: str = "run") -> tuple[list[dict], list[dict]]:
    """(steps, evaluations) of the metrics.jsonl of the run `name`."""
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "eval/loss" in record]
    return [record for record in records if record not in evaluations], evaluations


def test_one_process_starts_the_missing_rank_and_says_so_in_one_line(run):
    done, _, options = run
    said = [line for line in done.stdout.splitlines() if "torchrun" in line]
    assert len(said) == 1
    assert said[0].startswith("1 rank runs, the layout needs 2")
    assert said[0].endswith(f"torchrun --nproc-per-node 2 {REPOSITORY / SCRIPT} {' '.join(options)}")
    assert "2 (gloo): tp 2" in done.stdout


def test_a_run_that_works_warns_of_nothing(run):
    done, *_ = run
    noise = [line for line in done.stderr.splitlines() if "warn" in line.lower() or "error" in line.lower()]
    # Python says the first of megatron-core's own lines, once, when it compiles them; the profiler of a CUDA torch says
    # the second where there is no driver.
    known = ("SyntaxWarning: invalid escape sequence", "gpuGetDeviceCount failed")
    assert [line for line in noise if not any(words in line for words in known)] == []


def test_every_step_and_evaluation_is_in_the_metrics_file_under_its_documented_keys(run):
    _, folder, _ = run
    steps, evaluations = records_of(folder)
    assert [step["iteration"] for step in steps] == [1, 2, 3]
    assert [evaluation["iteration"] for evaluation in evaluations] == [0, 3]
    for step in steps:
        assert set(step) >= STEP_KEYS, STEP_KEYS - set(step)
        assert step["rewards/margins"] == pytest.approx(step["rewards/chosen"] - step["rewards/rejected"], abs=1e-5)
        assert step["loss"] > 0 and step["grad_norm"] > 0
    for evaluation in evaluations:
        moved = evaluation.pop("eval/logps/chosen_displacement")
        assert moved == evaluation["eval/logps/chosen"] - evaluations[0]["eval/logps/chosen"]
        of_sets = [key for key in evaluation if key.startswith(tuple(f"eval/{name}/" for name in SETS))]
        own = {
            key.removeprefix("eval/"): value
            for key, value in evaluation.items()
            if key.startswith("eval/") and key not in of_sets
        }
        for name in SETS:
            assert own.keys() == {key.split("/", 2)[2] for key in of_sets if key.startswith(f"eval/{name}/")}
        assert len(evaluation) == 1 + 3 * len(own)
        assert all(evaluation[f"eval/front/{key}"] == value for key, value in own.items()), "eval/ is the first set"
    assert evaluations[1]["eval/loss"] != evaluations[0]["eval/loss"]


def test_each_named_set_is_shown_and_the_first_decides_the_best_checkpoint(run):
    done, folder, _ = run
    for name, lines in SETS.items():
        assert f"{lines.stop - lines.start} for validation {name}" in done.stdout
        assert (
            len([line for line in done.stdout.splitlines() if line.startswith(f"validation pairs {name} after")]) == 2
        )
    page = (folder / "run" / "report.html").read_text()
    assert "<td>front</td>" in page and "<td>back</td>" in page
    facts = json.loads((folder / "run" / "iter_0000003" / "COMMIT.json").read_text())["facts"]
    _, evaluations = records_of(folder)
    accuracy = "rewards/accuracies"
    assert facts["metrics"][f"eval/{accuracy}"] == evaluations[-1][f"eval/front/{accuracy}"]


@pytest.mark.parametrize("validation", SETS)
def test_the_exported_model_loads_in_transformers_and_scores_as_the_trainer_did(run, validation):
    """A log-prob of 7 in fp32 is good to 4e-7 and the mean of many to less: 1e-5 (measured: 3e-8)."""
    _, folder, options = run
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    config = load_config(options)
    files = [str(folder / f"{validation}.jsonl")]
    dataset = build_preference_dataset(files, tokenizer, config.pairs, folder / "twin_cache")
    averages = {"chosen": [], "rejected": []}
    with torch.no_grad():
        for pair in dataset:
            for name, found in averages.items():
                log_probs = response_log_probs(model, pair.prompt_ids.tolist(), getattr(pair, f"{name}_ids").tolist())
                found.append(float(log_probs.mean()))
    _, evaluations = records_of(folder)
    for name, found in averages.items():
        expected = evaluations[-1][f"eval/{validation}/logps/{name}"]
        difference = abs(sum(found) / len(found) - expected)
        print(f"{name}: {difference:.1e}")
        assert difference <= 1e-5


def test_the_newest_checkpoint_converts_to_the_very_folder_that_the_run_exported(run):
    _, folder, _ = run
    out = folder / "converted" / "hf"
    assert convert_hf.main(["mcore-to-hf", str(folder / "run"), str(out), "--dtype", "stored"]) == 0
    exported = {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == exported
    assert b"went from" in exported["README.md"] and b"## Metrics" in exported["README.md"]


def test_the_demonstration_text_comes_back_from_the_exported_tokenizer(run):
    _, folder, _ = run
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "How are you?"}], tokenize=False)
    assert "How are you?" in ids


def test_the_steps_asked_for_are_profiled_on_the_first_rank_with_their_phases(run):
    done, folder, _ = run
    assert f"profile   steps 3 to 3 on ranks 0: PyTorch's profiler, into {folder / 'run/profile'}" in done.stdout
    (trace,) = (folder / "run/profile").iterdir()
    assert trace.name.startswith("rank0000.") and trace.name.endswith(".pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    spans = {e["name"]: e for e in events if e.get("cat") == "user_annotation"}
    assert [name for name in spans if name.startswith("step ")] == ["step 3"]
    for phase in ("data", "forward_backward", "forward", "optimizer"):
        inside, step = spans[phase], spans["step 3"]
        assert step["ts"] <= inside["ts"] <= inside["ts"] + inside["dur"] <= step["ts"] + step["dur"]


def test_a_run_resumed_from_an_earlier_step_is_the_run_that_went_on(run):
    """Same layout, same machine: the last step's numbers and the exported weights are equal, not close.

    The resumed run exports bf16, what a run does that is told nothing, and says that this rounds.
    """
    _, folder, options = run
    shutil.copytree(folder / "run", folder / "resumed")
    own = [*options, "--save", str(folder / "resumed"), "--resume", "2", "--export-hf", str(folder / "resumed_hf")]
    own += ["--export-dtype", "bfloat16"]
    done = torchrun("--nproc-per-node", "2", SCRIPT, *own)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "iter_0000002: step 2" in done.stdout
    last = {}
    for name in ("run", "resumed"):
        steps, _ = records_of(folder, name)
        last[name] = without_speed(steps[-1])
    assert last["resumed"] == last["run"] and last["run"]["iteration"] == NUM_STEPS
    exported = [load_file(folder / name / "model.safetensors") for name in ("hf", "resumed_hf")]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(exported[0][name].bfloat16(), exported[1][name]) for name in exported[0])
    for folder_name, dtype in (("hf", "float32"), ("resumed_hf", "bfloat16")):
        assert json.loads((folder / folder_name / "config.json").read_text())["dtype"] == dtype
        assert f"Weights: {dtype}, trained in float32." in (folder / folder_name / "README.md").read_text()
    said = "NOTE      float32 weights are rounded to bfloat16 there; --export-dtype stored keeps every bit"
    assert said in done.stdout.splitlines() and "NOTE" not in run[0].stdout


def test_without_a_word_both_ways_out_round_to_bf16_and_say_so(run, capsys):
    _, folder, _ = run
    out = folder / "rounded"
    assert load_config([]).model.export_dtype == "bfloat16"
    assert convert_hf.main(["mcore-to-hf", str(folder / "run"), str(out)]) == 0
    said = "NOTE float32 weights are rounded to bfloat16; --dtype stored keeps every bit"
    assert said in capsys.readouterr().out.splitlines()
    trained, rounded = (load_file(path / "model.safetensors") for path in (folder / "hf", out))
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in trained.items())
    assert verify_checkpoint.main([str(folder / "run"), str(out)]) == 0
    assert "compared once cast to the narrower" in capsys.readouterr().out


def test_bad_data_stops_all_ranks_with_one_line_and_the_exit_code_of_data(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    done = torchrun(
        "--nproc-per-node", "2", SCRIPT, "--tp", "2", "--model", "demo", "--max-length", "512",
        "--max-prompt-length", "256", "--data", str(tmp_path / "empty.jsonl"), "--data-cache", str(tmp_path / "cache"),
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR simpo_megatron")]
    assert len(said) == 1, done.stderr[-4000:]
    assert "empty.jsonl" in said[0]
    assert "exitcode  : 3" in done.stderr
