"""Ranks tell each other what they save twice, and then no more, until one of them holds something else."""

import json
from pathlib import Path

from ranks import run_ranks

WORKER = Path(__file__).with_name("save_strategy_worker.py")
WRITTEN, PLANNED = ["gather_object"], ["gather_object"] * 2
FIRST = ["all_gather_object"] * 3 + PLANNED


def test_who_writes_what_is_told_at_two_saves_and_anew_when_a_rank_holds_something_else(tmp_path):
    run_ranks(WORKER, 2, str(tmp_path), timeout=120)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [told for told, _ in found] == [FIRST, PLANNED, WRITTEN, WRITTEN, FIRST, PLANNED, WRITTEN]
        assert [is_whole for _, is_whole in found] == [True] * 7
