"""Keys of NeMo's files mean here what they mean there, or differ by name."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from nemo_configs import MEGATRON, load, obstacles

from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo.applying import apply
from simpo_megatron.nemo.loading import DIALECTS
from simpo_megatron.nemo.nemo_rl import NEMO_RL
from simpo_megatron.nemo.rules import Asked, Dialect, Ignored, Obstacle, Translated, With

DPO = ("simpo.beta=null", "simpo.gamma_beta_ratio=null", "simpo.loss_type=null", "simpo.objective=dpo")
TP2 = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
OVERLAPS = {"tp_comm_overlap": True, "fixed_pack_length": True}
OVERLAPS_NOT = {"tp_comm_overlap": False, "fixed_pack_length": False}
PAIRS = [
    pytest.param(dialect, key, rule, id=f"{dialect.name}: {key}")
    for dialect in DIALECTS
    for key, rule in dialect.table.items()
    if isinstance(rule, With)
]


def test_the_tables_have_pairs_of_keys():
    assert len(PAIRS) > 40


@pytest.mark.parametrize(("dialect", "key", "rule"), PAIRS)
def test_half_of_a_pair_is_refused_in_every_dialect(dialect, key, rule):
    key = key.replace("*", "part")
    with pytest.raises(Obstacle) as refused:
        apply(dialect, {key: "something"}, "file")
    assert f"file: {key}: found something without {rule.readers[0]}" in str(refused.value)
    assert f"{rule.readers[0]}={rule.example}" in refused.value.remedies


@pytest.mark.parametrize(("dialect", "key", "rule"), PAIRS)
def test_a_key_switched_off_by_the_one_that_reads_it_is_passed_over(dialect, key, rule):
    key, reader = key.replace("*", "part"), rule.readers[0]
    if reader.endswith("_target_"):
        pytest.skip("a class is there or not")
    _, report, _ = apply(dialect, {key: "something", reader: None, f"{dialect.simpo}preset": "demo"}, "file")
    assert report.ignored[key] == f"read together with {reader}"


def test_a_key_that_is_read_and_would_be_ignored_is_no_table():
    reads = Translated(lambda value, asked: "nothing", (), ("a.dim",))
    with pytest.raises(AssertionError, match=r"a\.switch reads a\.dim, which is ignored"):
        Dialect("name", (("a.",),), {"a.switch": reads, "a.dim": Ignored("anything")})
    with pytest.raises(AssertionError, match=r"no rule reads \['a\.dim'\]"):
        Dialect("name", (("a.",),), {"a.dim": With()})


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_rules_look_only_at_keys_they_declare(dialect):
    for key, rule in dialect.table.items():
        for value in (True, False, 1, 0.5, "lora", [0.9, 0.98]) if isinstance(rule, Translated) else ():
            asked = Asked({key: value}, {"objective": "dpo"}, rule.reads)
            with suppress(ConfigError, TypeError):
                rule.function(value, asked)
    with pytest.raises(AssertionError, match="reads b and does not say so"):
        Asked({}, {}, ("a",)).get("b")


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_a_value_of_any_kind_is_taken_or_refused(dialect):
    values = ("x", "", [], [1, "a"], [{"a": 1}], 1.5, -1, 10**30, float("nan"), True)
    refused = 0
    for key, rule in dialect.table.items():
        for value in values if isinstance(rule, Translated | str) else ():
            try:
                apply(dialect, {key.replace("*", "part"): value, f"{dialect.simpo}preset": "demo"}, "file")
            except ConfigError:
                refused += 1
    assert refused > 100


def test_a_bridge_file_laid_over_a_recipe_of_lora_trains_adapters_or_nothing():
    messages, remedies = obstacles("bridge_container.yaml", "peft={dim: 8, alpha: 16}")
    assert "peft.dim: found 8 without peft._target_" in messages[0] and "peft.alpha: found 16" in messages[1]
    config, _ = load("bridge_container.yaml", "peft={dim: 8, alpha: 16}", *remedies)
    assert (config.lora.lora_rank, config.lora.lora_alpha) == (8, 16.0)
    assert "peft.dim: found 8 without" in obstacles("bridge_container.yaml", "peft={_target_: null, dim: 8}")[0][0]


MEANINGS = {
    "rl_megatron.yaml": [
        ([], {"epochs": 1, "train_iters": 200}),
        (["simpo.packing=false"], {"micro_batch_size": 2}),
        (["dpo.max_num_epochs=3"], {"epochs": 3, "train_iters": 200}),
        (["policy.tokenizer.chat_template=default"], {"chat_template": ""}),
        (["policy.tokenizer.chat_template=null"], {"chat_template": "none"}),
        (["policy.tokenizer.chat_template='{{ messages }}'"], {"chat_template": "{{ messages }}"}),
        (["policy.tokenizer.chat_template=own.jinja"], {"chat_template": "own.jinja"}),
        (
            ["policy.tokenizer.chat_template_kwargs={enable_thinking: false, day: 1}"],
            {"chat_template_args": ("enable_thinking=false", "day=1")},
        ),
        ([*DPO],
         {"beta": 0.05, "sft_weight": 0.0}),
        ([*DPO,
          "dpo.sft_loss_weight=0.01"], {"beta": 0.05, "sft_weight": 0.01, "sft_normalization": "sum"}),
        ([*DPO,
          "dpo.sft_loss_weight=0.01", "dpo.sft_average_log_probs=true"],
         {"sft_weight": 0.01, "sft_normalization": "sequence"}),
        (["dpo.sft_loss_weight=0.01"], {"sft_weight": 0.0}),
        (["checkpointing.keep_top_k=null"], {"keep_checkpoints": -1}),
        ([f"{MEGATRON}scheduler.lr_decay_iters=32", f"{MEGATRON}scheduler.lr_warmup_iters=10", "dpo.max_num_steps=10"],
         {"lr_decay_iters": 32, "lr_warmup_iters": 10, "train_iters": 10}),
        ([f"{MEGATRON}scheduler.end_weight_decay=0.1"], {"weight_decay": 0.1}),
        ([f"{MEGATRON}fp8_cfg.fp8_param=true"], {"fp8_recipe": "blockwise", "fp8_param_gather": True}),
        ([f"{MEGATRON}fp8_cfg.fp8_param=false"], {"fp8_recipe": "blockwise", "fp8_param_gather": False}),
        ([f"{MEGATRON}recompute_granularity=selective", f"{MEGATRON}recompute_modules=[mlp]"],
         {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}),
        (["data.validation.data_path=/somewhere/pairs"], {"valid_data": ("/somewhere/pairs",)}),
        (["checkpointing.enabled=false"], {"save": None, "save_interval": None, "keep_checkpoints": 2}),
    ],
    "bridge_container.yaml": [
        (["train.train_iters=null", "train.num_epochs=2"], {"epochs": 2, "train_iters": None}),
        (["scheduler.max_steps=500"], {"lr_decay_iters": 500, "train_iters": 300}),
        (["scheduler.lr_warmup_fraction=0.2", "scheduler.lr_warmup_iters=0"],
         {"lr_warmup_fraction": 0.2, "lr_warmup_iters": None}),
        # megatron-core writes the schedule's weight decay over the optimizer's.
        (["scheduler.start_weight_decay=0.1", "scheduler.end_weight_decay=0.1"], {"weight_decay": 0.1}),
        (["model.seq_length=131072"], {"max_length": 2048, "tokens_per_microbatch": 4096}),
        (["model.seq_length=131072", "dataset.seq_length=null"], {"max_length": 131072}),
        (["checkpoint.most_recent_k=-1"], {"keep_checkpoints": -1}),
        (["mixed_precision.fp8_param_gather=true"], {"fp8_recipe": "blockwise", "fp8_param_gather": True}),
        (["model.moe_aux_loss_coeff=0.001"], {"moe_aux_loss_coeff": 0.001}),
        (["comm_overlap.tp_comm_overlap=true", "comm_overlap.tp_comm_bootstrap_backend=nccl", *TP2], OVERLAPS),
        (["model.tp_comm_overlap=true", "model.tp_comm_overlap_ag=true", *TP2], OVERLAPS),
        (["model.tp_comm_overlap=true", "model.tensor_model_parallel_size=1"], OVERLAPS_NOT),
        (["model.tp_comm_overlap=true", *TP2, "model.sequence_parallel=false"], OVERLAPS_NOT),
        (["model.tp_comm_overlap=true", *TP2, "simpo.tp_comm_overlap=false"], OVERLAPS_NOT),
        (["model.tp_comm_overlap=null", "comm_overlap.tp_comm_overlap=false", *TP2], OVERLAPS_NOT),
    ],
    "nemo2_finetune.yaml": [
        (["log.log_dir=null", "log.name=null"], {"save": None, "save_interval": None}),
        (["trainer.val_check_interval=0.25"], {"eval_epochs": 0.25, "eval_interval": None}),
        (["trainer.max_epochs=2"], {"epochs": 2, "train_iters": 1000}),
        (["optim.lr_scheduler.constant_steps=100"], {"lr_decay_iters": 900, "lr_warmup_iters": 50}),
        (["optim.lr_scheduler.max_steps=2000"], {"lr_decay_iters": 2000}),
        (["trainer.plugins.fp8_param_gather=true"], {"fp8_recipe": "tensorwise", "fp8_param_gather": True}),
        (["model.config.tp_comm_overlap=true", "trainer.strategy.tensor_model_parallel_size=2",
          "trainer.strategy.sequence_parallel=true"], OVERLAPS),
    ],
    "aligner_dpo.yaml": [
        (["model.ub_tp_comm_overlap=true", "model.ub_tp_comm_overlap_cfg.qkv_fprop.method=ring_exchange", *TP2],
         OVERLAPS),
        ([], {"chat_template": "none", "epochs": 3, "train_iters": 400}),
        (["trainer.dpo.val_check_interval=0.1"], {"eval_epochs": 0.1, "eval_interval": None}),
        (["trainer.dpo.max_steps=-1"], {"epochs": 3, "train_iters": None}),
        # Lightning clips nothing without a number.
        (["trainer.dpo.gradient_clip_val=null"], {"clip_grad": 0.0}),
        (["trainer.gradient_clip_val=null"], {"clip_grad": 0.5}),
        (["model.peft.peft_scheme=lora", "model.peft.lora_tuning.variant=canonical",
          "model.peft.lora_tuning.adapter_dim=4"],
         {"lora_rank": 4, "lora_alpha": 4, "lora_targets": ("linear_q", "linear_k", "linear_v")}),
        (["model.optim.sched.constant_steps=50"], {"lr_decay_iters": 350}),
        (["model.simpo.beta=null", "model.simpo.gamma=null", "model.simpo.objective=dpo",
          "model.dpo.sft_loss_weight=1"], {"beta": 0.2, "sft_weight": 1.0, "sft_normalization": "sum"}),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "overrides", "expected"), [(name, *case) for name, cases in MEANINGS.items() for case in cases]
)
def test_a_key_means_what_it_means_there(name, overrides, expected):
    found = load(name, *overrides)[0].flat()
    assert {key: found[key] for key in expected} == expected


REFUSED = {
    "averages in DPO": (
        "rl_megatron.yaml",
        [*DPO,
         "dpo.preference_average_log_probs=true"],
        "dpo.preference_average_log_probs=false",
    ),
    "weight decay that grows": (
        "bridge_container.yaml",
        ["scheduler.start_weight_decay=0.0", "scheduler.end_weight_decay=0.1"],
        "scheduler.start_weight_decay=0.1",
    ),
    "another model configuration": (
        "rl_megatron.yaml", ["+policy.hf_config_overrides.rope_theta=1"], "policy.hf_config_overrides.rope_theta=null",
    ),
    "token ids": ("aligner_dpo.yaml", ["model.data.data_impl=mmap"], "model.simpo.data=FILE"),
    "one batch an epoch": (
        "aligner_dpo.yaml", ["trainer.dpo.limit_train_batches=1"], "trainer.dpo.limit_train_batches=1.0",
    ),
    "a prompt file": ("rl_megatron.yaml", ["data.train.prompt_file=a.txt"], "simpo.data=FILE"),
    "an early end": ("bridge_container.yaml", ["train.exit_interval=10"], "train.exit_interval=null"),
    "two learning rates": ("bridge_container.yaml", ["optimizer.decoupled_lr=1e-3"], "optimizer.decoupled_lr=null"),
    "a text in the place of a number": (
        "bridge_container.yaml", ["train.train_iters=some"], "train.train_iters=N",
    ),
    "a text that a rule passes on": (
        "bridge_container.yaml", ["train.global_batch_size=some"], "simpo.global_batch_size=N",
    ),
    "one of two numbers": ("aligner_dpo.yaml", ["model.optim.betas=[0.9]"], "model.simpo.adam_beta2=X"),
    "another kind of adapter": (
        "nemo2_finetune.yaml", ["peft._target_=nemo.DoRA"], "peft._target_=nemo.collections.llm.peft.lora.LoRA",
    ),
    "validation of no file": (
        "rl_megatron.yaml",
        ["data.validation.dataset_name=PreferenceDataset", "data.validation.data_path=null"],
        "data.validation.data_path=FILE",
    ),
    "a number that is none": ("aligner_dpo.yaml", ["trainer.dpo.max_steps=1e2"], "model.simpo.train_iters=N"),
    "half an epoch": ("nemo2_finetune.yaml", ["trainer.max_epochs=0.5"], "simpo.epochs=N"),
    "no pair": ("aligner_dpo.yaml", ["model.micro_batch_size=0"], "model.micro_batch_size=N"),
    "a hundred epochs": (
        "aligner_dpo.yaml", ["trainer.dpo.val_check_interval=100.0"], "model.simpo.eval_interval=N",
    ),
    "shares of an epoch where steps are counted": ("rl_megatron.yaml", ["dpo.val_period=0.5"], "simpo.eval_interval=N"),
    "no rank": ("bridge_container.yaml", ["peft={_target_: bridge.LoRA, dim: 0}"], "simpo.lora_rank=N"),
    "no scale": ("rl_megatron.yaml", [f"{MEGATRON}peft.enabled=true", f"{MEGATRON}peft.alpha=0"], "simpo.lora_alpha=X"),
    "two folders": ("bridge_container.yaml", ["dataset.dataset_root=[a, b]"], "simpo.data=FILE"),
    "two models": ("rl_megatron.yaml", ["policy.model_name=[a, b]"], "simpo.model=DIR"),
    "a beta of none": ("rl_megatron.yaml", [*DPO, "dpo.reference_policy_kl_penalty=0"], "simpo.beta=X"),
    "no model": ("rl_megatron.yaml", ["policy.model_name=null"], "simpo.model=DIR"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_mean_something_else_is_refused_with_what_to_paste(case):
    name, overrides, remedy = REFUSED[case]
    assert remedy in obstacles(name, *overrides)[1]


def test_several_data_sets_in_one_file_are_refused():
    with pytest.raises(Obstacle, match=r"data\.train: found .* one data set is read from such a file"):
        apply(NEMO_RL, {"data.train": [{"data_path": "a"}, {"data_path": "b"}]}, "file")


DIFFERENT = {
    "rl_megatron.yaml": {
        "dpo": "a file of DPO; SimPO is trained here",
        "checkpointing.keep_top_k": "the 3 best by a metric there",
        "policy.max_total_sequence_length": "more than 1024 tokens are not learned from there",
    },
    "bridge_container.yaml": {"train.global_batch_size": "64 sequences there, 64 pairs here"},
    "aligner_dpo.yaml": {"model.num_layers": "those of the model's own config.json"},
    "nemo2_finetune.yaml": {"data.global_batch_size": "128 sequences there, 128 pairs here"},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_not_the_same_is_always_shown(name):
    _, report = load(name)
    shown = "\n".join(report.lines())
    for key, here in DIFFERENT[name].items():
        assert re.search(rf"  differs     .*\b{key}\b.*: ", shown) and here in report.differs[key]


def test_what_only_dpo_has_is_told_to_whoever_trains_simpo():
    _, report = load("rl_megatron.yaml", "simpo.beta=null", "dpo.sft_loss_weight=0.1")
    assert "objective=dpo trains DPO with it" in report.differs["dpo.reference_policy_kl_penalty"]
    assert "the SimPO key sft_weight" in report.differs["dpo.sft_loss_weight"]


def test_epochs_that_end_within_a_batch_are_told():
    _, report = load("rl_megatron.yaml", "dpo.max_num_epochs=3")
    assert "left out there" in report.differs["dpo.max_num_epochs"]


def test_keys_that_differ_alike_share_a_line():
    keys = [f"model.{name}" for name in ("num_layers", "hidden_size", "ffn_hidden_size", "kv_channels", "vocab_size")]
    _, report = load("bridge_container.yaml", *(f"{key}=2" for key in keys))
    (line,) = (line for line in report.lines() if "config.json" in line)
    assert "and " in line and len(line) < 300
    (line,) = (line for line in report.lines(every_key=True) if "config.json" in line)
    assert all(key in line for key in keys)


def test_no_targets_of_adapters_are_all_linear_layers_there():
    _, report = load("rl_megatron.yaml", f"{MEGATRON}peft={{enabled: true, dim: 8, alpha: 8, target_modules: []}}")
    assert "adapters of every linear layer there" in report.differs[f"{MEGATRON}peft.enabled"]


def test_a_run_that_nemo_saves_in_a_folder_of_its_own_is_told():
    _, report = load("nemo2_finetune.yaml", "log.log_dir=null", "log.ckpt.every_n_train_steps=null")
    assert "nemo_experiments" in report.differs["log.log_dir"]
    _, report = load("nemo2_finetune.yaml", "log.log_dir=null", "simpo.save=runs")
    assert "log.log_dir" not in report.differs


def test_adapters_of_the_other_worker_are_no_training_of_all_weights():
    asked = ["+policy.dtensor_cfg.lora_cfg.enabled=true", "+policy.dtensor_cfg.lora_cfg.dim=8"]
    messages, remedies = obstacles("rl_megatron.yaml", *asked)
    assert "policy.dtensor_cfg.lora_cfg.enabled: found true" in messages[0]
    assert remedies == [f"{MEGATRON}peft.enabled=true", f"{MEGATRON}peft.dim=8"]
    assert load("rl_megatron.yaml", *asked, *remedies)[0].lora.lora_rank == 8


def test_objects_that_megatron_bridge_writes_as_sections_are_known():
    partial = "{_target_: torch.nn.init.normal_, _partial_: true, _args_: [], mean: 0.0, std: 0.02}"
    names = ("init_method", "embedding_init_method", "output_layer_init_method")
    _, report = load("bridge_container.yaml", *(f"model.{name}={partial}" for name in names))
    assert all(f"model.{name}.std" in report.differs for name in names)


def test_fp8_that_a_recipe_has_otherwise_is_told():
    _, report = load("rl_megatron.yaml", f"{MEGATRON}fp8_cfg.fp8=hybrid", f"{MEGATRON}fp8_cfg.fp8_param=false")
    assert "fp8 hybrid (e4m3 here)" in report.differs[f"{MEGATRON}fp8_cfg.enabled"]
    _, report = load("nemo2_finetune.yaml", "trainer.plugins.first_last_layers_bf16=false")
    assert "first_last_layers_bf16 false" in report.differs["trainer.plugins.fp8"]
    _, report = load("aligner_dpo.yaml", "model.fp8_amax_history_len=16", "model.fp8_margin=0")
    assert report.differs["model.fp8"].startswith("fp8_amax_history_len 16 there; ")


def test_ignored_keys_are_counted_and_named_when_asked_for():
    _, report = load("bridge_container.yaml")
    short, long = report.lines(), report.lines(every_key=True)
    plain = report.ignored.keys() - report.differs.keys()
    assert short[-1] == f"  ignored     {len(plain)} keys; --explain-config names them and why"
    text = "\n".join(long)
    assert all(key in text for key in report.ignored)
