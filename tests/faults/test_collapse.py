"""A learning rate that ruins the model in one update: seen, told, and, where asked, stopped before it is saved."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ranks import run_ranks

from simpo_megatron.demo import prepare_demo
from simpo_megatron.reporting.continuations import read_samples

WORKER = Path(__file__).parents[1] / "distributed" / "checkpoint_worker.py"
NUM_STEPS = 4
# The warm-up makes the first step one without effect; the second ruins the model, the third sees its loss.
RUNS = [
    {"name": "warned", "options": {"repetition_prompts": 2, "repetition_tokens": 16}},
    {"name": "spiked", "options": {"stop_on": ["loss_spike"]}},
    {"name": "displaced", "options": {"stop_on": ["displacement"]}},
    {"name": "mended", "copy_of": "displaced", "options": {"lr": 1e-4, "override_on_resume": True}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitors")
    demo = prepare_demo(folder / "demo")
    pairs = [json.loads(line) for line in Path(demo.train_file).read_text().splitlines()[:10]]
    # Each pair also the other way round: large rewards, whatever their sign, are a large loss.
    pairs += [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = {
        "model": str(demo.model_dir),
        "data": [str(folder / "pairs.jsonl")],
        "valid_data": [str(folder / "pairs.jsonl")],
        "data_cache": str(folder / "cache"),
        "tensor_model_parallel_size": 2,
        "bf16": False,
        "global_batch_size": 8,
        "max_length": 256,
        "max_prompt_length": 128,
        "tokens_per_microbatch": 512,
        "lr": 1.0,
        "lr_warmup_fraction": 0.5,
        "train_iters": NUM_STEPS,
        "save_interval": 1,
        "monitor_window": 8,
    }
    runs = [{**run, "options": {**options, **run["options"]}} for run in RUNS]
    (folder / "runs.json").write_text(json.dumps(runs))
    run_ranks(WORKER, 1, str(folder), timeout=240)
    return folder


def outcome(folder, name):
    result = json.loads((folder / f"{name}.json").read_text())
    print(result["output"][-2000:])
    return result["codes"], result["output"]


def metrics(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def saved(folder, name):
    return sorted(path.name for path in (folder / name).glob("iter_*"))


def test_a_spike_is_told_with_its_pairs_and_the_run_goes_on_when_not_told_otherwise(folder):
    codes, output = outcome(folder, "warned")
    assert codes == [0, 0]
    (line, *_) = [line for line in output.splitlines() if line.startswith("WARNING loss_spike")]
    spike = next(record for record in metrics(folder, "warned") if "pair_ids" in record)
    assert "after step 3:" in line and spike["iteration"] == 3 and len(spike["pair_ids"]) == 8
    samples = read_samples(folder / "warned")
    assert samples.iteration == NUM_STEPS and len(set(samples.prompts)) == len(samples.before) == 2
    assert samples.before != samples.after and all(samples.prompts)
    assert re.search(r"pairs \w+:\d+, ", line)
    (pairs,) = [p for consumed, p in map(json.loads, (folder / "warned.pairs").open()) if consumed == 16]
    assert spike["pair_ids"] == pairs, "the pairs that the third step took"
    assert "WARNING displacement after step 4:" in output
    assert "WARNING repetition after step" in output and metrics(folder, "warned")[-1]["eval/repetition"] > 0.5
    assert saved(folder, "warned")[-1] == "iter_0000004"


def test_a_spike_ends_the_run_where_asked_before_its_step_is_saved(folder):
    codes, output = outcome(folder, "spiked")
    assert codes == [7, 7]
    assert saved(folder, "spiked") == ["iter_0000001", "iter_0000002"]
    assert "StoppedByMonitor: loss_spike: the loss is" in output
    assert "stopped after step 3, which was not saved" in output and "spiked/iter_0000001;" in output
    assert "--resume 1 --override-on-resume" in output, "step 2 left the model whose loss is the spike"


def test_a_displaced_model_is_never_saved_where_displacement_stops_the_run(folder):
    codes, output = outcome(folder, "displaced")
    assert codes == [7, 7] and "stopped after step 2" in output
    assert saved(folder, "displaced") == ["iter_0000001"]
    last = metrics(folder, "displaced")[-1]
    assert last["iteration"] == 2 and last["eval/logps/chosen_displacement"] < -1


def test_a_resume_measures_displacement_from_step_0_of_the_first_run(folder):
    codes, output = outcome(folder, "mended")
    assert codes == [0, 0] and "WARNING displacement" not in output
    evaluations = {r["iteration"]: r for r in metrics(folder, "mended") if "eval/loss" in r}
    assert set(evaluations) == {0, 1, 4}
    key = "eval/logps/chosen"
    assert evaluations[4][f"{key}_displacement"] == evaluations[4][key] - evaluations[0][key] != 0
