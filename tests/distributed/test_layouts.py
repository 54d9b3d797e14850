"""The same pairs trained under every parallel layout give the same run, and it is the float64 reference's run.

Half of the pairs have responses of several turns: tokens of context stand among those that count.

Budget. Each step's loss, gradient norm and margin, and the trained weights, must lie within 1e-5 of the twin, relative
(weights: relative norm of the difference of all weights). fp32 rounds at 6e-8; the rest is from sums over a few hundred
terms in different orders, the twin's exact softmax, and ten AdamW steps whose first ones divide by gradients near zero.
Measured: at most 2e-6.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig, Qwen3Config
from twin import TwinSettings, train, with_context

from simpo_megatron.data import BatchOptions, plan_step

WORKER = Path(__file__).with_name("layout_worker.py")
NUM_RANKS, NUM_STEPS, BATCH = 4, 10, 8
PROMPTS = [[5, 9, 200, 31], [77], [3, 3, 258, 1, 40, 41, 42]]
RELATIVE = 1e-5
VOCAB = 259  # prime: divides over no number of ranks

SETTINGS = TwinSettings(gamma_beta_ratio=0.3, sft_weight=0.1)
OPTIONS = SETTINGS.of_trainer(batch_size=BATCH, num_steps=NUM_STEPS) | dict(
    beta=SETTINGS.beta,
    gamma_beta_ratio=SETTINGS.gamma_beta_ratio,
    sft_weight=SETTINGS.sft_weight,
)
# Four ranks: what tp, pp and cp leave over is data parallelism.
LAYOUTS = {
    "dp4": {},
    "dp4_distributed_optimizer": {"use_distributed_optimizer": True},
    "dp4_distributed_optimizer_overlapped": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "tp2_dp2": {"tensor_model_parallel_size": 2},
    "tp2_dp2_sequence_parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp4": {"tensor_model_parallel_size": 4},
    "tp4_sequence_parallel_full_recompute": {
        "tensor_model_parallel_size": 4,
        "sequence_parallel": True,
        "recompute_granularity": "full",
    },
    "pp2_dp2": {"pipeline_model_parallel_size": 2},
    "pp2_tp2": {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2},
    "pp2_tp2_sequence_parallel_selective_recompute": {
        "pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "recompute_granularity": "selective",
        "recompute_modules": ("core_attn", "layernorm"),
    },
    "pp2_vpp2_dp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "pp2_vpp2_tp2_sequence_parallel": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
    },
    "pp4": {"pipeline_model_parallel_size": 4},
    "pp4_vpp2": {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
    "pp2_vpp3_dp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
    "pp2_dp2_fixed_pack_length": {"pipeline_model_parallel_size": 2, "fixed_pack_length": True},
    "cp4": {"context_parallel_size": 4},
    "cp2_dp2_distributed_optimizer_overlapped": {
        "context_parallel_size": 2,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "cp2_tp2_sequence_parallel_full_recompute": {
        "context_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "recompute_granularity": "full",
    },
    "cp2_pp2": {"context_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "padded_rows_cp2_tp2": {
        "context_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "packing": False,
        "prefix_sharing": False,
        "micro_batch_size": 2,
    },
    "padded_rows_tp2": {
        "tensor_model_parallel_size": 2,
        "packing": False,
        "prefix_sharing": False,
        "micro_batch_size": 2,
    },
    "padded_rows_pp2_sequence_parallel": {
        "pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "packing": False,
        "prefix_sharing": False,
        "micro_batch_size": 2,
    },
    "bf16_tp2_sequence_parallel_distributed_optimizer": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "use_distributed_optimizer": True,
        "bf16": True,
    },
    "ep2_dp4": {"expert_model_parallel_size": 2},
    "tp2_dp2_sequence_parallel_ep4_distributed_optimizer": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 4,
        "use_distributed_optimizer": True,
    },
    "pp2_tp2_sequence_parallel_ep2_full_recompute": {
        "pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
        "recompute_granularity": "full",
    },
    "cp2_dp2_ep2": {"context_parallel_size": 2, "expert_model_parallel_size": 2},
    "cp2_tp2_sequence_parallel_ep4_distributed_optimizer": {
        "context_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 4,
        "use_distributed_optimizer": True,
    },
    "packed_without_prefix_sharing": {"prefix_sharing": False, "tensor_model_parallel_size": 2},
    "prefix_sharing_without_packing": {"packing": False, "pipeline_model_parallel_size": 2},
}
# More chunks than the other models have layers.
DEEP_LAYOUTS = {"pp4_vpp2": 8, "pp2_vpp3_dp2": 6}


TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
EXPERT_LAYOUTS = tuple(name for name, options in LAYOUTS.items() if "expert_model_parallel_size" in options)
# Name: (configuration, layouts). A tied model only adds the gradient that two stages share, and Gemma-2 its own norms,
# caps and windows: the layouts that cut these differently will do. Mixtral's load-balancing loss is off: its value
# depends on how pairs are cut into microbatches. Of one key/value group four ranks hold parts that end within a head;
# where ranks share a group, norms of query and key add up what each of them has for it.
MODELS = {
    "untied": (LlamaConfig(**TINY, tie_word_embeddings=False), tuple(set(LAYOUTS) - {*EXPERT_LAYOUTS, *DEEP_LAYOUTS})),
    "tied": (
        LlamaConfig(**TINY, tie_word_embeddings=True),
        ("dp4_distributed_optimizer_overlapped", "tp4", "pp2_tp2", "pp2_vpp2_dp2"),
    ),
    "gemma2": (
        Gemma2Config(
            **TINY,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=9,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=2.0,
        ),
        (
            "pp2_vpp2_tp2_sequence_parallel",
            "pp2_tp2_sequence_parallel_selective_recompute",
            "padded_rows_tp2",
            "cp4",
            "padded_rows_cp2_tp2",
        ),
    ),
    "one_group": (
        LlamaConfig(**TINY | {"num_key_value_heads": 1}, attention_bias=True),
        ("tp4", "tp4_sequence_parallel_full_recompute"),
    ),
    "two_groups": (
        Qwen3Config(**TINY | {"num_key_value_heads": 2}, head_dim=6),
        ("tp4", "tp4_sequence_parallel_full_recompute"),
    ),
    "mixtral": (
        MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.0),
        (*EXPERT_LAYOUTS, "tp2_dp2_sequence_parallel"),
    ),
} | {
    f"of_{layers}_layers": (LlamaConfig(**TINY | {"num_hidden_layers": layers}), (name,))
    for name, layers in DEEP_LAYOUTS.items()
}


def random_pairs(num_pairs: int) -> list[list[list[int]]]:
    """Ragged pairs, one-token responses among them, over the whole vocabulary."""
    random = np.random.default_rng(7)
    pairs = []
    for index in range(num_pairs):
        lengths = random.integers([1, 1, 1], [14, 18, 18])
        if index % 5 == 0:
            lengths[1 + index % 2] = 1
        pairs.append([random.integers(1, VOCAB, size=n).tolist() for n in lengths])
    return pairs


@pytest.fixture(scope="module", params=MODELS)
def runs(request, tmp_path_factory):
    """(the twin's record, its weights, the folder of the layouts' results) for one model."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    config, names = MODELS[request.param]
    # Experts one by one: a grouped product has no float64.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model.save_pretrained(folder / "model")
    pairs = random_pairs(3 * BATCH + 1)
    if config.num_hidden_layers == TINY["num_hidden_layers"]:
        # In deeper models Adam's first steps blow up the roundings of so few tokens (3e-5 after seven steps).
        pairs = with_context(pairs)
    chosen = {name: LAYOUTS[name] for name in names}
    job = dict(
        model=str(folder / "model"),
        pairs=pairs,
        prompts=PROMPTS,
        num_steps=NUM_STEPS,
        options=OPTIONS,
        layouts=chosen,
        poisoned=() if request.param == "mixtral" else POISONED,  # the poisoned weight is a dense layer's
    )
    (folder / "job.json").write_text(json.dumps(job))
    run_ranks(WORKER, NUM_RANKS, str(folder), timeout=420)

    twin = model.double()
    options = BatchOptions(global_batch_size=BATCH, tokens_per_microbatch=128)
    lengths = np.array([[len(ids) for ids in pair] for pair in pairs])
    batches = [
        [pairs[i] for rank in plan_step(lengths, step * BATCH, options, dp_size=1) for mb in rank for i in mb]
        for step in range(NUM_STEPS)
    ]
    record = train(twin, batches, SETTINGS)
    twin.save_pretrained(folder / "twin")
    return record, load_file(folder / "twin" / "model.safetensors"), folder, chosen


def test_every_layout_continues_prompts_as_the_twin_does(runs):
    *_, folder, layouts = runs
    twin = AutoModelForCausalLM.from_pretrained(folder / "twin", dtype=torch.float64, experts_implementation="eager")
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(twin(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS), "prompts lead to different text"
    for name in fp32(layouts):
        for rank in range(NUM_RANKS):
            assert json.loads((folder / f"{name}.samples{rank}.json").read_text()) == expected, f"{name}, rank {rank}"


def fp32(layouts: dict) -> list[str]:
    return [name for name in layouts if not layouts[name].get("bf16")]


# After its last step, one weight of one rank turns NaN: the worker checks that the next step is refused everywhere.
POISONED = ("dp4_distributed_optimizer", "tp2_dp2_sequence_parallel", "pp2_tp2")


def test_every_layout_takes_the_twins_steps(runs):
    record, _, folder, layouts = runs
    for name in fp32(layouts):
        steps = json.loads((folder / f"{name}.json").read_text())
        for key, expected in (
            ("loss", record.loss),
            ("grad_norm", record.grad_norm),
            ("rewards/margins", record.margin),
        ):
            found = np.array([step[key] for step in steps])
            scale = np.maximum(np.abs(expected), 1.0)  # a margin is a difference of numbers of this size
            error = np.abs(found - expected) / scale
            assert np.all(error <= RELATIVE), f"{name}: {key} is off by {error.max():.1e}: {found} {expected}"


def test_every_layout_ends_with_the_twins_weights(runs):
    _, expected, folder, layouts = runs
    norm = torch.sqrt(sum(value.pow(2).sum() for value in expected.values()))
    for name in fp32(layouts):
        found = {}
        for file in (folder / name).glob("*.safetensors"):
            found |= load_file(file)
        assert set(found) == set(expected), name
        difference = torch.sqrt(sum((found[k].double() - v).pow(2).sum() for k, v in expected.items()))
        assert float(difference / norm) <= RELATIVE, f"{name}: weights are off by {float(difference / norm):.1e}"


def test_bf16_follows_the_twin_as_closely_as_its_eight_bits_allow(runs):
    """Roundings of 2^-9 average out over responses and pairs; measured 1.5e-3 after ten steps, budget 1e-2."""
    record, _, folder, layouts = runs
    for name in set(layouts) - set(fp32(layouts)):
        steps = json.loads((folder / f"{name}.json").read_text())
        for key, expected in (("loss", record.loss), ("rewards/margins", record.margin)):
            error = np.abs([step[key] for step in steps] - np.array(expected))
            assert np.all(error <= 1e-2), f"{name}: {key} is off by {error}"


def test_the_twin_learns_so_that_agreeing_with_it_means_something(runs):
    record, *_ = runs
    assert np.mean(record.margin[-3:]) > np.mean(record.margin[:3]) + 0.05
