"""What the number formats become in the installed megatron-core; nothing of it can be executed without a GPU."""

from dataclasses import fields

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from simpo_megatron.config import PrecisionConfig, config_from
from simpo_megatron.config.options import option_table
from simpo_megatron.mcore.precision import export_dtype, precision_options, rounding
from tools import convert_hf

SHAPE = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_makes_a_config_that_megatron_accepts(recipe):
    options = precision_options(PrecisionConfig(fp8_recipe=recipe))
    config = TransformerConfig(**SHAPE, **options)
    assert config.fp8 == ("hybrid" if recipe in ("delayed", "tensorwise") else "e4m3")
    assert config.fp8_recipe == recipe
    assert config.params_dtype is config.pipeline_dtype is torch.bfloat16


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_every_option_is_a_field_of_the_installed_config(recipe):
    known = {field.name for field in fields(TransformerConfig)}
    assert set(precision_options(PrecisionConfig(fp8_recipe=recipe))) <= known
    assert "fp8_recipe" in {field.name for field in fields(OptimizerConfig)}


def test_delayed_scaling_remembers_more_than_one_step():
    assert precision_options(PrecisionConfig(fp8_recipe="delayed"))["fp8_amax_history_len"] == 1024


def test_current_scaling_keeps_first_and_last_layer_in_bf16():
    config = TransformerConfig(**SHAPE, **precision_options(PrecisionConfig(fp8_recipe="tensorwise")))
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 1)


def test_fp32_is_fp32_throughout():
    options = precision_options(PrecisionConfig(bf16=False))
    assert options == {"bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, torch.bfloat16),
        ({"bf16": False}, torch.bfloat16),
        ({"bf16": False, "export_dtype": "stored"}, torch.float32),
        ({"export_dtype": "stored"}, torch.bfloat16),
        ({"export_dtype": "float16"}, torch.float16),
    ],
)
def test_an_export_is_bf16_unless_another_format_is_named(options, expected):
    assert export_dtype(config_from(model="unused", data=("unused",), **options)) is expected


def test_what_an_export_rounds_is_said_and_what_it_keeps_is_not():
    assert rounding([torch.bfloat16], torch.float32) is rounding([torch.bfloat16], torch.bfloat16) is None
    assert rounding([torch.float32], torch.bfloat16) == "float32 weights are rounded to bfloat16"
    # As many bits, but other ones.
    assert rounding([torch.bfloat16], torch.float16) == "bfloat16 weights are rounded to float16"
    both = rounding([torch.float32, torch.bfloat16, torch.float16], torch.bfloat16)
    assert both == "float16 and float32 weights are rounded to bfloat16"


def test_the_offline_tool_takes_the_words_of_the_trainer():
    assert option_table()["export_dtype"].choices == convert_hf.DTYPES
