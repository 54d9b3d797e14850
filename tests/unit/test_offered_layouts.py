"""Layouts that `resolve` accepts for random models can be built and loaded; the planner offers no others.

torch's fake process group gives one process any rank of any number of ranks: its collectives do nothing, and none is
needed to build a model and to load weights.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from simpo_megatron import parallel
from simpo_megatron.config import Machine, config_from, resolve
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore import cpu_patches

cpu_patches.install()


from simpo_megatron.convert.load_weights import fill  # noqa: E402
from simpo_megatron.convert.mapping import hf_tensors, pieces  # noqa: E402
from simpo_megatron.convert.weight_layouts import TensorRank  # noqa: E402
from simpo_megatron.mcore.families import FAMILIES, ModelDescription, describe_hf_config  # noqa: E402
from simpo_megatron.mcore.family import TINY_MODEL  # noqa: E402
from simpo_megatron.mcore.model import build_model  # noqa: E402
from simpo_megatron.planning.gpus import GPUS  # noqa: E402
from simpo_megatron.planning.layouts import PlanRequest, survey  # noqa: E402
from simpo_megatron.planning.shapes import Pack  # noqa: E402

NUM_LAYOUTS = int(os.environ.get("SIMPO_NUM_LAYOUTS", "60"))


def random_model(draw: random.Random) -> ModelDescription:
    """A model of some family with heads, groups, widths and vocabulary that fit no layout in particular."""
    family = draw.choice(list(FAMILIES.values()))
    heads = draw.choice([4, 6, 8, 8, 12])
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([groups for groups in range(1, heads + 1) if heads % groups == 0]),
        "hidden_size": heads * draw.choice([8, 10]),
        "intermediate_size": draw.choice([36, 48, 64, 96]),
        "num_hidden_layers": draw.choice([2, 3, 4, 6]),
        "vocab_size": draw.choice([259, 300, 1000]),
    }
    keys = dict(draw.choice(list(family.tests.values())))
    if "kv_lora_rank" in keys:
        sizes["num_key_value_heads"] = heads
    if draw.random() < 0.5:
        keys["head_dim"] = draw.choice([4, 6, 8])
    config = {**TINY_MODEL, **keys, **sizes, "model_type": family.model_type}
    config.pop("layer_types", None)
    return describe_hf_config(json.loads(json.dumps(config)), "config.json")


def random_layout(draw: random.Random) -> tuple[dict, int]:
    """(options, number of ranks)."""
    tp, pp, ep = draw.choice([1, 2, 2, 3, 4, 4, 8]), draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 1, 2])
    options = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": draw.choice([None, 2]) if pp > 1 else None,
        "expert_model_parallel_size": ep,
        "sequence_parallel": tp > 1 and draw.random() < 0.7,
    }
    return options, tp * pp * draw.choice([1, 2, 4])


def load_on(rank: int, world_size: int, description: ModelDescription, config) -> None:
    """Build the model on one rank and fill every parameter of it from tensors of the shapes that a folder has."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        groups = parallel.initialize(config.parallel.sizes, backend="fake")
        tensors = {name: torch.randn(shape) for name, shape in hf_tensors(description).items()}
        for chunk in build_model(description, config, groups):
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
            tp = TensorRank(groups.tp.rank(), groups.tp.size())
            for piece in pieces(chunk, description, tp=tp):
                fill(piece, tensors[piece.hf_name], tp.rank, description)
            unfilled = [name for name, parameter in chunk.named_parameters() if parameter.isnan().any()]
            assert not unfilled, f"{unfilled} of {description.hf_config}"
    finally:
        parallel.shut_down()


def test_what_is_offered_loads() -> None:
    draw, num_loaded, num_refused, above_groups = random.Random(11), 0, 0, 0
    while num_loaded + num_refused < NUM_LAYOUTS:
        try:
            description = random_model(draw)
        except ConfigError:
            continue
        options, world_size = random_layout(draw)
        config = config_from(model="m", data=("d",), bf16=False, **options)
        try:
            resolve(config, world_size=world_size, model=description.transformer, machine=Machine())
        except ConfigError as error:
            assert "\n" not in str(error)
            num_refused += 1
            continue
        load_on(draw.randrange(world_size), world_size, description, config)
        num_loaded += 1
        above_groups += config.parallel.tensor_model_parallel_size > description.transformer["num_query_groups"]
    assert num_loaded >= NUM_LAYOUTS / 6 and num_refused and above_groups, "layouts of all kinds are among them"


@pytest.mark.parametrize("seed", range(3))
def test_the_planner_offers_what_resolve_takes(seed: int) -> None:
    draw = random.Random(seed)
    description, gpu = random_model(draw), GPUS["h100-80gb"]
    config = config_from(model="m", data=("d",), global_batch_size=48)
    pack = Pack.of(config.batch, prompt=20, response=30)
    found = survey(PlanRequest(description=description, config=config, num_gpus=8, gpu=gpu, pack=pack))
    assert found.candidates
    for candidate in found.candidates:
        resolve(candidate.config, world_size=8, model=description.transformer, machine=gpu.machine)
        cpu = replace(candidate.config, precision=config_from(model="m", data=("d",), bf16=False).precision)
        load_on(draw.randrange(8), 8, description, cpu)
