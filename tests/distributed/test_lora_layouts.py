"""Adapters trained under every kind of layout take the steps of a float64 reference with explicit W + scale * B A.

Budgets are those of test_layouts.py. The twin knows one A for query, key and value (gate and up) and a B for each.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM
from twin import TwinSettings, train

from simpo_megatron.data import BatchOptions, plan_step
from simpo_megatron.mcore.lora import generator_of, initial_A

WORKER = Path(__file__).with_name("layout_worker.py")
NUM_RANKS, NUM_STEPS, BATCH, SEED = 4, 6, 8, 5
RELATIVE, BF16 = 1e-5, 1e-2
RANK, ALPHA = 3, 6.0
SETTINGS = TwinSettings(gamma_beta_ratio=0.3, lr=5e-3)
OPTIONS = SETTINGS.of_trainer(batch_size=BATCH, num_steps=NUM_STEPS) | dict(
    seed=SEED,
    beta=SETTINGS.beta,
    gamma_beta_ratio=SETTINGS.gamma_beta_ratio,
)
LORA = {"lora_rank": RANK, "lora_alpha": ALPHA}
TP2_SEQUENCE_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "dp4_overlapped": LORA | OVERLAPPED,
    "tp2_dp2": LORA | {"tensor_model_parallel_size": 2},
    "tp2_dp2_sequence_parallel": LORA | TP2_SEQUENCE_PARALLEL | {"use_distributed_optimizer": True},
    "tp2_pp2_vpp2_full_recompute": LORA
    | TP2_SEQUENCE_PARALLEL
    | {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "recompute_granularity": "full",
    },
    # More ranks than key/value groups.
    "tp4": LORA | {"tensor_model_parallel_size": 4, "sequence_parallel": True},
    "cp2_tp2_sequence_parallel": LORA | TP2_SEQUENCE_PARALLEL | {"context_parallel_size": 2},
    "bf16": LORA | TP2_SEQUENCE_PARALLEL | {"use_distributed_optimizer": True, "bf16": True},
    "without_adapters": TP2_SEQUENCE_PARALLEL | {"use_distributed_optimizer": True},
}
EXACT = [name for name in LAYOUTS if name not in ("bf16", "without_adapters")]
# Of each megatron layer: the Hugging Face layers that share its A.
HF_LAYERS = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}


class AdaptedTwin(torch.nn.Module):
    """A frozen float64 model whose layers' weights are W + ALPHA / RANK * B A."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self._base = [model.double().requires_grad_(False)]  # in a list, so that its weights are no parameters of this
        self.shared, self.own = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        weights = dict(model.named_parameters())
        for number in range(model.config.num_hidden_layers):
            for target, names in HF_LAYERS.items():
                for name in names:
                    weight = weights[f"model.layers.{number}.{name}.weight"]
                    self.own[f"{number} {name}".replace(".", "/")] = weight.new_zeros(weight.shape[0], RANK)
                draw = generator_of(SEED, number + 1, target)
                self.shared[f"{number} {target}"] = initial_A(RANK, weight.shape[1], draw).double()

    def weights(self) -> dict[str, torch.Tensor]:
        merged = dict(self._base[0].named_parameters())
        for key, A in self.shared.items():
            number, target = key.split()
            for name in HF_LAYERS[target]:
                B = self.own[f"{number} {name}".replace(".", "/")]
                full = f"model.layers.{number}.{name}.weight"
                merged[full] = merged[full] + ALPHA / RANK * B @ A
        return merged

    def forward(self, ids: torch.Tensor):
        return functional_call(self._base[0], self.weights(), (ids,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the twin's record, its merged weights, the base's, the folder of the layouts' results)."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            max_position_embeddings=64,
        )
    )
    model.save_pretrained(folder / "model")
    base = {name: value.detach().double() for name, value in model.named_parameters()}
    random = np.random.default_rng(0)
    pairs = [
        [random.integers(1, 259, size=n).tolist() for n in random.integers(1, 12, size=3)] for _ in range(3 * BATCH)
    ]
    job = dict(
        model=str(folder / "model"), pairs=pairs, num_steps=NUM_STEPS, options=OPTIONS, layouts=LAYOUTS, poisoned=[]
    )
    (folder / "job.json").write_text(json.dumps(job))
    run_ranks(WORKER, NUM_RANKS, str(folder), timeout=420)

    options = BatchOptions(global_batch_size=BATCH, tokens_per_microbatch=128, seed=SEED)
    lengths = np.array([[len(ids) for ids in pair] for pair in pairs])
    batches = [
        [pairs[i] for rank in plan_step(lengths, step * BATCH, options, dp_size=1) for mb in rank for i in mb]
        for step in range(NUM_STEPS)
    ]
    twin = AdaptedTwin(model)
    record = train(twin, batches, SETTINGS)
    return record, {name: value.detach() for name, value in twin.weights().items()}, base, folder


def steps_of(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [*EXACT, "bf16"])
def test_every_layout_takes_the_twins_steps(runs, name):
    record, _, _, folder = runs
    budget = BF16 if name == "bf16" else RELATIVE
    keys = [("loss", record.loss), ("rewards/margins", record.margin), ("grad_norm", record.grad_norm)]
    for key, expected in keys[: 2 if name == "bf16" else 3]:
        found = np.array([step[key] for step in steps_of(folder, name)])
        error = np.abs(found - expected) / np.maximum(np.abs(expected), 1.0)
        assert np.all(error <= budget), f"{key} is off by {error.max():.1e}: {found} {expected}"


@pytest.mark.parametrize("name", EXACT)
def test_every_layout_exports_the_twins_merged_weights_and_leaves_the_rest_alone(runs, name):
    _, expected, base, folder = runs
    found = {}
    for file in (folder / name).glob("*.safetensors"):
        found |= load_file(file)
    assert set(found) == set(expected)
    learned = torch.sqrt(sum((expected[k] - base[k]).pow(2).sum() for k in base))
    difference = torch.sqrt(sum((found[k].double() - v).pow(2).sum() for k, v in expected.items()))
    assert float(difference / learned) <= 1e-4, f"what was learned is off by {float(difference / learned):.1e}"
    for key in base:
        assert torch.equal(found[key].double(), base[key]) == (".layers." not in key or "norm" in key), key


def test_before_the_first_step_the_model_is_the_base_bit_for_bit(runs):
    *_, folder = runs
    adapted, without = (steps_of(folder, name)[0] for name in ("tp2_dp2_sequence_parallel", "without_adapters"))
    for key in ("loss", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert adapted[key] == without[key]


def test_the_twin_learns_so_that_agreeing_with_it_means_something(runs):
    record, *_ = runs
    assert np.mean(record.margin[-3:]) > np.mean(record.margin[:3]) + 0.05
