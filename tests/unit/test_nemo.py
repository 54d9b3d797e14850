"""NeMo's four dialects as our configuration: what each file asks for, and no key without a word about it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nemo_golden import GOLDEN
from omegaconf import OmegaConf

from simpo_megatron.config import Config
from simpo_megatron.config.lora_section import LORA_TARGETS
from simpo_megatron.errors import ConfigError, status_line
from simpo_megatron.nemo import load_nemo_config
from simpo_megatron.nemo.keys import read_flat
from simpo_megatron.nemo.loading import DIALECTS
from simpo_megatron.nemo.rules import Differs, Ignored, Only, Translated, With

CONFIGS = Path(__file__).parent / "nemo_configs"
DIALECT_OF = {
    "aligner_dpo.yaml": "NeMo 1 / Aligner",
    "nemo2_finetune.yaml": "NeMo 2",
    "rl_megatron.yaml": "NeMo-RL",
    "bridge_container.yaml": "Megatron-Bridge",
}


def beyond_defaults(config):
    defaults = Config().flat()
    return {name: value for name, value in config.flat().items() if value != defaults[name]}


def refusal(name, *overrides):
    """The one line a user sees, with the folder of the tests cut away."""
    with pytest.raises(ConfigError) as refused:
        load_nemo_config(CONFIGS / name, overrides)
    message = str(refused.value)
    assert "\n" not in message
    return message.replace(f"{CONFIGS}/", "")


@pytest.mark.parametrize("name", GOLDEN)
def test_a_file_of_each_dialect_asks_for_what_it_says(name):
    config, report = load_nemo_config(CONFIGS / name)
    assert beyond_defaults(config) == GOLDEN[name]
    assert report.dialect == DIALECT_OF[name]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("aligner_dpo.yaml", "exp_manager.checkpoint_callback_params.async_save"),
        ("nemo2_finetune.yaml", "trainer.strategy.ckpt_async_save"),
        ("rl_megatron.yaml", "policy.megatron_cfg.checkpoint.async_save"),
        ("bridge_container.yaml", "checkpoint.async_save"),
    ],
)
@pytest.mark.parametrize("asked", [True, False])
def test_each_dialect_asks_for_checkpoints_in_the_background(name, key, asked):
    config, report = load_nemo_config(CONFIGS / name, [f"++{key}={str(asked).lower()}"])
    assert config.run.async_save is asked
    assert report.taken[key] == f"async_save={str(asked).lower()}"


@pytest.mark.parametrize("name", GOLDEN)
def test_every_key_is_reported_once(name):
    _, report = load_nemo_config(CONFIGS / name)
    reported = [*report.taken, *report.translated, *report.ignored]
    assert sorted(reported) == sorted(read_flat(CONFIGS / name, []))
    assert all(report.taken.values()) and all(report.translated.values()) and all(report.ignored.values())
    text = "\n".join(report.lines(every_key=True))
    assert all(key in text for key in reported)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_tables_speak_of_options_that_exist(dialect):
    options = {*Config().flat(), "gamma", "fp32"}
    for key, rule in dialect.table.items():
        named = {rule} if isinstance(rule, str) else set(getattr(rule, "options", ()))
        assert named <= options, key
        if not isinstance(rule, str):
            told = {Ignored: "reason", Differs: "here", Only: "instead", Translated: "function", With: "readers"}
            assert getattr(rule, told[type(rule)]), key


def test_overrides_win_and_may_be_new_keys():
    config, report = load_nemo_config(
        CONFIGS / "aligner_dpo.yaml",
        ["model.optim.lr=1e-6", "++model.simpo.label_smoothing=0.1", "+model.context_parallel_size=2"],
    )
    assert (config.optimizer.lr, config.objective.label_smoothing) == (1e-6, 0.1)
    assert config.parallel.context_parallel_size == 2
    assert report.taken["model.context_parallel_size"] == "context_parallel_size=2"


def test_a_configuration_that_hydra_has_composed_takes_new_keys_and_stays_as_it_is():
    composed = OmegaConf.load(CONFIGS / "aligner_dpo.yaml")
    del composed["defaults"]  # hydra leaves none, and lets nobody add a key
    OmegaConf.set_struct(composed, True)
    before = OmegaConf.to_container(composed)
    config, report = load_nemo_config(composed, ["model.simpo.save=elsewhere"])
    assert (config.run.save, config.optimizer.lr) == ("elsewhere", 8e-7)
    assert report.lines()[0].startswith("configuration: NeMo 1 / Aligner configuration, keys: ")
    assert OmegaConf.to_container(composed) == before


def test_a_simpo_key_wins_over_what_the_dialect_says_and_the_report_says_so():
    config, report = load_nemo_config(
        CONFIGS / "aligner_dpo.yaml",
        ["model.simpo.lr=3e-7", "model.simpo.max_length=512", "model.simpo.max_prompt_length=256"],
    )
    assert (config.optimizer.lr, config.pairs.max_length, config.pairs.max_prompt_length) == (3e-7, 512, 256)
    assert config.batch.tokens_per_microbatch == 2 * 2 * 512
    assert report.ignored["model.optim.lr"] == "model.simpo.* decides"
    assert report.ignored["model.encoder_seq_length"] == "model.simpo.* decides"


ADAPTERS = {
    "aligner_dpo.yaml": (
        "model.peft={peft_scheme: lora, lora_tuning: {adapter_dim: 16, target_modules: [attention, mlp_fc2]}}",
        (16, 16, ("linear_qkv", "linear_proj", "linear_fc2")),
    ),
    "nemo2_finetune.yaml": (
        "peft={_target_: nemo.collections.llm.peft.lora.LoRA, dim: 8, alpha: 16, target_modules: [linear_qkv]}",
        (8, 16, ("linear_qkv",)),
    ),
    "rl_megatron.yaml": (
        "policy.megatron_cfg.peft={enabled: true, target_modules: [], dim: 8, alpha: 32, lora_A_init_method: xavier}",
        (8, 32, LORA_TARGETS),
    ),
    "bridge_container.yaml": ("peft={_target_: megatron.bridge.peft.lora.LoRA}", (32, 32, LORA_TARGETS)),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_asked_for_in_every_dialect(name):
    override, expected = ADAPTERS[name]
    config, report = load_nemo_config(CONFIGS / name, [override])
    assert (config.lora.lora_rank, config.lora.lora_alpha, config.lora.lora_targets) == expected
    assert [key for key, settings in report.translated.items() if "lora_rank" in settings] != []


def test_epochs_as_a_simpo_key_put_the_dialects_steps_away():
    config, report = load_nemo_config(
        CONFIGS / "aligner_dpo.yaml", ["model.simpo.epochs=2", "model.simpo.lr_warmup_fraction=0.1"]
    )
    assert (config.optimizer.epochs, config.optimizer.train_iters) == (2, None)
    assert report.ignored["trainer.dpo.max_steps"] == "model.simpo.* decides"


def test_a_child_file_replaces_a_section_marked_override(tmp_path):
    (tmp_path / "grandparent.yaml").write_text("policy: {model_name: a}\ndata: {dataset_name: x, num_workers: 3}\n")
    (tmp_path / "parent.yaml").write_text("defaults: grandparent.yaml\ndpo: {seed: 1, max_num_steps: 5}\n")
    (tmp_path / "child.yaml").write_text(
        "defaults: [parent.yaml]\ndata: {_override_: true, num_workers: 4}\ndpo: {seed: 2}\n"
    )
    assert read_flat(tmp_path / "child.yaml", []) == {
        "policy.model_name": "a",
        "data.num_workers": 4,
        "dpo.seed": 2,
        "dpo.max_num_steps": 5,
    }


def test_files_that_name_each_other_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("defaults: b.yaml\n")
    (tmp_path / "b.yaml").write_text("defaults: a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: found itself among the parents"):
        load_nemo_config(tmp_path / "a.yaml")


REFUSED = {
    "unknown key": (
        ["model.optim.lrr=1"],
        "found unknown key 'model.optim.lrr', expected one of .* such as 'model.optim.lr'",
    ),
    "unknown SimPO key": (
        ["model.simpo.betta=1"],
        "model.simpo.betta: found unknown key 'betta', expected an option; did you mean 'beta'",
    ),
    "text for a number": (["model.optim.lr=fast"], 'model.optim.lr: lr: found "fast"'),
    "fp16": (["trainer.precision=16"], "trainer.precision: found 16, expected one of bf16"),
    "another adapter": (["model.peft.peft_scheme=ia3"], "peft_scheme: found 'ia3', expected LoRA, the one kind"),
    "unknown layers": (
        ["model.peft.peft_scheme=lora", "model.peft.lora_tuning.target_modules=[head]"],
        "peft_scheme: found 'head' in model.peft.lora_tuning.target_modules, expected attention_qkv, ",
    ),
    "frozen layers": (["+model.freeze_updates.enabled=true"], "enabled: found true, expected false: whole"),
    "one option twice": (
        ["+model.simpo.tp=2", "+model.simpo.tensor_model_parallel_size=2"],
        "found twice, expected once; first in",
    ),
    "two lengths": (["model.data.seq_length=512"], "max_length: found 512, and 1024 in .*encoder_seq_length"),
    "not given": (["model.optim.lr=${nowhere}"], r"model.optim.lr: found \$\{nowhere\} .* or give model.simpo.lr"),
    "not an override": (["lr"], "command line: found 'lr', expected key=value"),
    "hydra's deletion": (["~model.fp8=1"], "command line: found '~model.fp8=1', expected key=value"),
    "broken override": (["model.optim.betas=[0.9"], "command line: found an override that is not YAML"),
    "unknown schedule": (["model.optim.sched.name=Noam"], "sched.name: found 'Noam', expected CosineAnnealing or"),
    "another optimizer": (["model.optim.name=adafactor"], "optim.name: found 'adafactor', expected an AdamW"),
    "token ids": (["model.data.data_impl=mmap"], "data_impl: found 'mmap', expected jsonl"),
    "out of range": (["model.simpo.beta=-1"], "aligner_dpo.yaml: model.simpo.beta: beta: found -1"),
    "gamma twice": (["model.simpo.gamma_beta_ratio=0.5"], "found both gamma_beta_ratio and gamma"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_named_with_its_key_and_what_to_do(mistake):
    overrides, expected = REFUSED[mistake]
    assert re.search(expected, refusal("aligner_dpo.yaml", *overrides))


def test_other_dialects_refuse_what_cannot_be_had():
    assert "policy.megatron_cfg.enabled=true" in refusal("rl_base.yaml", "policy.dtensor_cfg.enabled=false")
    assert "found 'HelpSteer3'" in refusal(
        "rl_base.yaml", "policy.megatron_cfg.enabled=true", "policy.dtensor_cfg.enabled=false"
    )
    assert "a NeMo checkpoint is not read" in refusal("nemo2_finetune.yaml", "simpo.model=null")
    assert "peft._target_: found 'nemo.DoRA'" in refusal("nemo2_finetune.yaml", "peft={_target_: nemo.DoRA}")
    assert "position post, expected pre" in refusal(
        "bridge_container.yaml", "peft={_target_: peft.LoRA, dropout: 0.1, dropout_position: post}"
    )
    assert "expected the folder of checkpoint.save, 'runs/bridge'" in refusal(
        "bridge_container.yaml", "checkpoint.load=elsewhere"
    )
    assert "expected one of bf16_mixed" in refusal("bridge_container.yaml", "mixed_precision=fp16_mixed")


def test_megatron_bridges_named_precision():
    config, _ = load_nemo_config(
        CONFIGS / "bridge_container.yaml", ["mixed_precision=bf16_with_fp8_current_scaling_mixed"]
    )
    assert (config.precision.bf16, config.precision.fp8_recipe) == (True, "tensorwise")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1e-6\n", "found no configuration of NeMo"),
        ("- a\n", "found a list"),
        ("model: [\n", "found invalid YAML"),
        ("a: 1\na: 2\n", "found invalid YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", "found invalid YAML"),
        ("model: {a: '${b', c: 1}\n", "found what OmegaConf cannot read|found no configuration of NeMo"),
        ("defaults:\n  - model: llama\nmodel: {lr: 1}\n", "defaults: found {'model': 'llama'}"),
        ("defaults: 3\nmodel: {lr: 1}\n", "defaults: found 3, expected file names"),
        ("defaults: nowhere\n", r"nowhere\.yaml: cannot be read"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, expected):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as refused:
        load_nemo_config(path)
    assert "\n" not in str(refused.value)


def test_resolvers_of_others_stay_and_ours_go():
    OmegaConf.register_new_resolver("multiply", lambda a, b: a * b, replace=True)
    try:
        load_nemo_config(CONFIGS / "aligner_dpo.yaml")
        assert OmegaConf.has_resolver("multiply")
        assert not OmegaConf.has_resolver("int_div")
    finally:
        OmegaConf.clear_resolver("multiply")


@pytest.mark.parametrize("asked", ["oc.env:HF_TOKEN", "oc.env:HF_TOKEN,none", "oc.decode:${oc.env:HF_TOKEN}"])
def test_a_secret_of_the_environment_reaches_nothing(asked, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "SECRET-4711")
    with pytest.raises(ConfigError) as refused:
        load_nemo_config(CONFIGS / "aligner_dpo.yaml", [f"model.simpo.save=runs/${{{asked}}}"])
    assert "model.simpo.save: found runs/${oc" in str(refused.value) and "SECRET" not in str(refused.value)
    assert "found a variable of the environment that may be a secret" in str(refused.value)


def test_what_tells_runs_apart_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SCRATCH", raising=False)
    asked = "model.simpo.save=${oc.env:SCRATCH,runs}/${oc.env:SLURM_JOB_ID}"
    config, _ = load_nemo_config(CONFIGS / "aligner_dpo.yaml", [asked])
    assert config.run.save == "runs/17"
    with pytest.raises(ConfigError, match="found no such variable of the environment"):
        load_nemo_config(CONFIGS / "aligner_dpo.yaml", ["model.simpo.save=${oc.env:SCRATCH}"])


def growing(first, more):
    """YAML of thirty keys, each made of the one before twice."""
    return "a0: " + first + "\n" + "".join(f"a{n}: {more.replace('$', f'a{n - 1}')}\n" for n in range(1, 31))


BOMBS = {
    "aliases": growing("&a0 [1]", "&N [*$, *$]"),
    "merged keys": growing("&a0 {b: 1}", "&N {<<: [*$, *$]}"),
    "an alias of itself": "a: &a [*a]\n",
    "depth": "a: " + "[" * 100_000 + "\n",
    "aliases of aliases": growing("&a0 [1]", "&N [*$]") + growing("&a0 [1]", "&N [*$]").replace("a", "b"),
    "size": "a: [" + "1, " * 100_000 + "1]\n",
    "texts": growing("word word", '"${$}${$}"'),
    "numbers": growing("99", "${multiply:${$},${$}}"),
    "no numbers": "model: {lr: '${multiply:[1,2],99999999999}'}\n",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_file_that_grows_without_end_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr("simpo_megatron.nemo.keys._CPU_SECONDS", 0.5)
    monkeypatch.setattr("simpo_megatron.nemo.keys._MAX_BYTES", 200 << 20)
    lines = [line.replace("&N", f"&a{number}") for number, line in enumerate(text.splitlines())]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines) + "\nmodel: {mcore_gpt: true}\ntrainer: {max_steps: 1}\n")
    started = time.process_time()
    with pytest.raises(ConfigError) as refused:
        load_nemo_config(path)
    assert time.process_time() - started < 20
    assert str(path) in str(refused.value) and len(status_line("ERROR", refused.value)) <= 500


def test_without_omegaconf_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    assert "pip install 'simpo-megatron[nemo]'" in refusal("aligner_dpo.yaml")


@pytest.mark.processes
def test_nothing_a_file_names_is_imported():
    script = (
        "import sys; from simpo_megatron.nemo import load_nemo_config; "
        f"load_nemo_config({str(CONFIGS / 'nemo2_finetune.yaml')!r}); "
        "print([name for name in ('nemo', 'megatron', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stderr
