"""Killed with -9 at any moment of saving, a run resumes from its newest whole checkpoint and ends as if never killed.

"As if never killed": the shard files of the last checkpoint (weights, moments, random states) have the hashes of the
uninterrupted run's, and metrics.jsonl the same lines.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from checkpoints import stored_values
from ranks import run_ranks
from run_records import read_records
from small_runs import small_run

WORKER = Path(__file__).parents[1] / "distributed" / "checkpoint_worker.py"
NUM_STEPS = 4
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2, "hidden_dropout": 0.1},
    "dp2": {"use_distributed_optimizer": True, "bf16": True},
}
LAYOUTS |= {f"{name}_async": {**layout, "async_save": True} for name, layout in LAYOUTS.items()}
# What is about to happen when the rank dies: layout, rank, event, pattern, which such event; the step resumed from.
MOMENTS = {
    "a_shard_is_opened": ("tp2", 1, "open", r"iter_0000003\.tmp-.*/__1_0\.distcp", 1, 2),
    "a_shard_is_opened_while_training_goes_on": ("dp2_async", 1, "open", r"iter_0000003\.tmp-.*/__1_0\.distcp", 1, 2),
    "the_record_is_opened": ("dp2", 0, "open", r"iter_0000003\.tmp-.*/COMMIT\.json", 1, 2),
    "the_draft_is_renamed": ("dp2", 0, "os.rename", r"iter_0000003\.tmp-", 1, 2),
    "the_pointer_is_replaced": ("tp2", 0, "os.rename", r"latest_checkpointed_iteration\.txt\.tmp", 3, 3),
    "an_old_checkpoint_is_removed": ("tp2", 0, "shutil.rmtree", r"iter_0000001\.tmp-", 1, 3),
}
# Random moments are for a long test: SIMPO_RANDOM_KILLS=40.
NUM_RANDOM_KILLS = int(os.environ.get("SIMPO_RANDOM_KILLS", 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    options = {
        **small_run(folder),
        "train_iters": NUM_STEPS,
        "save_interval": 1,
    }
    runs = [{"name": name, "options": {**options, **layout}} for name, layout in LAYOUTS.items()]
    for moment, (layout, *kill, _) in MOMENTS.items():
        runs += killed_and_resumed(folder, moment, {**options, **LAYOUTS[layout]}, kill=kill)
    moments = random.Random(5)
    for number in range(NUM_RANDOM_KILLS):
        seconds = moments.uniform(0.0, 3.0)
        layout = LAYOUTS[random_layout(number)]
        runs += killed_and_resumed(folder, f"random{number}", {**options, **layout}, kill_after_seconds=seconds)
    (folder / "runs.json").write_text(json.dumps(runs))
    run_ranks(WORKER, 1, str(folder), timeout=300 + 120 * NUM_RANDOM_KILLS)
    return folder


def random_layout(number):
    return list(LAYOUTS)[number % len(LAYOUTS)]


def killed_and_resumed(folder, name, options, **kill):
    options = {**options, "save": str(folder / name)}
    killed = {"name": f"{name}_killed", "options": options, "grace_seconds": 0, **kill}
    return [killed, {"name": name, "options": options}]


def last_state(folder, name):
    return stored_values(folder / name / f"iter_{NUM_STEPS:07d}")


def metrics(folder, name):
    return read_records(folder / name / "metrics.jsonl")


def outcome(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def check_end(folder, name, layout):
    """The output of the resumed run, after a check that it ended like the uninterrupted one."""
    result = outcome(folder, name)
    assert result["codes"] == [0, 0], result["output"][-2000:]
    assert last_state(folder, name) == last_state(folder, layout)
    assert metrics(folder, name) == metrics(folder, layout)
    left = sorted(entry.name for entry in (folder / name).glob("*") if entry.is_dir())
    assert left == ["iter_0000003", "iter_0000004"]
    return result["output"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_just_before(folder, moment):
    layout, rank, *_, resumed_from = MOMENTS[moment]
    assert outcome(folder, f"{moment}_killed")["codes"][rank] == -9
    output = check_end(folder, moment, layout)
    assert f"iter_{resumed_from:07d}: step {resumed_from}" in output
    # While training goes on, the rank that lives hears of the death and may have removed the draft before it ends.
    if resumed_from == 2 and not layout.endswith("_async"):
        assert "iter_0000003.tmp-" in output and "never completed" in output


@pytest.mark.slow
@pytest.mark.skipif(not NUM_RANDOM_KILLS, reason="set SIMPO_RANDOM_KILLS to a number of random moments")
@pytest.mark.parametrize("number", range(NUM_RANDOM_KILLS))
def test_killed_at_a_random_moment(folder, number):
    check_end(folder, f"random{number}", random_layout(number))
