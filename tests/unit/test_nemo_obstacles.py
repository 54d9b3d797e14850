"""All obstacles of a NeMo file are told at once, each with a line in the file's spelling; its command takes flags."""

from __future__ import annotations

import pytest
from nemo_configs import CONFIGS, MEGATRON, load, obstacles

from simpo_megatron.errors import ConfigError, report_error
from simpo_megatron.nemo import load_nemo_command
from simpo_megatron.nemo.rules import Obstacle


def test_all_obstacles_are_told_at_once_and_their_remedies_go_into_the_command():
    messages, remedies = obstacles("rl_base.yaml", f"{MEGATRON}optimizer.lrr=1", f"{MEGATRON}peft.dim=8")
    assert remedies == [
        "policy.dtensor_cfg.enabled=false",
        "policy.megatron_cfg.enabled=true",
        f"{MEGATRON}optimizer.lrr=null",
        f"{MEGATRON}peft.enabled=true",
        "simpo.data=FILE",
        "simpo.valid_data=FILE",
    ]
    assert messages[0].endswith("(and 5 more, below)")
    assert f"found unknown key '{MEGATRON}optimizer.lrr', expected one of NeMo-RL such as" in "".join(messages)
    config, report = load("rl_base.yaml", f"{MEGATRON}optimizer.lrr=1", f"{MEGATRON}peft.dim=8", *remedies)
    assert (config.lora.lora_rank, config.data.data) == (8, ("FILE",))
    assert report.ignored[f"{MEGATRON}optimizer.lrr"] == "null, which asks for nothing"


def test_values_out_of_range_are_told_with_the_other_obstacles_each_with_its_line():
    wrong = (f"{MEGATRON}optimizer.lr=-1", f"{MEGATRON}optimizer.clip_grad=-3", "policy.train_global_batch_size=0")
    messages, remedies = obstacles("rl_megatron.yaml", *wrong, "policy.unheard=1", "simpo.tp=0")
    assert len(messages) == len(remedies) == 5
    assert remedies == [
        "policy.unheard=null",
        "simpo.global_batch_size=N",
        f"{MEGATRON}optimizer.lr=X",
        f"{MEGATRON}optimizer.clip_grad=X",
        "simpo.tp=N",
    ]
    assert "policy.megatron_cfg.optimizer.lr: lr: found -1.0" in "".join(messages)


def test_what_is_refused_of_an_option_whose_value_is_refused_already_is_not_told():
    messages, _ = obstacles("rl_megatron.yaml", f"{MEGATRON}tensor_model_parallel_size=two")
    assert len(messages) == 1, messages


@pytest.mark.parametrize(
    ("refused", "line"),
    [
        ("tensor_model_parallel_size: found 3, expected a divisor", f"{MEGATRON}tensor_model_parallel_size=N"),
        ("max_length: found 1024, expected at most 512", "simpo.max_length=N"),
        ("fp8_recipe: found 'blockwise', expected a CUDA device", f"{MEGATRON}fp8_cfg.enabled=null"),
        ("sequence_parallel: found True, expected nothing", "simpo.sequence_parallel=false"),
        ("use_distributed_optimizer: found True, expected", f"{MEGATRON}optimizer.use_distributed_optimizer=false"),
        ("clip_grad: found 1.0, and a flag has set it", None),
        ("pairs/train.jsonl:1: found no JSON", None),
    ],
)
def test_what_model_and_machine_refuse_is_answered_in_the_files_spelling(refused, line):
    argv = ["--nemo-config", str(CONFIGS / "rl_megatron.yaml"), "--clip-grad", "1"]
    error = ConfigError(refused)
    with pytest.raises(ConfigError), load_nemo_command(argv).spelling.told():
        raise error
    assert error.details == (("to go on, add these behind the file's name:", f"  {line}") if line else ())


def test_details_are_printed_below_the_line_with_what_a_terminal_obeys_escaped(capsys):
    error = ConfigError("first (and 1 more, below)")
    error.details = ("  second: \x1b[2J", "  a=b")
    assert report_error(error) == 2
    assert capsys.readouterr().err.splitlines() == [
        "ERROR simpo_megatron: first (and 1 more, below)",
        "  second: \\x1b[2J",
        "  a=b",
    ]


def test_the_command_takes_flags_beside_the_file():
    command = load_nemo_command(
        ["dpo.seed=3", "--nemo-config", str(CONFIGS / "rl_megatron.yaml"), "dpo.max_num_steps=9", "--resume", "none",
         "--lr=1e-6", "--data", "a", "b"]
    )  # fmt: skip
    config = command.config
    assert (config.run.seed, config.optimizer.train_iters, config.optimizer.lr) == (3, 9, 1e-6)
    assert (config.run.resume, config.data.data, command.only_explains) == ("none", ("a", "b"), False)
    assert f"  ignored     {MEGATRON}optimizer.lr" not in "\n".join(command.lines)
    explained = load_nemo_command(["--nemo-config", str(CONFIGS / "rl_megatron.yaml"), "--explain-config"])
    assert explained.only_explains and any("apply_rope_fusion" in line for line in explained.lines)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--nemo-config"], "expected at least one argument"),
        (["--nemo-config", "a.yaml", "--config", "b.yaml"], "found both --config and --nemo-config"),
        (
            ["--nemo-config", "a.yaml", "--lrr", "1"],
            "found unknown argument '--lrr', expected an option; did you mean '--lr'",
        ),
    ],
)
def test_mistakes_in_the_command(argv, expected):
    with pytest.raises(ConfigError, match=expected):
        load_nemo_command(argv)


def test_an_obstacle_keeps_its_remedies():
    assert Obstacle("message", "a=b", "c=d").remedies == ("a=b", "c=d")
