"""Every record reaches its places: valid JSON on disk at once, one readable line in the terminal."""

import io
import json
import re
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from simpo_megatron.config import config_from, read_yaml
from simpo_megatron.errors import ConfigError
from simpo_megatron.reporting.loggers import (
    JsonLines,
    Steady,
    WeightsAndBiases,
    check_sinks,
    open_run_log,
)
from simpo_megatron.reporting.metric_names import evaluation_metric, set_prefix
from simpo_megatron.reporting.terminal import Terminal

STEP = {
    "loss": 0.6931,
    "rewards/chosen": -1.203,
    "rewards/rejected": -1.224,
    "rewards/margins": 0.021,
    "rewards/accuracies": 0.5625,
    "logps/chosen": -0.6015,
    "logps/rejected": -0.612,
    "response_length/chosen": 101.25,
    "response_length/rejected": 98.0,
    "grad_norm": 1.25,
    "learning_rate": 5e-7,
    "pairs_per_second": 3.14,
    "tokens_per_second": 1234.5,
    "peak_memory_gib": 0.9,
}


def records(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def terminal(*, is_terminal, width=200, train_iters=12, clock=time.monotonic):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=width, color_system=None)
    return Terminal(train_iters, console, clock), console.file


def test_a_record_is_on_disk_when_the_call_returns(tmp_path):
    log = open_run_log(config_from(model="m", save=str(tmp_path / "run")), train_iters=3, is_logging_rank=True)
    with log:
        log.step(1, STEP)
        assert records(tmp_path / "run/metrics.jsonl") == [{"iteration": 1, **STEP}]
        log.evaluation(1, {"eval/rewards/accuracies": 0.5})
    assert records(tmp_path / "run/metrics.jsonl")[1] == {"iteration": 1, "eval/rewards/accuracies": 0.5}


def test_the_resolved_configuration_lies_beside_the_metrics(tmp_path):
    config = config_from(model="m", save=str(tmp_path / "run"), lr=3e-7)
    open_run_log(config, train_iters=3, is_logging_rank=True).__exit__()
    assert read_yaml(tmp_path / "run/config.yaml")["lr"].value == 3e-7


def test_a_rank_that_does_not_log_touches_nothing(tmp_path, capsys):
    config = config_from(model="m", save=str(tmp_path / "run"), tensorboard_dir=str(tmp_path / "tb"))
    with open_run_log(config, train_iters=3, is_logging_rank=False) as log:
        log.step(1, STEP)
        log.evaluation(1, STEP)
        log.say("something")
        log.advance(1)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_numbers_that_json_has_no_word_for_are_written_as_text(tmp_path):
    sink = JsonLines(tmp_path / "m.jsonl")
    sink.write({"iteration": 1, "loss": float("nan"), "grad_norm": float("-inf"), "pair_ids": [1, float("inf")]})
    sink.close()
    assert records(tmp_path / "m.jsonl") == [
        {"iteration": 1, "loss": "nan", "grad_norm": "-inf", "pair_ids": [1, "inf"]}
    ]


def test_a_resumed_run_goes_on_in_the_same_file_after_half_a_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"iteration": 1}\n{"iterat')
    sink = JsonLines(path)
    sink.write({"iteration": 2})
    sink.close()
    assert path.read_text().splitlines() == ['{"iteration": 1}', '{"iterat', '{"iteration": 2}']


def test_the_file_is_closed_when_the_run_fails(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        open_run_log(config_from(model="m", save=str(tmp_path)), train_iters=3, is_logging_rank=True) as log,
    ):
        log.step(1, STEP)
        raise ZeroDivisionError
    assert len(records(tmp_path / "metrics.jsonl")) == 1


def test_a_folder_that_cannot_be_made_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="save: found .*, expected a folder that can be written"):
        open_run_log(config_from(model="m", save=str(tmp_path / "file/run")), train_iters=3, is_logging_rank=True)


def test_a_missing_package_is_a_configuration_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError,
        match=r"wandb_project: found no wandb, expected it to be installed; pip install 'simpo-megatron\[wandb\]'",
    ):
        check_sinks(config_from(model="m", wandb_project="p"))
    check_sinks(config_from(model="m", tensorboard_dir="tb"))


def test_a_run_on_weights_and_biases_has_its_folders_name_its_options_and_every_number(monkeypatch):
    told = []
    run = SimpleNamespace(log=lambda numbers, step: told.append((step, numbers)), finish=lambda: told.append("end"))
    package = SimpleNamespace(init=lambda **options: told.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", package)
    sink = WeightsAndBiases("p", config_from(model="m", save="runs/mine", lr=3e-7))
    sink.write({"iteration": 2, "loss": 0.5, "pair_ids": [1], "done": True})
    sink.close()
    options, step, end = told
    assert (options["project"], options["name"], options["config"]["lr"]) == ("p", "mine", 3e-7)
    assert step == (2, {"loss": 0.5}) and end == "end"


def test_tensorboard_gets_every_number_and_no_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_run_log(
        config_from(model="m", tensorboard_dir=str(tmp_path)), train_iters=3, is_logging_rank=True
    ) as log:
        log.step(1, {**STEP, "pair_ids": "abc", "done": True})
        log.evaluation(1, {"eval/loss": 0.5})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {*STEP, "eval/loss"}
    (loss,) = events.Scalars("loss")
    assert (loss.step, round(loss.value, 4)) == (1, 0.6931)


def test_a_step_is_one_plain_line_where_nothing_can_be_redrawn():
    shown, file = terminal(is_terminal=False)
    for iteration in (1, 2):
        shown.write({"iteration": iteration, **STEP})
    shown.close()
    heading, first, second = file.getvalue().splitlines()
    assert heading.split()[:4] == ["step", "loss", "margin", "accuracy"]
    assert "1/12" in first and "0.6931" in first and "+0.0210" in first and "56.2%" in first
    assert "-1.203/-1.224" in first and "1,234" in first and "0.9 GiB" in first
    assert "2/12" in second and len(heading) == len(first) == len(second) <= 160
    assert "MFU" not in heading and "reserved" not in heading, "this machine has none"
    assert "\x1b" not in file.getvalue()


def test_a_gpus_step_line_has_its_utilization_its_memory_and_what_is_out_of_the_ordinary():
    shown, file = terminal(is_terminal=False)
    of_gpu = {"tflops_per_gpu": 412.34, "mfu": 0.417, "reserved_memory_gib": 70.2, "allocation_retries": 0}
    seconds = {"data_seconds": 0.021, "forward_backward_seconds": 1.712, "optimizer_seconds": 0.06}
    shown.write({"iteration": 1, **STEP, **of_gpu, **seconds})
    slow = {"allocation_retries": 3, "slowest_rank": 5, "slowest_rank_behind": 0.142}
    shown.write({"iteration": 2, **STEP, **of_gpu, **seconds, **slow})
    shown.close()
    heading, first, second = file.getvalue().splitlines()
    for name, cell in (("TFLOP/s", "412"), ("MFU", "42%"), ("reserved", "70.2 GiB")):
        end = heading.index(name) + len(name)
        assert first[:end].endswith(" " + cell), f"{cell} stands under {name}"
    assert " 0.02/1.71/0.06 " in first and len(heading) == len(first) <= 180
    assert second.endswith("; rank 5 is 14% behind; 3 allocation retries")


def test_a_narrow_terminal_shows_fewer_columns_and_never_wraps():
    shown, file = terminal(is_terminal=True, width=60)
    shown.write({"iteration": 1, **STEP})
    shown.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    heading, line = (line for line in plain.splitlines() if "0.6931" in line or "loss" in line)
    assert len(heading) == len(line) <= 60
    assert "GiB" not in plain and "56.2%" in line
    assert heading.split()[-2:] == ["elapsed", "left"], "what is dropped is left of them"


def test_step_lines_end_with_elapsed_and_remaining_time():
    now = [1000.0]
    shown, file = terminal(is_terminal=False, clock=lambda: now[0])
    now[0] += 30
    shown.write({"iteration": 0, "eval/loss": 0.7})
    for iteration in range(1, 5):
        now[0] += 900
        shown.advance(iteration)
    shown.write({"iteration": 4, **STEP})
    now[0] += 8 * 900
    shown.write({"iteration": 12, **STEP})
    lines = [line.split()[-2:] for line in file.getvalue().splitlines()[1:]]
    assert lines == [["elapsed", "left"], ["1:00:30", "2:00:00"], ["3:00:30", "0:00:00"]]


def test_the_remaining_time_of_a_resumed_run_is_that_of_the_steps_taken_since():
    now = [0.0]
    shown, file = terminal(is_terminal=False, train_iters=100, clock=lambda: now[0])
    now[0] += 6
    shown.write({"iteration": 91, **STEP})
    assert file.getvalue().splitlines()[-1].split()[-2:] == ["0:00:06", "0:00:54"]


def test_a_progress_bar_counts_the_steps_of_a_terminal():
    shown, file = terminal(is_terminal=True)
    shown.write({"iteration": 5, **STEP})
    shown.close()
    assert "5/12" in file.getvalue() and "training" in file.getvalue()


def test_a_metric_that_is_missing_leaves_a_dash():
    shown, file = terminal(is_terminal=False)
    shown.write({"iteration": 1, "loss": float("nan")})
    shown.close()
    line = file.getvalue().splitlines()[1]
    assert "nan" in line and line.split().count("-") == 9


def test_an_evaluation_is_a_line_of_its_own():
    shown, file = terminal(is_terminal=False)
    shown.write({"iteration": 0, "eval/loss": 0.7, "eval/rewards/margins": -0.01, "eval/rewards/accuracies": 0.5})
    shown.close()
    assert file.getvalue() == "validation pairs after 0 steps: loss 0.7000, margin -0.0100, accuracy 50.0%\n"


def test_each_named_set_has_a_line_of_its_own():
    shown, file = terminal(is_terminal=False)
    numbers = {"eval/loss": 0.7, "eval/help/loss": 0.7, "eval/harmless-2/loss": 0.8}
    shown.write({"iteration": 4, **numbers, "eval/harmless-2/rewards/accuracies": 0.25})
    shown.close()
    assert file.getvalue().splitlines() == [
        "validation pairs help after 4 steps: loss 0.7000",
        "validation pairs harmless-2 after 4 steps: loss 0.8000, accuracy 25.0%",
    ]


@pytest.mark.parametrize("name", ["", "help", "harmless-2"])
@pytest.mark.parametrize("metric", [*STEP, "repetition", "logps/chosen_displacement"])
def test_a_metric_of_validation_pairs_says_of_which_set_it_is(name, metric):
    assert evaluation_metric(set_prefix(name) + metric) == (name, metric)
    assert evaluation_metric(metric) is None


def test_what_is_said_is_not_taken_for_markup():
    shown, file = terminal(is_terminal=False)
    shown.say("runs/[red]x")
    shown.close()
    assert file.getvalue() == "runs/[red]x\n"


def test_a_sink_that_fails_costs_a_warning_and_its_records(tmp_path):
    """Here the metrics of a run, where a folder has taken their place."""
    said = []
    (tmp_path / "metrics.jsonl").mkdir()
    sink = Steady(JsonLines(tmp_path / "metrics.jsonl"), said.append)
    for iteration in (1, 2):
        sink.write({"iteration": iteration, "loss": 1.0})
    sink.close()
    assert len(said) == 2 and "metrics.jsonl: could not be written ([Errno 22] it is no file" in said[0]
    assert said[1].endswith("metrics.jsonl: 2 records were lost")
    (tmp_path / "metrics.jsonl").rmdir()
    sink = Steady(JsonLines(tmp_path / "metrics.jsonl"), said.append)
    sink.write({"iteration": 3, "loss": 1.0})
    sink.close()
    assert len(said) == 2 and json.loads((tmp_path / "metrics.jsonl").read_text())["iteration"] == 3
