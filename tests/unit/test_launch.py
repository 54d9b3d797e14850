"""A mistake in what was asked for costs one line, the right exit code and no collective; missing ranks are started."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from counts import check_counts
from ranks import REPOSITORY

import simpo_megatron.training.loop  # noqa: F401  # where it is first imported, megatron starts a process
from simpo_megatron import parallel
from simpo_megatron.checkpoint.manifest import RECORD_FILE
from simpo_megatron.config import Config, load_config
from simpo_megatron.demo import prepare_demo
from simpo_megatron.errors import CheckpointError, DataError, GateClosed, SimPOError, StoppedByMonitor, StoppedBySignal
from simpo_megatron.training import launch, run
from simpo_megatron.training.start import environment
from simpo_megatron.training.start.early_checks import check_inputs

SCRIPT = "examples/pretrain_simpo.py"


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    """Removes torchrun's variables from the environment, and any process group at the end."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel, "initialize", lambda *_, **__: pytest.fail("a process group was made"))
    monkeypatch.setattr(parallel, "join", lambda *_, **__: pytest.fail("a process group was made"))
    monkeypatch.setattr(torch.distributed.run, "main", lambda _: pytest.fail("ranks were started"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return prepare_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def files(tmp_path, demo):
    """Paths for the arguments below, by name."""
    (tmp_path / "unknown_key.yaml").write_text("model: demo\ndata: demo\nweight_decya: 0.1\n")
    (tmp_path / "broken.yaml").write_text("model: demo\n  data: [demo\n")
    (tmp_path / "nemo.yaml").write_text("trainer: {max_steps: 2}\nmodel: {simpo: {preset: demo}, optim: {lr: 1e-4}}\n")
    (tmp_path / "not_a_model").mkdir()
    description = json.loads((demo.model_dir / "config.json").read_text())
    (tmp_path / "other_family").mkdir()
    (tmp_path / "other_family" / "config.json").write_text(json.dumps({**description, "model_type": "mamba"}))
    return {"tmp": tmp_path, "model": demo.model_dir, "pairs": demo.train_file}


MISTAKES = {
    "unknown key": (
        ["--config", "{tmp}/unknown_key.yaml"],
        {},
        2,
        r"yaml:3: found unknown key 'weight_decya', expected",
    ),
    "unknown flag": (["--lerning-rate", "1"], {}, 2, r"lerning-rate"),
    "bad YAML": (["--config", "{tmp}/broken.yaml"], {}, 2, r"broken.yaml:2"),
    "no configuration file": (["--config", "{tmp}/none.yaml"], {}, 2, r"none.yaml"),
    "value of a wrong type": (["--lr", "fast"], {}, 2, r"lr: found 'fast'|lr.*fast"),
    "heads over tp": (["--tp", "3"], {}, 2, r"tensor_model_parallel_size: found 3, .*divisor of the model's 8"),
    "layers over pp": (["--pp", "3"], {}, 2, r"pipeline_model_parallel_size: found 3, .*4 layers"),
    "ranks over the layout": (
        ["--tp", "2"],
        {"WORLD_SIZE": "3"},
        2,
        r"found 3 ranks, expected a multiple of tp 2 .*nproc",
    ),
    "FP8 without GPU": (["--fp8", "tensorwise", "--bf16"], {}, 2, r"fp8_recipe: .*CUDA device, and none is there"),
    "batch below the ranks": (["--global-batch-size", "2"], {"WORLD_SIZE": "4"}, 2, r"global_batch_size: found 2"),
    "sequence longer than the model": (["--max-length", "4096"], {}, 2, r"max_length: found 4096, .*at most 512"),
    "a model and no data": (["--model", "{model}"], {}, 2, r"data: .*--data FILE"),
    "no NeMo file": (["--nemo-config", "{tmp}/none.yaml"], {}, 2, r"none.yaml: cannot be read"),
    "unknown NeMo key": (["--nemo-config", "{tmp}/nemo.yaml", "model.optm.lr=1"], {}, 2, r"'model.optm.lr', expected"),
    "a flag beside a NeMo file": (["--nemo-config", "{tmp}/nemo.yaml", "--lrr", "1"], {}, 2, r"mean '--lr'"),
    "no such model": (["--model", "{tmp}/none", "--data", "{pairs}"], {}, 4, r"none/config.json: found no such file"),
    "a folder without a model": (["--model", "{tmp}/not_a_model", "--data", "{pairs}"], {}, 4, r"found no such file"),
    "another family": (["--model", "{tmp}/other_family", "--data", "{pairs}"], {}, 2, r"model_type: found 'mamba'"),
    "an export in place of the run": (
        ["--export-hf", "{tmp}/run"],
        {},
        2,
        r"export_hf: found .*/run, where",
    ),
    "an export around the run": (
        ["--save", "{tmp}/new/a", "--export-hf", "{tmp}/new"],
        {},
        2,
        r"export_hf: found .*/new",
    ),
    "two exports in one folder": (
        ["--lora-rank", "2", "--export-hf", "{tmp}/hf", "--export-adapter", "{tmp}/hf"],
        {},
        2,
        r"export_adapter: found .*/hf, where the run or another export is",
    ),
    "no such data": (["--model", "{model}", "--data", "{tmp}/none.jsonl"], {}, 3, r"none.jsonl: found no such file"),
    "no such held-out data": (["--valid-data", "{tmp}/none.jsonl"], {}, 3, r"none.jsonl: found no such file"),
    "no such held-out set": (
        ["--valid-data", "a={pairs}", "b={tmp}/none.jsonl"],
        {},
        3,
        r"none.jsonl: found no such file",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line_and_its_exit_code_before_any_rank_speaks(
    mistake, files, tmp_path, capfd, monkeypatch
):
    arguments, variables, exit_code, expected = MISTAKES[mistake]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    argv = [argument.format(**files) for argument in arguments]
    if "--nemo-config" not in argv:
        argv += ["--data-cache", str(tmp_path / "cache")]
        argv += [] if "--save" in argv else ["--save", str(tmp_path / "run")]
    assert launch.main(argv, SCRIPT) == exit_code
    printed = capfd.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("ERROR simpo_megatron rank 0: ")
    assert printed.out == ""
    assert re.search(expected, line), line


def test_a_run_that_continues_needs_no_weights_of_its_model(tmp_path, demo, damaged_models):
    """A checkpoint replaces them, and the model may be gone since."""
    argv = ["--model", str(damaged_models["no_weights"]), "--data", str(demo.train_file), "--max-length", "512"]
    config = load_config([*argv, "--max-prompt-length", "400", "--save", str(tmp_path / "run")])
    with pytest.raises(CheckpointError, match="found no weights"):
        check_inputs(config)
    committed = tmp_path / "run" / "iter_0000003"
    committed.mkdir(parents=True)
    (committed / RECORD_FILE).touch()
    check_inputs(config)


def test_peers_leave_the_word_to_the_first_rank(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def train(_: Config) -> None:
        raise DataError("pairs.jsonl: no pairs")

    monkeypatch.setattr(run, "train", train)
    assert launch.main(["--tp", "2"], SCRIPT) == 3
    assert capfd.readouterr().err == ""


def test_a_run_that_was_told_to_stop_does_not_call_it_an_error(monkeypatch, capfd):
    def train(_: Config) -> None:
        raise StoppedBySignal("SIGTERM: stopped after step 3")

    monkeypatch.setattr(run, "train", train)
    assert launch.main([], SCRIPT) == 75
    assert capfd.readouterr().err == "STOPPED simpo_megatron rank 0: SIGTERM: stopped after step 3\n"


def test_what_nobody_expected_says_what_it_is_on_the_rank_where_it_happened(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def train(_: Config) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run, "train", train)
    assert launch.main(["--tp", "2"], SCRIPT) == 1
    printed = capfd.readouterr().err
    assert printed.startswith("ERROR simpo_megatron rank 1: unexpected RuntimeError: out of memory\n")
    assert "Traceback" in printed


def test_the_missing_ranks_are_started_here_and_the_whole_command_is_said(tmp_path, monkeypatch, capfd):
    started = []
    monkeypatch.setattr(torch.distributed.run, "main", started.append)
    argv = ["--tp", "2", "--data-cache", str(tmp_path / "a cache")]
    monkeypatch.setattr(run, "train", lambda _: pytest.fail("trained on one rank"))
    assert launch.main(argv, SCRIPT) == 0
    assert started == [["--standalone", "--nproc-per-node", "2", SCRIPT, *argv]]
    (line,) = capfd.readouterr().out.splitlines()
    assert "1 rank runs, the layout needs 2" in line
    assert line.endswith(f"torchrun --nproc-per-node 2 {SCRIPT} --tp 2 --data-cache '{tmp_path / 'a cache'}'")


def test_ranks_that_are_there_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    trained = []
    argv = ["--tp", "2", "--data-cache", str(tmp_path)]
    monkeypatch.setattr(run, "train", trained.append)
    assert launch.main(argv, SCRIPT) == 0
    assert [config.parallel.sizes.tensor for config in trained] == [2]


@pytest.mark.parametrize(("ranks", "expected"), [(1, ["starts"]), (2, ["environment", "cuda", "trains"])])
def test_variables_are_set_by_a_rank_before_it_asks_for_cuda(monkeypatch, tmp_path, ranks, expected):
    """Ranks would take variables of the process that starts them for the user's."""
    seen = []
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(environment, "prepare_environment", lambda _: seen.append("environment"))
    monkeypatch.setattr(launch, "ignore_known_warnings", lambda has_cuda: seen.append("cuda") if ranks > 1 else None)
    monkeypatch.setattr(launch, "_start_local_ranks", lambda *_: seen.append("starts") or 0)
    monkeypatch.setattr(run, "train", lambda _: seen.append("trains"))
    assert launch.main(["--tp", "2", "--data-cache", str(tmp_path)], SCRIPT) == 0
    assert seen == expected


def test_one_rank_alone_is_enough_for_a_layout_of_one(monkeypatch):
    trained = []
    monkeypatch.setattr(run, "train", trained.append)
    assert launch.main([], SCRIPT) == 0
    assert len(trained) == 1


def test_a_nemo_file_is_a_configuration_and_its_keys_are_accounted_for(files, monkeypatch, capfd):
    trained = []
    argv = ["--nemo-config", str(files["tmp"] / "nemo.yaml"), "model.optim.lr=2e-4", "++model.simpo.seed=3"]
    monkeypatch.setattr(run, "train", trained.append)
    assert launch.main(argv, SCRIPT) == 0
    (config,) = trained
    assert (config.optimizer.train_iters, config.optimizer.lr, config.run.seed) == (2, 2e-4, 3)
    printed = capfd.readouterr().out
    assert "NeMo 1 / Aligner configuration, keys: 3 taken, 1 translated, 0 ignored" in printed
    assert "  translated  trainer.max_steps -> train_iters=2\n" in printed


def test_every_error_has_an_exit_code_of_its_own():
    """But for two kinds, which both say that a limit the user set was crossed: one of a run, one of an evaluation."""
    codes = [kind.exit_code for kind in SimPOError.__subclasses__() if kind is not GateClosed]
    assert GateClosed.exit_code == StoppedByMonitor.exit_code
    assert len(set(codes)) == len(codes) and 0 not in codes and 1 not in codes


def test_help_is_not_an_error(capsys):
    with pytest.raises(SystemExit) as ended:
        launch.main(["--help"], SCRIPT)
    assert ended.value.code == 0
    assert "--tp" in capsys.readouterr().out


@pytest.fixture
def damaged_models(tmp_path, demo):
    """Copies of the demo's model by what is wrong with them."""
    folders = {name: tmp_path / name for name in ("no_weights", "half_weights", "no_tokenizer", "experts", "mamba")}
    for folder in folders.values():
        shutil.copytree(demo.model_dir, folder)
    (folders["no_weights"] / "model.safetensors").unlink()
    weights = folders["half_weights"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folders["no_tokenizer"] / "tokenizer.json").unlink()
    config = json.loads((demo.model_dir / "config.json").read_text())
    of_experts = {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None}
    for name, keys in (("experts", of_experts), ("mamba", {"model_type": "mamba"})):
        (folders[name] / "config.json").write_text(json.dumps({**config, **keys}))
    return folders


@pytest.mark.processes
def test_help_and_mistakes_are_told_before_torch_is_imported(tmp_path, demo, damaged_models):
    """Its import takes five times as long as all that precedes it, and megatron's three times as long again."""
    pairs, none = str(tmp_path / "pairs.jsonl"), str(tmp_path / "none")
    Path(pairs).write_text("{}\n")
    (tmp_path / "pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    model = ["--model", str(tmp_path), "--data"]
    asked = {
        "--help": (["--help"], 0),
        "a wrong flag": (["--beat", "3"], 2),
        "a wrong value": (["--lr", "abc"], 2),
        "no model": (["--data", pairs], 2),
        "a model that is not there": (["--model", none, "--data", pairs], 4),
        "data that are not there": ([*model, none], 3),
        "validation data that are not there": (
            [*model, str(tmp_path / "pairs.jsonl"), "--valid-data", "none.jsonl"],
            3,
        ),
        "a pointer to data": ([*model, str(tmp_path / "pointer.jsonl")], 3),
        "a config.json that is none": (["--model", str(tmp_path / "broken"), "--data", pairs], 4),
        "a step that is not there": (["--resume", "7", "--save", none], 4),
        "a file for a folder": (["--save", pairs], 4),
        "an export over other files": (["--export-hf", str(tmp_path)], 4),
        "an export into the run": (["--save", none, "--export-hf", none], 2),
    }
    short = ["--max-length", "512", "--max-prompt-length", "400"]
    of_demo = ["--model", str(demo.model_dir), "--data", str(demo.train_file), *short]
    of_files = {
        "heads over tp": ([*of_demo, "--tp", "3"], 2),
        "layers over pp": ([*of_demo, "--pp", "3"], 2),
        "layers over vpp": ([*of_demo, "--pp", "2", "--vpp", "3"], 2),
        "no experts": ([*of_demo, "--ep", "2"], 2),
        "positions": ([*of_demo, "--max-length", "4096"], 2),
        "another family": ([*of_demo, "--model", str(damaged_models["mamba"])], 2),
        "experts over ep": ([*of_demo, "--model", str(damaged_models["experts"]), "--ep", "4"], 2),
        "no tokenizer": ([*of_demo, "--model", str(damaged_models["no_tokenizer"])], 2),
        "no weights": ([*of_demo, "--model", str(damaged_models["no_weights"])], 4),
        "half of the weights": ([*of_demo, "--model", str(damaged_models["half_weights"])], 4),
        "no record": ([*of_demo, "--valid-data", str(tmp_path / "empty.jsonl")], 3),
        "no JSON": ([*of_demo, "--data", str(tmp_path / "text.jsonl")], 3),
        "no such columns": ([*of_demo, "--data", str(tmp_path / "columns.csv")], 3),
    }
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "text.jsonl").write_text("Dear diary,\n")
    (tmp_path / "columns.csv").write_text("question,good,bad\na,b,c\n")
    script = f"""
import contextlib, io, sys
from simpo_megatron.cli import COMMANDS, main

def code_of(*argv):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return main(argv)
        except SystemExit as ended:
            return ended.code

print([code_of("train", *argv) for argv, _ in {list(asked.values())[:3]!r}])
print([name for name in ("torch", "numpy", "megatron", "transformers", "datasets") if name in sys.modules])
print(len(sys.modules))
print([code_of("train", *argv) for argv, _ in {list((asked | of_files).values())!r}])
print([name for name in ("torch", "megatron", "transformers", "datasets") if name in sys.modules])
print(len(sys.modules))
print(sum(code_of(command, "--help") for command in COMMANDS))
print([name for name in ("torch", "megatron", "transformers", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    codes, loaded, num_modules, all_codes, all_loaded, num_all_modules, *of_all_commands = done.stdout.splitlines()
    assert codes == str([code for _, code in list(asked.values())[:3]])
    assert dict(zip(asked | of_files, json.loads(all_codes), strict=True)) == {
        name: code for name, (_, code) in (asked | of_files).items()
    }
    assert loaded == all_loaded == "[]"
    counts = {"a wrong option": int(num_modules), "a mistake that a file tells": int(num_all_modules)}
    check_counts("modules", counts, may_rise=1 / 7)
    assert of_all_commands == ["0", "[]"], "the help of every command"
