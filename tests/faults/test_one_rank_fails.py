"""One rank fails, hangs or differs: all ranks end soon, with the right exit code and one line that names it and why.

What is not finite reaches no weight, and no secret of the environment reaches a file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks, within
from safetensors import safe_open
from safetensors.torch import save_file
from small_runs import small_run

WORKER = Path(__file__).parents[1] / "distributed" / "checkpoint_worker.py"
CANARY = "canary-5f0c4d2e"
STEP_SECONDS = 15
KILLED, STOPPED = -9, 75
DP2 = {"tensor_model_parallel_size": 1}
# What happens in which run (see checkpoint_worker.py), the exit code of each rank, and what a rank's output holds.
RUNS = {
    "the_reader_of_one_copy_cannot_read": (
        {"fault": "data@2:1:raise", "options": DP2},
        [3, 3],
        {0: r"DataError: batch: found one that rank 1 could not read \(InjectedError: injected at data by SIMPO_FAULT"},
    ),
    "the_reader_of_two_ranks_cannot_read": (
        {"fault": "data@2:0:raise"},
        [3, 3],
        {0: r"DataError: batch: found one that rank 0 could not read \(InjectedError: injected at data by SIMPO_FAULT"},
    ),
    "the_reader_is_told_to_end_while_it_indexes": (
        {
            "by_command": True,
            "kill": [0, "open", r"pairs-.*\.tmp-\w+/pairs\.bin", 1, "SIGTERM"],
            "options": {"data_cache": "FOLDER/the_reader_is_told_to_end_while_it_indexes/cache"},
        },
        [STOPPED, STOPPED],
        {None: r"^STOPPED simpo_megatron rank \d: SIGTERM: stopped between steps; nothing is kept: no --save"},
    ),
    "one_rank_raises_in_forward": (
        {"fault": "forward@2:1:raise"},
        [6, 1],
        {
            0: r"STOPPED simpo_megatron rank 0: stopped because rank 1 failed in step [12]: InjectedError: injected at "
            r"forward by SIMPO_FAULT \(.*faults.py:\d+\)",
            1: r"^InjectedError: injected at forward",
        },
    ),
    "one_rank_raises_in_backward": (
        {"fault": "backward@2:1:raise"},
        [6, 1],
        {
            0: r"STOPPED simpo_megatron rank 0: stopped because rank 1 failed in step [12]: InjectedError: injected at "
            r"backward by SIMPO_FAULT",
        },
    ),
    "one_rank_raises_in_the_optimizer": (
        {"fault": "update@2:1:raise"},
        [6, 1],
        {0: r"STOPPED simpo_megatron rank 0: stopped because rank 1 failed in step 2: InjectedError: .* update"},
    ),
    "one_rank_raises_when_it_saves": (
        {"fault": "save:1:raise", "options": {"save_interval": 1, "save": "FOLDER/one_rank_raises_when_it_saves"}},
        [6, 1],
        {0: r"STOPPED simpo_megatron rank 0: stopped because rank 1 failed in the checkpoint of step 1: InjectedError"},
    ),
    "one_rank_does_not_arrive": (
        {"fault": "step@2:1:hang", "options": {"distributed_timeout_seconds_after_init": STEP_SECONDS}},
        [6, 6],
        {
            None: r"ERROR simpo_megatron rank \d: timeout: step 2 exceeded 15 s "
            r"\(distributed_timeout_seconds_after_init\): rank 1 is in step 2 at simpo_megatron/faults.py:\d+ "
            r"\(_arrive\); the others wait for it in step 2 at simpo_megatron/mcore/"
        },
    ),
    "the_first_rank_is_stopped": (
        {
            "fault": "step@2:0:stop",
            "options": {"distributed_timeout_seconds_after_init": STEP_SECONDS},
            "grace_seconds": 2,
        },
        [KILLED, 6],
        {
            1: r"ERROR simpo_megatron rank 1: timeout: step 2 exceeded 15 s \(.*\): rank 0 \(last phase: step 2\) "
            r"stopped responding; likely killed .*dmesg"
        },
    ),
    "the_first_rank_is_killed": (
        {"fault": "update@2:0:kill"},
        [KILLED, 6],
        {
            1: r"ERROR simpo_megatron rank 1: a connection was lost in step [23]: rank 0 \(last phase: step 2\) "
            r"stopped responding; likely killed \(out of"
        },
    ),
    "the_store_of_the_ranks_is_frozen": (
        {"signal_store": [2, "SIGSTOP"], "options": {"train_iters": 100_000}},
        [6, 6],
        {0: r"^ERROR simpo_megatron rank 0: stopped in step \d+ because the ranks' store at \S+ does not answer"},
    ),
    "the_first_rank_and_the_store_are_killed": (
        {"signal_store": [2, "SIGKILL", True], "options": {"train_iters": 100_000}},
        [KILLED, 6],
        {1: r"^ERROR simpo_megatron rank 1: stopped in step \d+ because the ranks' store at \S+ does not answer"},
    ),
    "the_store_of_the_ranks_is_killed": (
        {"signal_store": [2, "SIGKILL"], "options": {"train_iters": 100_000}},
        [6, 6],
        {0: r"^ERROR simpo_megatron rank 0: stopped in step \d+ because the ranks' store at \S+ does not answer"},
    ),
    "one_rank_has_no_data_before_they_meet": (
        {"by_command": True, "other_options": [1, {"data": ["/none.jsonl"]}]},
        [3, 3],
        {
            0: r"^STOPPED simpo_megatron rank 0: stopped because rank 1 failed before all ranks had met: /none.jsonl",
            1: r"^ERROR simpo_megatron rank 1: /none.jsonl: found no such file",
        },
    ),
    "all_ranks_find_the_same_mistake": (
        {"by_command": True, "options": {"data": ["/none.jsonl"]}},
        [3, 3],
        {None: r"^ERROR simpo_megatron rank \d: /none.jsonl: found no such file"},
    ),
    "ranks_find_different_models_under_one_name": (
        {"by_command": True, "folders": ["FOLDER/one", "FOLDER/other"], "options": {"model": "model"}},
        [6, 6],
        {
            0: r"^ERROR simpo_megatron rank 0: model: found different files under one name, expected the same on each "
            r"rank: model.safetensors is \w{16} on rank 1, \w{16} on rank 0; the folder is .*/other/model on rank "
            r"1, .*/one/model on rank 0; give"
        },
    ),
    "one_rank_is_told_to_stop_before_the_first_step": (
        {"by_command": True, "kill": [1, "open", r"/model.safetensors", 1, "SIGUSR1"]},
        [STOPPED, STOPPED],
        {None: r"^STOPPED simpo_megatron rank \d: SIG(USR1|TERM): stopped between steps; nothing is kept: no --save"},
    ),
    "one_rank_leaves_with_code_0": (
        {"fault": "forward@2:1:exit"},
        [6, 0],
        {
            0: r"ERROR simpo_megatron rank 0: a connection was lost in step [12]: rank 1 \(last phase: "
            r"step [12]\) stopped responding; likely killed \(out of memory\?\) or unreachable"
        },
    ),
    "one_rank_was_started_with_another_seed": (
        {"other_options": [1, {"seed": 43}]},
        [6, 6],
        {
            0: r"ParallelError: ranks: found different starts, expected the same on each: seed is 43 on rank 1, 42 on "
            r"rank 0; start all ranks"
        },
    ),
    "one_rank_was_started_for_another_layout": (
        {"other_options": [1, DP2]},
        [6, 6],
        {0: r"tensor_model_parallel_size is 1 on rank 1, 2 on rank 0"},
    ),
    "one_rank_takes_a_microbatch_fewer": (
        {"shorten_plan": [1, 2], "options": DP2},
        [6, 6],
        {0: r"ParallelError: ranks: found different plans for this step, the pairs or microbatches of \d are not"},
    ),
    # Neither gloo nor NCCL notices: collectives are matched by their order alone.
    "collectives_are_swapped_on_one_rank": (
        {"swap_collectives": 1, "options": {**DP2, "save": "FOLDER/collectives_are_swapped_on_one_rank"}},
        [6, 6],
        {0: r"weights: found data-parallel replicas of \d+ that differ, .* on rank 1, \w{16} on rank 0; start again"},
    ),
    "a_tensor_parallel_copy_differs_at_the_start": (
        {"disturb": [1, 0]},
        [6, 6],
        {0: r"weights: found tensor-parallel replicas of 1 that differ, decoder.final_layernorm.weight first"},
    ),
    "a_data_parallel_copy_differs_at_a_save": (
        {"disturb": [1, 1], "options": {**DP2, "save": "FOLDER/a_data_parallel_copy_differs_at_a_save"}},
        [6, 6],
        {0: r"weights: found data-parallel replicas of 1 that differ, .* on rank 1, \w{16} on rank 0; start again"},
    ),
    "a_loss_is_not_a_number": (
        {"fault": "forward@2:1:nan", "compare_state": True, "options": DP2},
        [5, 5],
        {0: r"NumericsError: loss: found nan in the microbatch of pairs \w+:\d+, .*\(rank 1\); .*skip_nonfinite_steps"},
    ),
    "a_gradient_overflows": (
        {"spoil_gradient": [1, 2], "compare_state": True},
        [5, 5],
        {0: r"NumericsError: grad_norm: found (inf|nan), .* the step's losses are finite, its pairs are \w+:\d+, "},
    ),
    "a_step_is_left_out_before_a_stop": (
        {
            "fault": "forward@3:1:nan",
            "signals": [1, 2, ["SIGTERM"]],
            "options": {"skip_nonfinite_steps": 1, "save": "FOLDER/a_step_is_left_out_before_a_stop"},
        },
        [STOPPED, STOPPED],
        {0: r"WARNING   step skipped \(1 of at most 1\): loss: found nan"},
    ),
    "another_one_after_the_resume_is_one_too_many": (
        {
            "fault": "forward:1:nan",
            "options": {"skip_nonfinite_steps": 1, "save": "FOLDER/a_step_is_left_out_before_a_stop"},
        },
        [5, 5],
        {0: r"NumericsError: .*; 1 such steps were skipped in this run, and skip_nonfinite_steps allows 1"},
    ),
    "a_loss_is_not_a_number_and_the_step_is_left_out": (
        {
            "fault": "forward@6:1:nan",
            "compare_state": True,
            "options": {
                "skip_nonfinite_steps": 1,
                "save": "FOLDER/a_loss_is_not_a_number_and_the_step_is_left_out",
            },
        },
        [0, 0],
        {
            0: r"WARNING   step skipped \(1 of at most 1\): loss: found nan in the microbatch of pairs "
            r"\w+:\d+, .*\(rank 1\)"
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank")
    options = {
        **small_run(folder),
        "train_iters": 3,
        "probe_memory": False,
        "tensor_model_parallel_size": 2,
        "save": None,
    }
    for name, seed in (("one", 1), ("other", 2)):
        shutil.copytree(options["model"], folder / name / "model")
        with safe_open(folder / name / "model" / "model.safetensors", "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        weights["lm_head.weight"][0, 0] += seed
        save_file(weights, folder / name / "model" / "model.safetensors", {"format": "pt"})
    runs = []
    for name, (what, _, _) in RUNS.items():
        what = json.loads(json.dumps(what).replace("FOLDER", str(folder)))
        runs.append({"grace_seconds": 60, **what, "name": name, "options": {**options, **what.get("options", {})}})
    (folder / "runs.json").write_text(json.dumps(runs))
    secrets = {"HF_TOKEN": CANARY, "WANDB_API_KEY": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY}
    before = {name: os.environ.get(name) for name in secrets}
    os.environ.update(secrets)
    try:
        run_ranks(WORKER, 1, str(folder), timeout=500)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_all_ranks_end_and_the_cause_is_named(folder, name):
    what, codes, expected = RUNS[name]
    outcome = json.loads((folder / f"{name}.json").read_text())
    logs = [(folder / f"{name}.rank{rank}.log").read_text() for rank in range(2)]
    assert outcome["codes"] == codes, logs
    limit = what.get("options", {}).get("distributed_timeout_seconds_after_init", 0)
    ends = [seconds for seconds, code in zip(outcome["since_phase"], codes, strict=True) if code != KILLED]
    assert max(ends) < limit + within(15), "the last phase began before whatever went wrong"
    for rank, pattern in expected.items():
        said = "\n".join(logs) if rank is None else logs[rank]
        assert re.search(pattern, said, re.MULTILINE), said[-3000:]
    assert sum(len(re.findall("^ERROR ", log, re.MULTILINE)) for log in logs) <= 1
    committed = list((folder / name).glob("iter_*/COMMIT.json"))
    saves = what.get("options", {}).get("save") is not None
    assert bool(committed) == (saves and codes in ([0, 0], [STOPPED, STOPPED]))


@pytest.mark.parametrize("name", [name for name, (what, *_) in RUNS.items() if "compare_state" in what])
def test_a_step_that_is_not_finite_touches_nothing(folder, name):
    for rank in range(2):
        log = (folder / f"{name}.rank{rank}.log").read_text()
        ((num_moments, same),) = re.findall(r"\d+ weights, (\d+) moments and the schedule are as before: (\w+)", log)
        assert int(num_moments) > 0 and same == "True"


def test_no_secret_of_the_environment_is_in_a_log_a_configuration_or_a_checkpoint(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "metrics.jsonl", "COMMIT.json", "report.html"} <= names
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
