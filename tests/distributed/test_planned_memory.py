"""The planner's bytes against megatron-core's allocations at 70B and the memory of real training steps."""

import json
from pathlib import Path

import pytest
from planning_cases import HF_CONFIG, pack_of, shape_of
from ranks import REPOSITORY, run_ranks

from simpo_megatron.config import config_from
from simpo_megatron.mcore.families import describe_hf_config
from simpo_megatron.planning.memory import activation_bytes, head_bytes, stage_memory
from simpo_megatron.planning.models import PUBLISHED
from simpo_megatron.planning.parameters import adapter_parameters, stage_parameters
from simpo_megatron.planning.shapes import ModelShape, Pack
from simpo_megatron.planning.workload import Workload

WORKERS = REPOSITORY / "tests" / "distributed"
LAYOUT = {"tp": 8, "pp": 4, "sequence_parallel": True, "use_distributed_optimizer": True}
LLAMA, QWEN = PUBLISHED["meta-llama/Llama-3.1-70B-Instruct"], PUBLISHED["Qwen/Qwen2.5-72B-Instruct"]
GEMMA = PUBLISHED["google/gemma-2-9b-it"]
TIED = HF_CONFIG | {"model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True}
OVERLAPPED = {**LAYOUT, "vpp": 5, "overlap_grad_reduce": True, "overlap_param_gather": True}
ALLOCATIONS = {
    # Each stage of TP8 x PP4, by its first tensor rank and its last.
    "llama 70b": {"model": LLAMA, "options": LAYOUT, "world": 32, "ranks": [0, 7, 8, 16, 24, 31]},
    "over two replicas, interleaved": {"model": LLAMA, "options": OVERLAPPED, "world": 64, "ranks": [0, 63]},
    "undivided": {
        "model": LLAMA,
        "options": {**LAYOUT, "use_distributed_optimizer": False},
        "world": 64,
        "ranks": [63],
    },
    "biases": {"model": QWEN, "options": LAYOUT, "world": 32, "ranks": [0, 16, 31]},
    "tied on two stages": {"model": TIED, "options": {"tp": 2, "pp": 2, "fp32": True}, "world": 4, "ranks": [1, 3]},
    "adapters": {
        "model": LLAMA,
        "options": {**LAYOUT, "lora_rank": 16, "lora_targets": ("linear_qkv", "linear_fc2")},
        "world": 64,
        "ranks": [0, 63],
    },
    "gemma-2": {"model": GEMMA, "options": {"tp": 8}, "world": 8, "ranks": [3]},
    "experts over replicas and tensor ranks": {
        "model": PUBLISHED["mistralai/Mixtral-8x7B-Instruct-v0.1"],
        "options": {"tp": 2, "sequence_parallel": True, "use_distributed_optimizer": True, "ep": 4},
        "world": 16,
        "ranks": [0, 15],
    },
    "many experts, undivided optimizer": {
        "model": PUBLISHED["Qwen/Qwen3-30B-A3B"],
        "options": {"pp": 4, "ep": 8},
        "world": 32,
        "ranks": [8, 31],
    },
    "many experts, adapters": {
        "model": PUBLISHED["Qwen/Qwen3-235B-A22B"],
        "options": {"pp": 2, "ep": 16, "cp": 2, "lora_rank": 8, "lora_targets": ("linear_qkv", "linear_proj")},
        "world": 64,
        "ranks": [40],
    },
    "tied on one": {"model": TIED, "options": {"tp": 2, "use_distributed_optimizer": True}, "world": 4, "ranks": [2]},
}


def test_weights_gradients_and_optimizer_are_what_megatron_allocates(tmp_path):
    """Built on the meta device under torch's fake process group: every byte, rank by rank."""
    named = {"model": "m", "data": ("d",)}
    job = {name: {**case, "options": named | case["options"]} for name, case in ALLOCATIONS.items()}
    (tmp_path / "job.json").write_text(json.dumps(job))
    run_ranks(WORKERS / "allocation_worker.py", 1, str(tmp_path))
    measured = json.loads((tmp_path / "measured.json").read_text())
    for name, case in job.items():
        config = config_from(**case["options"])
        sizes = config.parallel.sizes
        load = Workload(
            shape=ModelShape.of(describe_hf_config(case["model"], "config.json")),
            config=config,
            pack=Pack(tokens=8192, prompt=300, response=400),
            data_parallel_size=case["world"] // sizes.model,
            num_microbatches=1,
        )
        for rank in case["ranks"]:
            stage = rank // (case["world"] // sizes.pipeline)
            memory = stage_memory(load, stage)
            planned = {
                "parameters": stage_parameters(load.shape, sizes, stage) + adapter_parameters(load),
                "weights": memory.weights,
                "gradients": memory.gradients,
                "optimizer": memory.optimizer,
            }
            assert measured[name][str(rank)] == planned, f"{name}, rank {rank}"
    assert measured["llama 70b"]["8"]["parameters"] == 20 * (8192 * (1280 + 1024) + 3 * 8192 * 3584 + 2 * 8192)


SMALL = {"model": "m", "data": ("d",), "fp32": True, "global_batch_size": 4, "tokens_per_microbatch": 1024}
BF16 = {key: value for key, value in SMALL.items() if key != "fp32"}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
ONE_RANK = {
    "all kept": {"options": SMALL},
    "bf16, prompts twice": {"options": BF16 | {"prefix_sharing": False, "tokens_per_microbatch": 1248}},
    "core attention and mlp": {
        "options": SMALL | {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")}
    },
    "whole layers, two a unit": {"options": SMALL | {"recompute": "full", "recompute_num_layers": 2}},
    "adapters": {"options": SMALL | {"lora_rank": 16, "lora_targets": ("linear_qkv", "linear_fc1")}},
    "gemma-2": {"options": SMALL, "model": {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}},
    "experts": {"options": SMALL, "model": EXPERTS},
    "experts recomputed": {
        "options": SMALL | {"recompute": "selective", "recompute_modules": ("moe",)},
        "model": EXPERTS,
    },
    "padded pairs": {"options": SMALL | {"packing": False, "prefix_sharing": False, "micro_batch_size": 2}},
    "a pair at a time": {"options": SMALL | {"packing": False}},
    "a large vocabulary, tied": {"options": SMALL, "model": {"vocab_size": 32768, "tie_word_embeddings": True}},
}
TWO_RANKS = {
    "tp and sp": {"options": SMALL | {"tp": 2, "sequence_parallel": True}},
    "pp, four microbatches": {"options": SMALL | {"pp": 2, "global_batch_size": 16}},
    "pp, interleaved": {"options": SMALL | {"pp": 2, "vpp": 2, "global_batch_size": 16}},
}


@pytest.mark.parametrize(("cases", "num_ranks"), [(ONE_RANK, 1), (TWO_RANKS, 2)], ids=["one rank", "two ranks"])
def test_activations_and_the_peak_of_a_step_are_what_a_run_measures(cases, num_ranks, tmp_path):
    (tmp_path / "job.json").write_text(json.dumps(cases))
    run_ranks(WORKERS / "memory_worker.py", num_ranks, str(tmp_path), fresh=True)
    for name, case in cases.items():
        for rank in range(num_ranks):
            measured = json.loads(Path(tmp_path, f"{name}.{rank}.json").read_text())
            config = config_from(**case["options"])
            load = Workload(
                shape=shape_of(case),
                config=config,
                pack=pack_of(case),
                data_parallel_size=1,
                num_microbatches=measured["microbatches"],
                engine="torch",
            )
            stage = rank if config.parallel.pipeline_model_parallel_size > 1 else 0
            memory = stage_memory(load, stage)
            peak = memory.activations + memory.loss + memory.communication
            print(f"{name}, rank {rank}: peak {measured['peak']}, planned {peak:.0f}")
            assert peak == pytest.approx(measured["peak"], rel=0.15), f"{name}, rank {rank}"
            if "kept" in measured:
                kept = activation_bytes(load, 0) + head_bytes(load)[0]
                assert kept == pytest.approx(measured["kept"], rel=0.1), name
