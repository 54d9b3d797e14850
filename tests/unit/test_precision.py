"""What the number formats become in the installed megatron-core; nothing of it can be executed without a GPU."""

from dataclasses import fields

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from simpo_megatron.config import PrecisionConfig
from simpo_megatron.mcore.precision import precision_options

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
