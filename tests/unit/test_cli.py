"""The command: light to start, one line for a mistake, a screen of help for each command, the tools the same."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from ranks import REPOSITORY

from simpo_megatron import __version__, cli

TOOLS = {
    "plan": "plan",
    "inspect": "inspect_data",
    "convert": "convert_hf",
    "verify": "verify_checkpoint",
    "merge": "merge_checkpoints",
    "fp8-check": "fp8_check",
}
TAKE_TRAINER_OPTIONS = {"train", "sweep", "plan", "inspect", "fp8-check"}


def text_of(capsys, *argv: str) -> str:
    """The output of `simpo argv`, which must exit with 0."""
    try:
        code = cli.main(argv)
    except SystemExit as ended:
        code = ended.code
    assert code in (0, None)
    return capsys.readouterr().out


def test_help_names_every_command_and_the_version_is_the_packages(capsys):
    helps = [text_of(capsys, *argv) for argv in ([], ["--help"], ["-h"])]
    assert helps[0] == helps[1] == helps[2]
    for name in cli.COMMANDS:
        assert f"\n  {name} " in helps[0]
    assert text_of(capsys, "--version") == f"simpo {__version__}\n"


NEAREST = {
    "trian": "; did you mean train?",
    "fp8_check": "; did you mean fp8-check?",
    "x": "families, report, fp8-check, gpu-check",
}


@pytest.mark.parametrize("asked", NEAREST)
def test_an_unknown_command_is_one_line_with_the_nearest_name(capsys, asked):
    assert cli.main([asked, "--help"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"command: found '{asked}', expected train, sweep" in line and line.endswith(NEAREST[asked])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_everyday_help_of_a_command_fits_on_a_screen(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    printed = text_of(capsys, command, "--help")
    assert "--help-all" in printed
    assert f"simpo {command} " in printed
    assert len(printed.splitlines()) <= 45


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_all_shows_the_trainers_options_where_they_may_follow(capsys, command):
    printed = text_of(capsys, command, "--help-all")
    assert ("--max-record-bytes" in printed) == (command in TAKE_TRAINER_OPTIONS)


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - {"train"}))
def test_a_mistake_on_the_command_line_is_one_line(capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--pairs", "--gpus"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ERROR simpo_megatron: command line: ") and line.endswith(f"see simpo {command} --help")


TOO_LONG = "x" * 300  # for a file's name


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--data", "demo", "--model", TOO_LONG],
        ["train", "--data", "demo", "--model", "demo", "--adapter", TOO_LONG],
        ["train", "--config", TOO_LONG],
        ["convert", "hf-to-mcore", TOO_LONG, "out"],
        ["inspect", "--data", "demo", "--model", TOO_LONG],
        ["report", TOO_LONG],
    ],
)
def test_a_path_that_no_file_can_have_is_one_line(capsys, argv):
    assert cli.main(argv) in (2, 4)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ERROR simpo_megatron") and "expected" in line


def test_a_path_that_the_system_refuses_is_one_line(capsys, monkeypatch):
    def refuse(arguments, prog):
        raise PermissionError(13, "Permission denied", "/some/folder")

    monkeypatch.setattr("simpo_megatron.commands.report.main", refuse)
    assert cli.main(["report", "/some/folder"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ERROR simpo_megatron: /some/folder: cannot be used (Permission denied), expected")


@pytest.mark.parametrize("command", TOOLS)
def test_a_tool_is_the_same_function_in_a_file_of_a_few_lines(command):
    tool = importlib.import_module(f"tools.{TOOLS[command]}")
    assert tool.main is importlib.import_module(f"simpo_megatron.commands.{command.replace('-', '_')}").main
    assert len((REPOSITORY / "tools" / f"{TOOLS[command]}.py").read_text().splitlines()) < 12


def test_public_names_are_listed_and_others_are_not_there():
    import simpo_megatron

    assert set(simpo_megatron.__all__) <= set(dir(simpo_megatron))
    with pytest.raises(AttributeError, match="has no attribute 'SimPOLoss'"):
        simpo_megatron.SimPOLoss  # noqa: B018


@pytest.mark.processes
def test_the_loss_comes_through_the_public_door_with_torch_alone():
    program = (
        "import sys; from simpo_megatron import SimPOObjective, fused_linear_simpo, fused_linear_log_probs;"
        "assert 'torch' in sys.modules;"
        "print([name for name in ('megatron', 'transformers', 'datasets', 'yaml', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_is_what_its_module_holds():
    import simpo_megatron
    from simpo_megatron import config, convert, data, loss
    from simpo_megatron.training import run

    homes = {"build_preference_dataset": data, "export_hf": convert, "load_config": config, "train": run}
    for name in set(simpo_megatron.__all__) - {"__version__"}:
        assert getattr(simpo_megatron, name) is getattr(homes.get(name, loss), name)
