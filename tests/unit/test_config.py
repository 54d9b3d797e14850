"""Reading a run's options: layers, types, refusals and the round trip through YAML."""

import os
import re

import pytest
from yaml_configs import load_yaml, refusal

from simpo_megatron.config import PRESETS, Config, config_from, load_config, read_yaml, to_text, to_yaml
from simpo_megatron.config.options import ALIASES, EXCLUSIVE, option_table
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


def test_defaults_are_the_papers_family():
    config = Config()
    assert (config.objective.beta, config.objective.gamma_beta_ratio, config.objective.gamma) == (
        2.0,
        0.5,
        1.0,
    )
    assert config.objective.sft_weight == 0
    assert config.optimizer.lr == 5e-7
    assert (config.optimizer.lr_decay_style, config.optimizer.lr_warmup_fraction) == ("cosine", 0.1)
    assert config.batch.global_batch_size == 128
    assert config.model.hidden_dropout == config.model.attention_dropout == 0


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    text = "preset: llama3-instruct-v0.2\nlr: 7e-7\nseed: 3\n"
    config = load_yaml(tmp_path, text, "--seed", "4")
    assert config.objective.beta == 10.0, "from the preset"
    assert config.optimizer.lr == 7e-7, "from the file"
    assert config.run.seed == 4, "from the command line"


def test_a_preset_on_the_command_line_lies_below_the_file(tmp_path):
    assert load_yaml(tmp_path, "lr: 7e-7\n", "--preset", "mistral-base").optimizer.lr == 7e-7


def test_without_arguments_it_is_the_demo():
    assert load_config([]).run.preset == "demo"
    assert load_config(["--tp", "2"]).run.preset == "demo"
    assert load_config(["--model", "folder"]).run.preset is None
    assert load_config(["--preset", "mistral-base"]).model.model is None


@pytest.mark.parametrize(
    ("name", "beta", "ratio", "lr", "max_length", "max_prompt_length"),
    [
        ("mistral-base", 2.0, 0.8, 3e-7, 1024, 512),
        ("mistral-instruct", 2.5, 0.1, 5e-7, 2048, 1800),
        ("llama3-base", 2.0, 0.5, 6e-7, 2048, 1800),
        ("llama3-instruct", 2.5, 0.55, 1e-6, 2048, 1800),
        ("llama3-instruct-v0.2", 10.0, 0.3, 1e-6, 2048, 1800),
        ("gemma2-9b-it", 10.0, 0.5, 8e-7, 2048, 1800),
    ],
)
def test_a_published_preset_holds_the_published_numbers(name, beta, ratio, lr, max_length, max_prompt_length):
    config = load_config(["--preset", name])
    assert (config.objective.beta, config.objective.gamma_beta_ratio) == (beta, ratio)
    assert config.optimizer.lr == lr
    assert (config.pairs.max_length, config.pairs.max_prompt_length) == (max_length, max_prompt_length)
    assert (config.batch.global_batch_size, config.optimizer.epochs) == (128, 1)
    assert (config.objective.sft_weight, config.objective.label_smoothing) == (0, 0)


def test_there_are_the_six_published_presets_and_the_demo():
    assert len(PRESETS) == 7


def test_the_everyday_options_fit_one_screen(capsys):
    with pytest.raises(SystemExit) as left:
        load_config(["--tp", "2", "--help"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    assert {"--config", "--preset", "--model", "--data", "--tp", "--lr", "--save", "--help-all"} <= set(shown)
    assert 30 <= len(shown) <= 45


def test_every_option_is_a_flag_and_a_yaml_key_with_a_sentence_of_help(capsys):
    with pytest.raises(SystemExit) as left:
        load_config(["--help-all"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    for option in option_table().values():
        assert f"--{option.name.replace('_', '-')}" in printed
        assert option.help.endswith("."), option.name
    for alias, name in ALIASES.items():
        assert f"--{alias} " in printed and name in option_table()
    assert all(name in option_table() for group in EXCLUSIVE for name in group)


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_an_alias_is_the_option_itself_as_a_flag_and_as_a_key(tmp_path, alias):
    option = option_table()[ALIASES[alias]]
    text = option.choices[0] if option.choices else "2"
    beside = {"vpp": ["--pp", "2"], "fp8": ["--bf16"]}.get(alias, [])
    by_flag = load_config([f"--{alias}", text, *beside]).flat()[option.name]
    by_name = load_config([f"--{option.name.replace('_', '-')}", text, *beside]).flat()[option.name]
    by_key = load_yaml(tmp_path, f"{alias}: {text}\n", *beside).flat()[option.name]
    assert by_flag == by_name == by_key != option.default


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--no-packing"], "packing", False),
        (["--no-prefix-sharing"], "prefix_sharing", False),
        (["--fp32"], "bf16", False),
        (["--model", "m", "--bf16"], "bf16", True),
        (["--sequence-parallel", "--tp", "2"], "sequence_parallel", True),
        (["--data", "a.jsonl", "b.jsonl", "--seed", "1"], "data", ("a.jsonl", "b.jsonl")),
        (["--lr=1e-6"], "lr", 1e-6),
        (["--model", "m", "--recompute", "full"], "recompute_num_layers", 1),
        (["--resume", "120"], "resume", "120"),
    ],
)
def test_a_flag_sets_its_option(flags, name, value):
    assert load_config(flags).flat()[name] == value


@pytest.mark.parametrize(
    ("text", "value"), [("1e-6", 1e-6), ("1", 1.0), ("5.0e-07", 5e-7), (".5", 0.5), ("2.E-3", 2e-3)]
)
def test_a_number_in_yaml_is_a_number_however_it_is_written(tmp_path, text, value):
    assert load_yaml(tmp_path, f"lr: {text}\n").optimizer.lr == value


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


@pytest.mark.parametrize("value", ["../elsewhere", "runs/../../x"])
def test_a_folder_is_known_by_its_resolved_name_and_a_project_has_no_other_folders_in_it(value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for key in ("save", "export_hf", "tensorboard_dir", "data_cache"):
        assert config_from(model="m", **{key: value}).flat()[key] == os.path.abspath(value)
    with pytest.raises(ConfigError, match="wandb_project: found"):
        config_from(model="m", wandb_project=value)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--preset", "llama3-instruct-v0.2", "--model", "m", "--data", "a", "b", "--valid-data", "v"],
        ["--model", "m", "--train-iters", "7", "--gamma", "1.1", "--beta", "3", "--fp32"],
        [
            "--model",
            "m",
            "--recompute",
            "full",
            "--tp",
            "2",
            "--sequence-parallel",
            "--resume",
            "12",
            "--save",
            "s",
        ],
        ["--model", "null", "--valid-fraction", "0.1", "--save", "12:30", "--wandb-project", "yes"],
        ["--model", "m", "--objective", "cpo", "--beta", "0.2"],
        ["--preset", "gemma2-9b-it", "--objective", "orpo"],
    ],
)
def test_a_saved_configuration_loads_again_unchanged(tmp_path, arguments):
    config = load_config(arguments)
    again = load_yaml(tmp_path, to_yaml(config))
    assert again == config
    assert again.fingerprint() == config.fingerprint()


def test_an_option_switched_off_against_the_preset_stays_off_after_a_reload(tmp_path):
    config = config_from(preset="demo", export_hf=None)
    assert load_yaml(tmp_path, to_yaml(config)).model.export_hf is None


def test_fingerprints_tell_configurations_apart_section_by_section():
    one, other = config_from(model="m"), config_from(model="m", beta=3.0)
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint("objective") != other.fingerprint("objective")
    assert one.fingerprint("data", "optimizer") == other.fingerprint("data", "optimizer")
    assert one.fingerprint() == config_from(model="m").fingerprint()


def test_no_secret_of_the_environment_reaches_a_saved_configuration(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary-4711")
    assert "canary-4711" not in to_yaml(load_config(["--wandb-project", "p"]))


def test_options_set_from_a_program_pass_the_same_checks():
    assert config_from(tp=2, gamma=2.0, beta=4.0).objective.gamma_beta_ratio == 0.5
    with pytest.raises(ConfigError, match="found unknown key 'beat', expected an option; did you mean 'beta'"):
        config_from(beat=2)
    with pytest.raises(ConfigError, match="found both"):
        config_from(gamma=1.0, gamma_beta_ratio=0.5)


def test_a_file_read_alone_knows_where_each_value_stands(tmp_path):
    (tmp_path / "a.yaml").write_text("# comment\n\nlr: 1e-6\n")
    setting = read_yaml(tmp_path / "a.yaml")["lr"]
    assert (setting.value, setting.where) == (1e-6, f"{tmp_path}/a.yaml:3")


def test_what_is_printed_marks_what_is_not_the_default_and_leaves_out_what_has_no_use():
    text = to_text(load_config(["--objective", "cpo", "--sft-weight", "0.5", "--model", "m", "--save", "a" * 200]))
    lines = [line.split() for line in text.plain.splitlines()]
    assert ["sft_weight", "0.5", "(default", "1)"] in lines and ["beta", "0.1"] in lines
    assert ["run", "seed", "42"] in lines and ["save", "a" * 200] in lines
    bold = [text.plain[span.start : span.end] for span in text.spans if span.style == "bold"]
    assert {"0.5  (default 1)", "a" * 200} <= set(bold) and "42" not in bold
    assert not {"gamma", "lora_targets", "micro_batch_size", "eval_interval"} & {line[0] for line in lines}


def test_an_export_below_save_moves_with_it(tmp_path):
    assert load_config(["--preset", "demo", "--save", "runs/mine"]).model.export_hf == "runs/mine/hf"
    own = load_config(["--preset", "demo", "--save", "runs/mine", "--export-hf", "out"])
    assert own.model.export_hf == "out"
    assert load_config(["--preset", "demo", "--lr", "1e-4"]).model.export_hf == "runs/demo/hf"
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nsave: a/b\nexport_hf: a/b/c/hf\n")
    assert load_config(["--config", str(file), "--save", "/x"]).model.export_hf == "/x/c/hf"
    file.write_text("model: m\ndata: d\nsave: a/b\nexport_hf: a/hf\n")
    assert load_config(["--config", str(file), "--save", "/x"]).model.export_hf == "a/hf", "it lies elsewhere"
