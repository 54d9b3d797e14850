"""A run that stops and resumes is the run that never stopped.

In the same layout bit for bit: every tensor of every later checkpoint (weights, moments, random states) has the same
bytes, and metrics.jsonl the same lines. In another layout: the same pairs, the state read is exactly the state
written, and losses within 1e-5 relative of the uninterrupted run's, the budget that test_layouts.py holds layouts to.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import stored_values, whole_tensors
from ranks import run_ranks
from run_records import read_records
from tiny_models import MOES
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from simpo_megatron.demo import prepare_demo

WORKER = Path(__file__).with_name("checkpoint_worker.py")
NUM_STEPS, RELATIVE = 4, 1e-5
# 20 pairs in batches of 8: epochs end inside steps 3 and 5.
NUM_PAIRS, BATCH = 20, 8

TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
DROPOUT_TP2 = {**TP2, "sequence_parallel": True, "hidden_dropout": 0.1, "attention_dropout": 0.1}
OVERLAPPED_DP2 = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
OVERLAPPED_DP2 |= {"bf16": True, "deterministic": True}

# bf16 weights and fp32 ones, under each of megatron's optimizers.
KEPT_IN_FP32 = {"model": "moe", "bf16": True}

NORM = "decoder.final_layernorm.weight"
ONE_LARGE_PACK = {"data": "all", "global_batch_size": 384, "tokens_per_microbatch": 32768}


def resumed(name, of, at, options, **run):
    return {"name": name, "copy_of": of, "options": {**options, "resume": str(at)}, **run}


RUNS = [
    {"name": "tp2", "options": DROPOUT_TP2},
    resumed("tp2_at_1", "tp2", 1, DROPOUT_TP2),
    resumed("tp2_at_3", "tp2", 3, {**DROPOUT_TP2, "model": "without weights"}),
    {"name": "tp2_unprobed", "options": {**DROPOUT_TP2, "probe_memory": False}},
    {"name": "dp2", "options": OVERLAPPED_DP2},
    {"name": "dp2_unprobed", "options": {**OVERLAPPED_DP2, "probe_memory": False}},
    resumed("dp2_at_2", "dp2", 2, OVERLAPPED_DP2),
    {"name": "moe", "options": KEPT_IN_FP32},
    resumed("moe_at_3", "moe", 3, KEPT_IN_FP32),
    {"name": "moe_sharded", "options": {**KEPT_IN_FP32, **SHARDED}},
    resumed("moe_sharded_at_3", "moe_sharded", 3, {**KEPT_IN_FP32, **SHARDED}),
    {"name": "plain", "options": TP2},
    resumed("plain_to_pp2", "plain", 2, PP2, write_again=True),
    resumed("plain_to_dp2", "plain", 2, {}, write_again=True),
    {"name": "sharded", "options": SHARDED},
    resumed("sharded_to_tp2", "sharded", 2, {**TP2, **SHARDED}, write_again=True),
    resumed("plain_to_tp4", "plain", 2, TP4, num_ranks=4, write_again=True),
    resumed("sharded_to_tp2_dp2", "sharded", 2, {**TP2, **SHARDED}, num_ranks=4, write_again=True),
    {"name": "flipped", "copy_of": "plain", "options": TP2, "flip": "iter_0000004/__1_0.distcp"},
    resumed("flipped_step", "plain", 4, {}, num_ranks=1, flip="iter_0000004/__1_0.distcp"),
    resumed("missing_step", "plain", 7, {}, num_ranks=1),
    {"name": "required", "options": {"resume": "required"}, "num_ranks": 1},
    resumed("changed", "plain", 3, {"beta": 3.0, "data": "other"}, num_ranks=1),
    resumed("overridden", "plain", 3, {"beta": 3.0, "lr": 5e-4, "override_on_resume": True}, num_ranks=1),
    resumed("smaller_batches", "plain", 2, {"global_batch_size": 4, "override_on_resume": True}, num_ranks=1),
    resumed("larger_batches", "plain", 1, {"global_batch_size": 16, "override_on_resume": True}, num_ranks=1),
    resumed("renamed", "plain", 3, TP2, rename=["iter_0000003", NORM, "decoder.another.weight"]),
    resumed("disk_full", "plain", 3, TP2, file_limit=[1, 20_000], grace_seconds=60),
    # Room for what libraries allocate for each thread, without which the process ends before it can say why.
    {"name": "too_small", "options": {**TP2, **ONE_LARGE_PACK}, "memory_limit": [1, 64 << 20], "grace_seconds": 60},
    {"name": "anew", "copy_of": "plain", "options": {"resume": "none", "train_iters": 1}, "num_ranks": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    demo = prepare_demo(folder / "demo")
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1100,  # padded to 1152 rows for one tensor rank, to 1280 for two, to 1536 for four
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
        )
    )
    shutil.copytree(demo.model_dir, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder / "model")
    pairs = Path(demo.train_file).read_text().splitlines()[: NUM_PAIRS + 1]
    (folder / "pairs.jsonl").write_text("\n".join(pairs[:-1]) + "\n")
    (folder / "other.jsonl").write_text("\n".join(pairs[1:]) + "\n")
    options = {
        "model": str(folder / "model"),
        "data": [str(folder / "pairs.jsonl")],
        "valid_data": [str(folder / "pairs.jsonl")],
        "data_cache": str(folder / "cache"),
        "bf16": False,
        "global_batch_size": BATCH,
        "max_length": 256,
        "max_prompt_length": 128,
        "tokens_per_microbatch": 512,
        "lr": 1e-3,
        "lr_warmup_fraction": 0.25,
        "weight_decay": 0.1,
        "train_iters": NUM_STEPS,
        "save_interval": 1,
        "keep_checkpoints": 9,
        "eval_interval": 2,
    }
    shutil.copytree(folder / "model", folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(folder / "bare", folder / "moe_model")
    moe = copy.deepcopy(MOES["ernie4_5_moe"][0])
    moe.update({"vocab_size": 1100, "num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(moe).save_pretrained(folder / "moe_model")
    runs = [{**run, "options": {**options, **run["options"]}} for run in RUNS]
    for run in runs:
        if run["options"]["data"] == "other":
            run["options"]["data"] = [str(folder / "other.jsonl")]
        if run["options"]["data"] == "all":
            run["options"]["data"] = [str(demo.train_file)]
        if run["options"]["model"] == "without weights":
            run["options"]["model"] = str(folder / "bare")
        if run["options"]["model"] == "moe":
            run["options"]["model"] = str(folder / "moe_model")
    (folder / "runs.json").write_text(json.dumps(runs))
    run_ranks(WORKER, 1, str(folder), timeout=900)
    return folder


def outcome(folder, name):
    result = json.loads((folder / f"{name}.json").read_text())
    return result["codes"], result["output"]


def finished(folder, name):
    codes, output = outcome(folder, name)
    assert set(codes) == {0}, f"{name}: {codes}\n{output[-2000:]}"
    return output


def record(folder, name, step):
    return json.loads((folder / name / f"iter_{step:07d}" / "COMMIT.json").read_text())


def metrics(folder, name):
    return read_records(folder / name / "metrics.jsonl")


def pairs_seen(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.pairs").read_text().splitlines()]


def state(folder, name, step):
    """The hashes of all weights, moments and random states."""
    return stored_values(folder / name / f"iter_{step:07d}")


@pytest.mark.parametrize(
    ("whole", "name", "at"),
    [
        ("tp2", "tp2_at_1", 1),
        ("tp2", "tp2_at_3", 3),
        ("dp2", "dp2_at_2", 2),
        ("moe", "moe_at_3", 3),
        ("moe_sharded", "moe_sharded_at_3", 3),
    ],
)
def test_a_resume_in_the_same_layout_is_bit_identical(folder, whole, name, at):
    finished(folder, whole)
    output = finished(folder, name)
    assert f"iter_{at:07d}: step {at}" in output and "not those in" in output
    for step in range(at + 1, NUM_STEPS + 1):
        assert len([file for file in record(folder, whole, step)["files"] if file.endswith(".distcp")]) >= 2
        assert state(folder, name, step) == state(folder, whole, step)
    assert metrics(folder, name) == metrics(folder, whole)
    assert pairs_seen(folder, name) == pairs_seen(folder, whole)[at:]


@pytest.mark.parametrize("name", ["moe", "moe_sharded"])
def test_a_router_kept_in_fp32_is_stored_so_and_moves_by_less_than_bf16_could_show(folder, name):
    before, after = (whole_tensors(folder / name / f"iter_{step:07d}") for step in (3, 4))
    router = "decoder.layers.1.mlp.router.weight"
    assert before[router].dtype == torch.float32 and before["embedding.word_embeddings.weight"].dtype == torch.bfloat16
    moved = before[router] != after[router]
    assert moved.float().mean() > 0.9
    assert (before[router].bfloat16() == after[router].bfloat16())[moved].any()


@pytest.mark.parametrize("name", ["tp2", "dp2"])
def test_the_memory_probe_changes_nothing(folder, name):
    output, without = finished(folder, name), finished(folder, f"{name}_unprobed")
    (line,) = [line for line in output.splitlines() if line.startswith("memory ")]
    print(line)
    assert "GiB on the fullest rank" in line and "\nmemory  " not in without
    for step in range(1, NUM_STEPS + 1):
        assert state(folder, name, step) == state(folder, f"{name}_unprobed", step)
    assert metrics(folder, name) == metrics(folder, f"{name}_unprobed")


def test_memory_that_does_not_suffice_is_told_once_before_the_first_step(folder):
    codes, _ = outcome(folder, "too_small")
    told = [(folder / f"too_small.rank{rank}.log").read_text() for rank in (0, 1)]
    assert codes == [2, 2] and not list((folder / "too_small").glob("iter_*"))
    (line,) = [line for text in told for line in text.splitlines() if line.startswith("ConfigError")]
    print(line)
    assert "tokens_per_microbatch: found 32768" in line
    assert re.search(r" \d\d,\d{3} tokens in step \d \(pairs \w+:\d+(, \d+){7} and 376 more\)", line)
    assert "memory of rank 1" in line and "lower it" in line
    assert "validation pairs after" not in told[0]


def test_steps_of_a_run_change_its_state_so_that_equal_hashes_mean_something(folder):
    for name in ("tp2", "dp2"):
        states = [state(folder, name, step) for step in range(1, NUM_STEPS + 1)]
        for key in states[0]:
            # In bf16 a small step may leave a weight where it was; and dropout alone draws random numbers.
            if "exp_avg" in key or (name == "tp2" and key == "rng.tracker.model-parallel-rng"):
                assert len({hashes[key] for hashes in states}) == NUM_STEPS, key


def learned(checkpoint):
    """Every tensor of a checkpoint but the ranks' random states, of which another layout has others."""
    return {name: tensor for name, tensor in whole_tensors(checkpoint).items() if not name.startswith("rng.")}


CROSSINGS = [
    ("plain", "plain_to_pp2"),
    ("plain", "plain_to_dp2"),
    ("plain", "plain_to_tp4"),
    ("sharded", "sharded_to_tp2"),
    ("sharded", "sharded_to_tp2_dp2"),
]


@pytest.mark.parametrize(("whole", "name"), CROSSINGS)
def test_another_layout_reads_exactly_what_was_written(folder, whole, name):
    finished(folder, name)
    written = learned(folder / whole / "iter_0000002")
    read = learned(folder / f"{name}.state")
    assert set(read) == set(written) and any(key.startswith("optimizer.state.exp_avg_sq.") for key in read)
    for key, expected in written.items():
        found = read[key]
        if found.shape != expected.shape:
            # The vocabulary is padded for the ranks that share it: true rows agree, padding is zero on both sides.
            assert len(found) != len(expected) and {len(found), len(expected)} < {1152, 1280, 1536}
            assert not found[1100:].any()
            found, expected = found[:1100], expected[:1100]
        assert torch.equal(found, expected), key


@pytest.mark.parametrize(("whole", "name"), CROSSINGS)
def test_another_layout_takes_the_same_pairs_to_the_same_losses(folder, whole, name):
    assert pairs_seen(folder, name) == pairs_seen(folder, whole)[2:]
    expected, found = metrics(folder, whole), metrics(folder, name)
    assert [line["iteration"] for line in found] == [line["iteration"] for line in expected]
    for key in ("loss", "grad_norm", "eval/loss", "eval/rewards/margins"):
        before, after = ([line[key] for line in lines if key in line] for lines in (expected, found))
        assert np.allclose(after, before, rtol=RELATIVE, atol=RELATIVE), key


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(folder):
    output = finished(folder, "flipped")
    assert "WARNING" in output and "__1_0.distcp" in output and "iter_0000003: step 3" in output
    assert state(folder, "flipped", 4) == state(folder, "plain", 4)
    assert metrics(folder, "flipped") == metrics(folder, "plain")
    assert len(list((folder / "flipped").glob("iter_0000004.aside-*"))) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flipped_step", "its bytes changed since it was committed"),
        ("missing_step", "expected one of: 1, 2, 3, 4"),
        ("required", "no complete checkpoint"),
    ],
)
def test_a_checkpoint_that_is_asked_for_and_not_sound_ends_the_run(folder, name, said):
    codes, output = outcome(folder, name)
    assert codes == [4] and said in output and "CheckpointError" in output
    assert "validation pairs" not in output  # nothing was trained or evaluated


def test_a_rank_that_cannot_write_ends_the_run_on_every_rank_and_harms_nothing(folder):
    codes, output = outcome(folder, "disk_full")
    assert codes == [4, 4] and "no checkpoint of step 4" in output and "GiB free" in output
    assert not list((folder / "disk_full").glob("*.tmp*"))
    assert state(folder, "disk_full", 3) == state(folder, "plain", 3)


def test_another_objective_or_other_data_are_refused_with_both_values(folder):
    codes, output = outcome(folder, "changed")
    assert codes == [4]
    assert "training.beta: 2.0 when saved, 3.0 now" in output and "inputs.data: " in output


def test_told_so_a_resume_goes_on_with_the_new_options(folder):
    output = finished(folder, "overridden")
    assert "training.beta: 2.0 when saved, 3.0 now" in output
    *_, last = [line for line in metrics(folder, "overridden") if "loss" in line]
    *_, before = [line for line in metrics(folder, "plain") if "loss" in line]
    assert last["learning_rate"] == pytest.approx(before["learning_rate"] / 2)
    # Rewards are beta times log-probs, which the state of step 3 makes the same for both.
    assert last["rewards/chosen"] == pytest.approx(1.5 * before["rewards/chosen"], rel=1e-4)


def test_smaller_batches_go_on_behind_the_pairs_that_were_consumed(folder):
    output = finished(folder, "smaller_batches")
    assert "training.global_batch_size: 8 when saved, 4 now" in output
    (at, pairs), (next_at, next_pairs) = pairs_seen(folder, "smaller_batches")
    assert (at, next_at) == (16, 20) and len(pairs) == len(next_pairs) == 4
    assert sorted(pairs + next_pairs) == pairs_seen(folder, "plain")[2][1]


def test_larger_batches_take_the_same_pairs_in_the_same_order(folder):
    output = finished(folder, "larger_batches")
    assert "training.global_batch_size: 8 when saved, 16 now" in output
    steps, before = pairs_seen(folder, "larger_batches"), [pairs for _, pairs in pairs_seen(folder, "plain")]
    assert [at for at, _ in steps] == [8, 24, 40] and all(len(pairs) == 16 for _, pairs in steps)
    assert steps[0][1] == sorted(before[1] + before[2])
    # The run that was saved ends in the midst of the second of these steps; from there on each epoch is whole.
    rest = Counter(steps[1][1] + steps[2][1]) - Counter(before[3])
    seen = Counter(pair for pairs in before for pair in pairs) + rest
    assert sum(seen.values()) == 56 and set(seen.values()) <= {2, 3} and Counter(before[3]) <= Counter(steps[1][1])


def test_tensors_of_another_name_are_refused_on_every_rank_and_named(folder):
    codes, output = outcome(folder, "renamed")
    assert codes == [4, 4]
    assert f"1 tensors of this run are not in it: {NORM}; 1 tensors in it are no part of this run's model: " in output
    assert "decoder.another.weight" in output and "validation pairs" not in output
    assert "CheckpointError" in (folder / "renamed.rank1.log").read_text()


def test_a_start_anew_in_an_old_folder_mixes_nothing(folder):
    finished(folder, "anew")
    save = folder / "anew"
    assert [line["iteration"] for line in metrics(folder, "anew")] == [0, 1, 1]
    assert len(list(save.glob("metrics.jsonl.aside-*"))) == 1 and len(list(save.glob("iter_*.aside-*"))) == 4
    assert [entry.name for entry in save.glob("iter_*") if "aside" not in entry.name] == ["iter_0000001"]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "1\n"
