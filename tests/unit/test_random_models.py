"""Models of odd shapes compute what transformers computes, and come back bit for bit.

SIMPO_NUM_MODELS: models of each family, one when not given.
"""

from __future__ import annotations

import os
import random

import pytest
from random_models import random_config

from simpo_megatron import parallel
from simpo_megatron.commands.families import BUDGET
from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from simpo_megatron.mcore.families import FAMILIES  # noqa: E402
from simpo_megatron.offline.family_proof import prove_model  # noqa: E402

NUM_MODELS = int(os.environ.get("SIMPO_NUM_MODELS", "1"))


@pytest.fixture(scope="module")
def groups():
    with parallel.alone() as groups:
        yield groups


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_of_any_shape_is_computed_as_transformers_does(groups, model_type: str) -> None:
    draw = random.Random(f"shapes of {model_type}")
    for _ in range(NUM_MODELS):
        config = random_config(model_type, draw)
        if model_type == "deepseek_v2":
            # transformers reads pairs of fp32 numbers as complex ones, which have to lie at even places.
            config |= {key: config[key] + config[key] % 2 for key in ("qk_nope_head_dim", "kv_lora_rank")}
        proof = prove_model("random", config, groups)
        assert proof.largest_difference <= BUDGET, f"{proof} of {config}"
        assert proof.num_tensors == proof.num_equal > 0, f"{proof} of {config}"
