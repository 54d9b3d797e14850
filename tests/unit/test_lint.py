"""The linter speaks up where published experience does, and only there."""

import pytest

from simpo_megatron.config import PRESETS, config_from, lint


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_as_published_raises_no_warning(name):
    assert lint(config_from(preset=name)) == []


def test_the_defaults_raise_no_warning():
    assert lint(config_from(model="m")) == []


@pytest.mark.parametrize(
    ("options", "found", "published"),
    [
        ({"beta": 0.1}, "beta 0.1", "2 to 10"),
        ({"gamma_beta_ratio": 5.0}, "gamma_beta_ratio 5", "0.1 to 0.8"),
        ({"gamma": 4.0}, "gamma_beta_ratio 2", "margin here is 4"),
        ({"sft_weight": 1.0}, "sft_weight 1", "published runs use 0"),
        ({"sft_normalization": "sequence"}, "sft_normalization sequence", "while sft_weight is 0"),
        ({"micro_batch_size": 4}, "micro_batch_size 4: without effect", "while packing is on"),
        ({"packing": False, "tokens_per_microbatch": 64}, "tokens_per_microbatch 64", "while packing is off"),
        ({"eval_interval": 10}, "eval_interval 10: without effect", "while no validation pairs are there"),
        ({"recompute_modules": ("mlp", "core_attn")}, "recompute_modules mlp core_attn", "not selective"),
        ({"export_dtype": "stored"}, "export_dtype stored: without effect", "while export_hf is not given"),
        ({"stop_on": ("displacement",)}, "stop_on displacement: without effect", "while no validation pairs are there"),
        ({"async_save": True}, "async_save True: without effect", "while save is not given"),
        ({"lr_decay_style": "constant", "min_lr": 1e-7}, "min_lr 1e-07: without effect", "constant"),
        ({"lr": 1e-5}, "lr 1e-05", "3e-7 to 1e-6"),
        ({"global_batch_size": 64}, "global_batch_size 64", "128"),
        ({"hidden_dropout": 0.1}, "dropout", "switch it off"),
        ({"attention_dropout": 0.1}, "dropout", "switch it off"),
    ],
)
def test_a_doubtful_setting_is_one_warning_with_the_published_value(options, found, published):
    (warning,) = lint(config_from(model="m", **options))
    assert warning.startswith(found) and published in warning and "\n" not in warning


def test_settings_at_the_edge_of_the_published_range_are_quiet():
    assert lint(config_from(model="m", beta=1.0, gamma_beta_ratio=1.0, lr=9.9e-6)) == []


def test_the_defaults_of_other_trainers_are_all_named():
    warnings = lint(config_from(model="m", beta=0.1, gamma=0.5, sft_weight=1.0, lr=1e-5, global_batch_size=8))
    assert len(warnings) == 5


def test_the_demo_is_a_toy_and_is_left_alone():
    assert lint(config_from(preset="demo", lr=1e-2, global_batch_size=4)) == []
