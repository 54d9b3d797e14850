"""Every file in configs/ loads, fits the model and the GPUs it is for, and raises no warning it does not explain."""

from pathlib import Path

import pytest

from simpo_megatron.config import DEMO, PRESETS, Machine, lint, load_config, resolve
from simpo_megatron.planning.gpus import GPUS
from simpo_megatron.planning.layouts import PlanRequest, plan_one
from simpo_megatron.planning.models import find_model
from simpo_megatron.planning.shapes import Pack

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
ON_GPUS = [path for path in CONFIGS if path.stem.endswith("h100")]
MODELS = {"llama3_70b": "Llama-3.1-70B-Instruct", "qwen2.5_72b": "Qwen2.5-72B-Instruct"}
SMOLLM2 = {
    "num_layers": 30,
    "num_attention_heads": 9,
    "num_query_groups": 3,
    "hidden_size": 576,
    "ffn_hidden_size": 1536,
}


def loaded(path):
    return load_config(["--config", str(path), "--model", "m", "--data", "d", "--valid-fraction", "0.05"])


def test_the_config_for_a_cpu_fits_its_model_and_two_ranks():
    (path,) = set(CONFIGS) - set(ON_GPUS)
    assert resolve(loaded(path), world_size=2, model=SMOLLM2, machine=Machine()).data_parallel_size == 2


def test_each_published_setting_and_each_size_has_its_config():
    presets = {loaded(path).run.preset for path in ON_GPUS}
    assert presets - {None} == set(PRESETS) - {DEMO}
    large = {path.stem for path in ON_GPUS if loaded(path).run.preset is None}
    assert large == {f"{model}_{gpus}xh100" for model in MODELS for gpus in (32, 64, 128)} | {"llama3_70b_lora_8xh100"}


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_a_config_for_gpus_fits_them_and_keeps_them_busy(path):
    config = loaded(path)
    (model,) = [name for stem, name in MODELS.items() if path.stem.startswith(stem)] or [config.run.preset]
    num_gpus = int(path.stem.rpartition("_")[2].removesuffix("xh100"))
    job = PlanRequest(
        description=find_model(model),
        config=config,
        num_gpus=num_gpus,
        gpu=GPUS["h100-80gb"],
        pack=Pack(tokens=config.batch.tokens_per_microbatch, prompt=300, response=400),
    )
    plan = plan_one(job)
    assert plan.load.data_parallel_size * config.parallel.sizes.model == num_gpus
    assert plan.utilization > 0.4, f"{plan.utilization:.0%} planned"


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_a_config_for_gpus_stays_within_published_settings(path):
    assert lint(loaded(path)) == []
