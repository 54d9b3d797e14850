"""Options of a run that are refused, with their place, and the line that says so."""

import re

import pytest
from yaml_configs import refusal

from simpo_megatron.config import config_from, load_config
from simpo_megatron.config.options import option_table
from simpo_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--explain-config"], "found --explain-config, expected --nemo-config FILE with it"),
        (["--nemo-config", "a.yaml"], "found --nemo-config, expected a file of --config"),
    ],
)
def test_flags_of_nemo_files_stand_beside_one_and_in_simpo_train_alone(argv, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(argv)


def test_sections_that_refuse_their_options_are_all_told():
    with pytest.raises(ConfigError) as refused:
        config_from(lr=-1.0, model="m", tensor_model_parallel_size=0, keep_checkpoints=0)
    assert str(refused.value).endswith("(and 2 more, below)")
    assert "tensor_model_parallel_size: found 0" in "".join((str(refused.value), *refused.value.details))


def test_all_mistakes_of_a_file_or_of_the_flags_are_told(tmp_path):
    def told(run):
        with pytest.raises(ConfigError) as refused:
            run()
        return [str(refused.value), *refused.value.details]

    (tmp_path / "run.yaml").write_text("lr: fast\nbetta: 2\nseed: 1\nfp32: true\nbf16: true\n")
    of_file = told(lambda: load_config(["--config", str(tmp_path / "run.yaml")]))
    assert len(of_file) == 3 and of_file[0].endswith("(and 2 more, below)")
    assert [line.partition("run.yaml:")[2][0] for line in of_file] == ["1", "2", "4"]
    of_flags = told(lambda: load_config(["--betta", "2", "--lr", "fast", "--tp", "x"]))
    assert ["--betta" in of_flags[0], "lr: found" in of_flags[1], "parallel_size: found" in of_flags[2]] == [True] * 3
    # Two of one section; and what follows only from the value that was refused is not told.
    of_values = told(lambda: config_from(lr=-1.0, clip_grad=-2.0, tp=0, sequence_parallel=True))
    assert len(of_values) == 3 and not any("sequence_parallel" in line for line in of_values)


@pytest.mark.parametrize(
    "line",
    [
        'lr: "2"',
        "lr: 1e-6x",
        "lr: .nan",
        "lr: nan",
        "lr: .inf",
        "lr: 1e999",
        "lr: true",
        "lr: 12:30",
        "lr: [1e-6]",
        "lr: {value: 1e-6}",
        "lr:",
        "seed: true",
        "seed: 1.0",
        "seed: 1e3",
        "seed: 0x10",
        "seed: 1_000",
        "seed: 2026-01-01",
        "seed: \uff11",
        "bf16: no",
        "bf16: 1",
        'bf16: "true"',
        "lr_decay_style: wsd",
        "data: [[a]]",
        "fp8_recipe: hybrid",
    ],
)
def test_a_value_of_another_type_is_refused_with_its_place_and_the_expected_type(tmp_path, line):
    key = line.split(":")[0]
    expected = option_table()[key].expected
    message = refusal(tmp_path, f"beta: 2.0\n{line}\n")
    assert message.startswith(f"run.yaml:2: {key}: found ") and message.endswith(f"expected {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("beat: 2.5\n", "run.yaml:1: found unknown key 'beat', expected an option; did you mean 'beta'?"),
        (
            "seed: 1\ntensor_parallel_size: 2\n",
            "run.yaml:2: found unknown key 'tensor_parallel_size', expected an option; did you mean",
        ),
        ("_target_: os.system\n", "run.yaml:1: found unknown key '_target_'"),
        ("dpo:\n  seed: 1\n", "run.yaml:1: dpo: found a section, expected options of a run; --nemo-config reads"),
        ("optimizer:\n  lr: 1e-6\n", "run.yaml:1: optimizer: found a section, expected its options without it"),
        ("optimiser:\n  lr: 1e-6\n", "run.yaml:1: found unknown key 'optimiser'"),
        (
            "learning_rate: 1e-6\n",
            "run.yaml:1: found unknown key 'learning_rate', expected an option; did you mean 'lr'?",
        ),
        (
            "num_train_epochs: 1\n",
            "run.yaml:1: found unknown key 'num_train_epochs', expected an option; did you mean 'epochs'?",
        ),
        ("config: other.yaml\n", "run.yaml:1: found unknown key 'config'"),
        ("<<: {lr: 1}\n", "run.yaml:1: found a key that is not a plain name"),
        ("1: 2\n", "run.yaml:1: found a key that is not a plain name"),
        ("? [a]\n: 1\n", "run.yaml:1: found a key that is not a plain name"),
        ("lr: 1e-6\nseed: 2\nlr: 1e-6\n", "run.yaml:3: lr: found twice, expected once; first in run.yaml:1"),
        ("tp: 2\ntensor_model_parallel_size: 2\n", "run.yaml:2: tensor_model_parallel_size: found twice"),
        ("- lr: 1e-6\n", "run.yaml:1: found a sequence, expected lines such as"),
        ("lr\n", "run.yaml:1: found a scalar, expected lines such as"),
        ("", "run.yaml: found an empty file"),
        ("# nothing\n", "run.yaml: found an empty file"),
        ("seed: 1\n\tlr: 1e-6\n", "run.yaml:2: found invalid YAML ("),
        ("seed: 1\n---\nseed: 2\n", "run.yaml:2: found invalid YAML ("),
        ("save: *nowhere\n", "run.yaml:1: found invalid YAML ("),
        ("[" * 5000, "run.yaml:1: found invalid YAML ("),
        ("beta: -1\n", "run.yaml:1: beta: found -1.0"),
        ("lr: 1e-6\nmin_lr: 1e-5\n", "run.yaml:2: min_lr: found 1e-05, expected a number from 0 to lr"),
        ("max_length: 100\n", "run.yaml:1: max_prompt_length: found 1800, expected at most 99: max_length (100)"),
        ("template_mode: clear\n", "run.yaml:1: template_mode: found 'clear', expected clean | princeton"),
        ("loss_type: hinges\n", "run.yaml:1: loss_type: found 'hinges', expected sigmoid | hinge"),
        ("gamma: 1.0\ngamma_beta_ratio: 0.5\n", "run.yaml:1: found both gamma_beta_ratio and gamma"),
        ("bf16: true\nfp32: true\n", "run.yaml:2: found both bf16 and fp32"),
        ("gamma: -1\n", "run.yaml:1: gamma: found -1.0"),
        ("sequence_parallel: true\n", "run.yaml:1: sequence_parallel: found True"),
        ("vpp: 2\n", "run.yaml:1: virtual_pipeline_model_parallel_size: found 2"),
        ("resume: newest\n", "run.yaml:1: resume: found 'newest', expected latest"),
        ("resume: \uff13\nsave: runs\n", "run.yaml:1: resume: found '\uff13', expected latest"),
        ("save_interval: 5\n", "run.yaml:1: save_interval: found 5, expected save with it"),
        ("overlap_param_gather: true\n", "run.yaml:1: overlap_param_gather: found True"),
        ("recompute_num_layers: 2\n", "run.yaml:1: recompute_num_layers: found 2"),
        ("recompute_modules: [mlp, attn]\n", "run.yaml:1: recompute_modules: found 'attn', expected core_attn or mlp"),
        ("fp32: true\nfp8: tensorwise\n", "run.yaml:2: fp8_recipe: found 'tensorwise', expected bf16"),
        ("loss_type: hinge\nlabel_smoothing: 0.1\n", "run.yaml:2: label_smoothing: found 0.1"),
        ("preset: llama3\n", "run.yaml:1: preset: found 'llama3', expected a preset's name; did you mean 'llama3-"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_with_its_line(tmp_path, text, expected):
    assert refusal(tmp_path, text).startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--beat", "2"], "command line: found unknown argument '--beat', expected an option; did you mean '--beta'?"),
        (
            ["--gama-beta-ratio=2"],
            "command line: found unknown argument '--gama-beta-ratio', expected an option; did you mean "
            "'--gamma-beta-ratio'?",
        ),
        (
            ["--learning-rate", "1"],
            "command line: found unknown argument '--learning-rate', expected an option; did you mean '--lr'?",
        ),
        (["stray"], "command line: found unknown argument 'stray'"),
        (["--lr"], "command line: argument --lr: expected one argument"),
        (["--lr", "fast"], "command line: lr: found 'fast', expected a number"),
        (["--lr", "nan"], "command line: lr: found 'nan'"),
        (["--beta", "-1"], "command line: beta: found -1.0"),
        (
            ["--gamma", "1", "--gamma-beta-ratio", "1"],
            "command line: found both gamma_beta_ratio and gamma",
        ),
        (["--preset", "llama"], "command line: preset: found 'llama'"),
        (["--config", "no/such.yaml"], "no/such.yaml: cannot be read"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused_with_its_flag(arguments, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(arguments)


def test_a_configuration_error_ends_the_process_with_code_2():
    assert ConfigError.exit_code == 2


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system [touch pwned]",
        "!!python/object/new:subprocess.Popen [[touch, pwned]]",
        "!!python/name:os.system",
        "!!binary aGVsbG8=",
        "!mine x",
    ],
)
def test_a_yaml_tag_is_refused_and_never_obeyed(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    assert re.match(r"run\.yaml:1: save: found the tag \S+, expected text", refusal(tmp_path, f"save: {value}\n"))
    assert not (tmp_path / "pwned").exists()


def test_an_alias_bomb_is_refused_at_once(tmp_path):
    lines = ['a0: &a0 ["x", "x"]'] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    said = "run.yaml: found 5.77e+37 values, 42 deep, once its aliases are followed"
    assert refusal(tmp_path, "\n".join(lines)).startswith(said)
    nested = "data: [&a [x], *a, *a]\n"
    assert refusal(tmp_path, nested).startswith("run.yaml:1: data: found a list")


def test_a_huge_file_is_refused_unread(tmp_path):
    assert "expected a short YAML file" in refusal(tmp_path, "# " + "x" * (1 << 20))


@pytest.mark.parametrize("key", ["save", "export_hf", "tensorboard_dir", "wandb_project", "data_cache"])
@pytest.mark.parametrize("value", ["a\nb", "a\x1b[2J", "x" * 5000])
def test_a_name_that_would_be_written_to_is_refused_when_unsafe(key, value):
    with pytest.raises(ConfigError) as refused:
        config_from(model="m", **{key: value})
    message = str(refused.value)
    assert key in message and len(message) < 250 and message.isprintable()
