"""Reading a run's options: layers, types and the round trip through YAML."""

import os

import pytest
from yaml_configs import load_yaml

from simpo_megatron.config import PRESETS, Config, config_from, load_config, read_yaml, to_text, to_yaml
from simpo_megatron.config.options import ALIASES, EXCLUSIVE, option_table
from simpo_megatron.errors import ConfigError


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
