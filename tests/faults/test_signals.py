"""Told to stop by a signal, a run loses nothing: it ends after a whole step, saved, and goes on as if never told.

"As if never told": the shard files of the last checkpoint (weights, moments, random states) have the hashes of the
uninterrupted run's, and metrics.jsonl the same lines.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from checkpoints import stored_values
from ranks import run_ranks
from run_records import read_records
from small_runs import small_run

WORKER = Path(__file__).parents[1] / "distributed" / "checkpoint_worker.py"
NUM_STEPS = 4
STOPPED = 75
# What happens to which rank (checkpoint_worker.py), and the step after which the run then leaves.
STOPS = {
    # As Slurm does when it preempts a job: twice within moments, which is one request.
    "the_second_rank_is_told_in_step_2": ({"signals": [1, 2, ["SIGTERM", "SIGTERM"]]}, 2),
    "the_first_rank_is_told_in_the_last_step": ({"signals": [0, NUM_STEPS, ["SIGUSR1"]]}, NUM_STEPS),
    "the_second_rank_is_told_while_it_saves": (
        {
            "kill": [1, "open", r"iter_0000002\.tmp-.*/__1_0\.distcp', 'w'", 1, "SIGTERM"],
            "options": {"save_interval": 2},
        },
        2,
    ),
    "the_first_rank_is_told_in_the_memory_probe": ({"fault": "data@1:0:sigterm"}, 1),
    "the_first_rank_is_told_in_an_evaluation": ({"fault": "data@5:0:sigterm"}, 3),
}
# A grace like torchrun's 30 s, scaled down, which the second checkpoint of this run does not keep.
TOO_SLOW = {"signals": [1, 3, ["SIGTERM"]], "fault": "save@2:1:hang", "kill_after_log": ["received; stopping", 8]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    options, held_out = small_run(folder), folder / "held_out.jsonl"
    held_out.write_text("".join(Path(options["data"][0]).read_text().splitlines(keepends=True)[:8]))
    options = {
        **options,
        "hidden_dropout": 0.1,
        "train_iters": NUM_STEPS,
        "tensor_model_parallel_size": 2,
        "valid_data": [str(held_out)],
        "eval_interval": 2,
    }
    runs = [{"name": "uninterrupted", "options": options}]
    for name, (fault, _) in STOPS.items():
        own = {**options, **fault.get("options", {}), "save": str(folder / name)}
        runs += [{**fault, "name": f"{name}_stopped", "options": own}, {"name": name, "options": own}]
    own = {**options, "save_interval": 2, "save": str(folder / "too_slow")}
    runs += [{**TOO_SLOW, "name": "too_slow_killed", "options": own}, {"name": "too_slow", "options": own}]
    twice = {"signals": [1, 2, ["SIGTERM", "SIGINT"]], "options": {**options, "save_interval": 1}}
    runs.append({**twice, "name": "told_twice"})
    runs.append({"signals": [1, 2, ["SIGTERM"]], "name": "unsaved", "options": {**options, "save": None}})
    (folder / "runs.json").write_text(json.dumps(runs))
    run_ranks(WORKER, 1, str(folder), timeout=500)
    return folder


def outcome(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def last_state(folder, name):
    return stored_values(folder / name / f"iter_{NUM_STEPS:07d}")


def metrics(folder, name):
    return read_records(folder / name / "metrics.jsonl")


def check_end(folder, name):
    assert last_state(folder, name) == last_state(folder, "uninterrupted")
    assert metrics(folder, name) == metrics(folder, "uninterrupted")


@pytest.mark.parametrize("name", STOPS)
def test_the_run_stops_saved_and_goes_on_as_if_never_told(folder, name):
    fault, saved = STOPS[name]
    stopped, resumed = outcome(folder, f"{name}_stopped"), outcome(folder, name)
    assert stopped["codes"] == [STOPPED, STOPPED], stopped["output"][-2000:]
    told = fault.get("signals") or fault.get("kill") or [0]
    told_signal = "SIGUSR1" if "SIGUSR1" in str(told) else "SIGTERM"
    assert f"StoppedBySignal: {told_signal}: stopped after step {saved}, saved in" in stopped["output"]
    own_log = (folder / f"{name}_stopped.rank{told[0]}.log").read_text()
    assert (
        own_log.count(f"STOPPING simpo_megatron rank {told[0]}: {told_signal} received; stopping after this step") == 1
    )
    assert resumed["codes"] == [0, 0], resumed["output"][-2000:]
    assert f"resume    from {folder / name}/iter_{saved:07d}: step {saved}" in resumed["output"]
    check_end(folder, name)


def test_a_save_that_outlasts_the_grace_is_lost_and_the_periodic_one_before_it_continues(folder):
    killed, resumed = outcome(folder, "too_slow_killed"), outcome(folder, "too_slow")
    assert killed["codes"] == [-signal.SIGKILL] * 2, killed["output"][-2000:]
    assert resumed["codes"] == [0, 0], resumed["output"][-2000:]
    assert "resume    ignored iter_0000003.tmp-" in resumed["output"], "the save had begun"
    assert f"resume    from {folder / 'too_slow'}/iter_0000002: step 2" in resumed["output"]
    check_end(folder, "too_slow")


def test_a_second_signal_ends_the_process_at_once_and_what_was_saved_before_is_whole(folder):
    assert outcome(folder, "told_twice")["codes"][1] == 128 + signal.SIGINT
    said = (folder / "told_twice.rank1.log").read_text()
    assert f"SIGINT, the second signal: ended at once; {folder}/told_twice/iter_0000001" in said.replace(
        "stopped between steps; the last checkpoint is ", ""
    )
    assert [entry.name for entry in (folder / "told_twice").glob("iter_*")] == ["iter_0000001"]


def test_a_run_that_saves_nothing_stops_and_says_that_nothing_is_kept(folder):
    unsaved = outcome(folder, "unsaved")
    assert unsaved["codes"] == [STOPPED, STOPPED]
    assert "stopped after step 2, nothing is kept: no --save" in unsaved["output"]
