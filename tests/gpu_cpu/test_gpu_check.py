"""The checks of the GPU path, rehearsed on the CPU at tiny size, and what becomes of one that hangs or dies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from odd_checks import dies, hangs, passes, raises

from simpo_megatron.atomic import scratch_folder
from simpo_megatron.commands import gpu_check
from simpo_megatron.gpu_check import large_model, whole_runs
from simpo_megatron.gpu_check.listing import CHECKS, START_SECONDS
from simpo_megatron.gpu_check.runner import _Worker, run_checks
from simpo_megatron.gpu_check.user_runs import last_line
from simpo_megatron.gpu_check.verdict import Check, CheckSetting

pytestmark = pytest.mark.processes


def test_every_check_passes_at_tiny_size_and_has_a_line(tmp_path):
    out = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "simpo_megatron", "gpu-check", "--rehearse", "--minutes", "30", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    results = {result["check"]: result for result in map(json.loads, out.read_text().splitlines())}
    assert done.returncode == 0, [r for r in results.values() if r["result"] == "FAIL"] or done.stderr[-3000:]
    assert list(results) == [check.name for check in CHECKS]
    first, *_, last = done.stdout.splitlines()
    assert first.startswith(f"{len(CHECKS)} checks, at most 1800 s") and f"{len(CHECKS)} checks, 0 failed" in last
    # Triton's interpreter is not in every environment, and what is missing is named.
    assert {name for name, result in results.items() if result["result"] == "SKIP"} <= {"K1"}
    assert all(result["value"] and result["seconds"] < 300 for result in results.values())
    assert len(results["C1"]["details"]["errors"]) == 12
    assert {"ours ms", "TRL ms", "megatron CE ms"} <= set(results["C3"]["details"]["shapes"]["tiny"])
    assert "CCE" in results["C3"]["details"]["missing"]
    printed = out.with_suffix(".log").read_text()
    assert "--- E1" in printed and "On 96 validation pairs" in printed, "what runs print is kept as well"


def test_all_checks_together_have_eight_minutes_and_stand_in_the_documentation():
    total = START_SECONDS + sum(check.seconds for check in CHECKS)
    page = (Path(__file__).parents[2] / "docs" / "reference" / "gpu_check.md").read_text()
    rows = re.findall(r"^\| ([A-Z]\d) \| (.+?) \| .+ \| (\d+) \|$", page, re.M)
    assert rows == [(check.name, check.title, str(check.seconds)) for check in CHECKS]
    said = f"All together, with {START_SECONDS} seconds for the start, take at most {total} seconds."
    assert total <= 8 * 60 and said in " ".join(page.split())


def processes_of(folder: Path) -> list[str]:
    """The command lines of the processes that name `folder`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(file.read_text(errors="replace"))
    return [text for text in found if str(folder) in text]


def run(folder: Path, *functions, seconds: float = 600) -> tuple[int, list[dict], list[str]]:
    """(how many failed, the results, the lines) of checks that do these."""
    checks = [Check(f"T{number}", "a test", 20, function) for number, function in enumerate(functions)]
    said: list[str] = []
    with (folder / "results.jsonl").open("w") as out:
        setting = CheckSetting(folder=folder, log=folder / "log.txt")
        num_failed = run_checks(checks, setting, out, seconds, said.append)
    return num_failed, [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()], said


def test_a_check_that_hangs_dies_or_raises_fails_alone(tmp_path, monkeypatch):
    num_failed, results, said = run(tmp_path, passes, raises, dies, passes, hangs, passes)
    assert [result["result"] for result in results] == ["PASS", "FAIL", "FAIL", "PASS", "FAIL", "PASS"]
    assert num_failed == 3 and len(said) == 6
    assert results[0]["details"] == {"error": "Infinity"}, "a word, for JSON has no such number"
    assert results[1]["value"] == "ValueError: a sentence" and "exit code 3" in results[2]["value"]
    assert results[4]["value"] == "no verdict after 20 s" and 20 <= results[4]["seconds"] < 60
    assert len({results[place]["value"] for place in (0, 3, 5)}) == 3, "each failure but one cost a process"
    assert processes_of(tmp_path) == [], "what a check started ends with it"
    assert "ValueError: a sentence\nand more" in (tmp_path / "log.txt").read_text()


def test_of_a_killed_command_results_stay_nothing_runs_on_and_the_next_one_removes_its_folder(tmp_path):
    script = (
        "import sys; from pathlib import Path; import odd_checks\n"
        "from simpo_megatron.atomic import scratch_folder\n"
        "from simpo_megatron.gpu_check.runner import run_checks\n"
        "from simpo_megatron.gpu_check.verdict import Check, CheckSetting\n"
        "if __name__ == '__main__':\n"
        "    folder = Path(sys.argv[1])\n"
        "    checks = [Check(str(n), '', 200, f) for n, f in enumerate((odd_checks.passes, odd_checks.hangs))]\n"
        "    with scratch_folder(folder / 'work') as work:\n"
        "        setting = CheckSetting(folder=work, log=work / 'log.txt')\n"
        "        run_checks(checks, setting, (folder / 'out').open('w'), 600, print)\n"
    )
    (tmp_path / "script.py").write_text(script)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    running = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)], env=os.environ | {"PYTHONPATH": path}
    )
    deadline = time.monotonic() + 120
    while not any("time.sleep" in text for text in processes_of(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    with scratch_folder(tmp_path / "work"):
        assert len(list(tmp_path.glob("work.tmp-*"))) == 2, "that of a living command stays"
    running.kill()
    running.wait()
    while processes_of(tmp_path) and time.monotonic() < deadline + 20:
        time.sleep(0.2)
    assert processes_of(tmp_path) == []
    (line,) = (tmp_path / "out").read_text().splitlines()
    assert json.loads(line)["result"] == "PASS"
    (left,) = tmp_path.glob("work.tmp-*")
    assert (left / "log.txt").exists()
    with scratch_folder(tmp_path / "work") as own:
        assert list(tmp_path.glob("work.tmp-*")) == [own]


def test_checks_that_the_time_does_not_reach_are_skipped_by_name(tmp_path):
    num_failed, results, _ = run(tmp_path, passes, passes, seconds=3)
    assert num_failed == 0
    assert [(r["check"], r["result"], r["value"]) for r in results] == [
        ("T0", "SKIP", "out of time"),
        ("T1", "SKIP", "out of time"),
    ]


def test_no_process_is_started_when_the_time_is_over(tmp_path):
    worker = _Worker(CheckSetting(folder=tmp_path, log=tmp_path / "log.txt"))
    assert worker.run(Check("T0", "a test", 20, passes), 20, time.monotonic() - 1).result == "SKIP"
    assert worker._process is None


def large_run(folder: Path, *, steps: int, pairs_per_second: float = 32) -> CheckSetting:
    """A setting on a GPU in which the run of the large model has left steps and, of one, 0.9 s of kernels."""
    (folder / "large" / "profile").mkdir(parents=True)
    lines = [{"iteration": n + 1, "grad_norm": 1.0, "pairs_per_second": pairs_per_second} for n in range(steps)]
    (folder / "large" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kernels = [{"cat": "kernel", "name": "k", "ts": 4e5 * n, "dur": 5e5} for n in range(2)]
    kernels += [{"cat": "gpu_memset", "name": "m", "ts": 1e5, "dur": 1e5}]
    step = {"cat": "user_annotation", "name": "step 9", "ts": 0, "dur": 9e6}
    trace = {"traceEvents": [step, {"cat": "cpu_op", "name": "mm", "ts": 0, "dur": 9e6}, *kernels]}
    (folder / "large" / "profile" / "rank0000.1.pt.trace.json").write_text(json.dumps(trace))
    return CheckSetting(folder=folder, log=folder / "log.txt")


@pytest.mark.parametrize(("pairs_per_second", "result"), [(34, "PASS"), (32, "FAIL")])
def test_a_gpu_is_busy_by_its_kernels_and_the_time_of_steps_without_the_profiler(pairs_per_second, result, tmp_path):
    """0.9 s of kernels in steps of 32 pairs: 96 % of them at 34 pairs a second, 90 % at 32."""
    verdict = large_model.measure_occupation(large_run(tmp_path, steps=12, pairs_per_second=pairs_per_second))
    assert verdict.result == result and f"{0.9 * pairs_per_second / 32:.0%} of a step" in verdict.value
    assert verdict.details["top_kernels_ms"] == {"k": 1000.0, "m": 100.0}


@pytest.mark.parametrize(("code", "steps"), [(0, 12), (-9, 4), (1, 12)])
def test_a_large_run_that_ends_otherwise_than_after_its_steps_fails(code, steps, monkeypatch, tmp_path):
    setting = large_run(tmp_path, steps=steps)
    monkeypatch.setattr(large_model, "model_options", lambda _: [])
    monkeypatch.setattr(large_model, "train", lambda *_: subprocess.CompletedProcess([], code, "a reason"))
    verdict = large_model.measure_steps(setting)
    assert verdict.result == "FAIL" and verdict.value == f"exit code {code} after {steps} steps: a reason"


def test_the_reason_of_a_run_is_its_error_and_not_what_was_printed_after_it():
    printed = "step 1\nERROR simpo_megatron: data: found none\n\nW0101 a warning at the end\n"
    assert last_line(subprocess.CompletedProcess([], 3, printed)) == "ERROR simpo_megatron: data: found none"
    assert last_line(subprocess.CompletedProcess([], 1, "step 1\nRuntimeError: a reason\n")) == "RuntimeError: a reason"
    assert last_line(subprocess.CompletedProcess([], 1, "")) == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "gpu-check: found no GPU, expected one; --rehearse"),
        (["--only", "Z9"], "only: found 'Z9', expected names of A1"),
    ],
)
def test_without_a_gpu_and_for_an_unknown_name_it_is_one_line(arguments, said, capsys, tmp_path):
    assert gpu_check.main([*arguments, "--out", str(tmp_path / "out.jsonl")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


@pytest.fixture
def ended(monkeypatch):
    """Has runs end with these exit codes, one after the other, and no demo written for them."""

    def arrange(*codes):
        left = iter(codes)
        ends = lambda *_, **__: subprocess.CompletedProcess([], next(left), "")  # noqa: E731
        monkeypatch.setattr(whole_runs, "train", ends)
        monkeypatch.setattr(whole_runs, "train_side_by_side", lambda _, *runs: [ends() for _ in runs])
        monkeypatch.setattr(whole_runs, "_small", lambda _: ())

    return arrange


@pytest.mark.parametrize(("code", "result"), [(5, "PASS"), (0, "FAIL"), (1, "FAIL")])
def test_another_exit_code_than_the_documented_one_fails(code, result, ended, tmp_path):
    ended(code)
    assert (
        whole_runs.check_ends(CheckSetting(folder=tmp_path, log=tmp_path / "log.txt", rehearse=True)).result == result
    )


@pytest.mark.parametrize("codes", [(0, 0, 0), (0, 75, 1), (4, 75, 0)])
def test_a_resume_that_ends_otherwise_fails_with_the_codes(codes, ended, tmp_path):
    ended(*codes)
    verdict = whole_runs.check_resume(CheckSetting(folder=tmp_path, log=tmp_path / "log.txt", rehearse=True))
    assert verdict.result == "FAIL" and str(list(codes)) in verdict.value


@pytest.mark.parametrize(("resumed", "result"), [(0.5, "PASS"), (0.5000001, "FAIL")])
def test_a_resume_that_is_off_by_a_bit_fails(resumed, result, ended, monkeypatch, tmp_path):
    ended(0, 75, 0)
    ends = {"straight": 0.5, "stopped": resumed}
    record = lambda folder: [{"iteration": 4, "loss": ends[folder.name], "grad_norm": 1.0, "rewards/margins": 0.0}]  # noqa: E731
    monkeypatch.setattr(whole_runs, "records", record)
    assert (
        whole_runs.check_resume(CheckSetting(folder=tmp_path, log=tmp_path / "log.txt", rehearse=True)).result == result
    )
