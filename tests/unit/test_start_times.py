"""The phases of a start: each ends once, they add up to the whole, and benchmarks read the line that a run prints."""

import sys
import time
from pathlib import Path

import pytest

from simpo_megatron.training.start import start_times

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "benchmarks"))
import save
import scaling


@pytest.fixture
def ended(monkeypatch):
    """The times shortly before and after the last phase has ended."""
    monkeypatch.setattr(start_times, "_ends", {})
    for phases in scaling.PHASES.values():
        for name in phases:
            time.sleep(0.002)
            before = start_times.since_the_start()
            assert start_times.end_phase(name)
    return before, start_times.since_the_start()


def test_a_phase_ends_once_and_all_add_up_to_the_time_of_this_process(ended):
    found = start_times.phases()
    assert not start_times.end_phase("data"), "the next run of a process starts nothing"
    assert start_times.phases() == found
    for before, of_phases, after in zip(ended[0], zip(*found.values(), strict=True), ended[1], strict=True):
        assert before - 1e-6 <= sum(of_phases) <= after + 1e-6
    assert all(times.seconds > 0.001 for times in found.values())


def test_benchmarks_read_the_printed_line(ended):
    line = start_times.describe_start(every_phase=True)
    ((seconds, cpu_seconds, phases),) = scaling._START.findall(line)
    assert save.FIRST_STEP.findall(line) == [cpu_seconds]
    names = [name.strip() for name, _ in scaling._PHASE.findall(phases)]
    assert names == [name for parts in scaling.PHASES.values() for name in parts]
    last = list(start_times._ends.values())[-1]
    assert (seconds, cpu_seconds) == (f"{last.seconds:.1f}", f"{last.cpu_seconds:.1f}")
    short = start_times.describe_start(every_phase=False)
    assert short.startswith(line[: line.index(": imports ")] + "; longest phase: ") and len(short) < 140


def test_a_table_replaces_the_one_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{scaling._BEGIN}\n\n| old |\n\n{scaling._END}\n\nbehind\n")
    scaling.write_table(page, ["| new |", "|---|"])
    written = page.read_text()
    assert written == f"before\n\n{scaling._BEGIN}\n\n| new |\n|---|\n\n{scaling._END}\n\nbehind\n"
    scaling.write_table(page, ["| new |", "|---|"])
    assert page.read_text() == written
    with pytest.raises(SystemExit, match="found no lines"):
        scaling.write_table(tmp_path / "page.md" if page.write_text("none") else page, [])
