"""Every file in configs/ loads, fits the model it is for, and raises no warning it does not explain."""

from pathlib import Path

import pytest

from simpo_megatron.config import Machine, lint, load_config, resolve

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
H100 = Machine(has_cuda=True, has_transformer_engine=True, compute_capability=(9, 0))
SHAPES = {
    "smollm2": {
        "num_layers": 30,
        "num_attention_heads": 9,
        "num_query_groups": 3,
        "hidden_size": 576,
        "ffn_hidden_size": 1536,
    },
    "llama3_8b": {
        "num_layers": 32,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
    },
    "llama3_70b": {
        "num_layers": 80,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "hidden_size": 8192,
        "ffn_hidden_size": 28672,
    },
}
NUM_RANKS = {"smollm2_cpu": 2, "llama3_8b_instruct_v0.2_8xh100": 8, "llama3_70b_32xh100": 32}


def test_there_are_configs_to_test():
    assert {path.stem for path in CONFIGS} == set(NUM_RANKS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_fits_its_model_and_its_ranks(path):
    config = load_config(["--config", str(path), "--model", "m", "--data", "d"])
    (shape,) = [shape for name, shape in SHAPES.items() if path.stem.startswith(name)]
    layout = resolve(config, world_size=NUM_RANKS[path.stem], model=shape, machine=H100)
    assert layout.data_parallel_size * config.parallel.sizes.model == NUM_RANKS[path.stem]


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if "h100" in path.stem], ids=lambda path: path.stem
)
def test_a_config_for_gpus_stays_within_published_settings(path):
    assert lint(load_config(["--config", str(path)])) == []
