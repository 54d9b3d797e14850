"""Refusals before any process group exists: ranks, model and machine against the configuration."""

import pytest

from simpo_megatron.config import Machine, config_from, resolve
from simpo_megatron.errors import ConfigError

SMALL = {
    "num_layers": 12,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 512,
}
H100 = Machine(has_cuda=True, has_transformer_engine=True, compute_capability=(9, 0))


def layout(world_size=1, model=SMALL, machine=None, **options):
    given = {"model": "m", "data": ("d",)} | options
    return resolve(config_from(**given), world_size=world_size, model=model, machine=machine or Machine())


def refusal(**options):
    with pytest.raises(ConfigError) as refused:
        layout(**options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("world_size", "options", "data_parallel_size"),
    [
        (1, {}, 1),
        (8, {}, 8),
        (8, {"tp": 2}, 4),
        (8, {"tp": 2, "pp": 2, "cp": 2}, 1),
        (24, {"tp": 4, "pp": 3}, 2),
        (8, {"tp": 8}, 1),  # twice the key/value groups: megatron repeats them
    ],
)
def test_the_ranks_left_over_hold_different_pairs(world_size, options, data_parallel_size):
    assert layout(world_size, **options).data_parallel_size == data_parallel_size


@pytest.mark.parametrize(
    ("options", "multiple"),
    [
        ({}, 1),
        ({"tp": 2}, 1),
        ({"tp": 2, "sequence_parallel": True}, 2),
        ({"cp": 2}, 4),
        ({"tp": 2, "sequence_parallel": True, "cp": 2}, 8),
        ({"fp8": "tensorwise"}, 16),
        ({"fp8": "blockwise", "tp": 2, "sequence_parallel": True}, 256),
    ],
)
def test_a_microbatch_is_padded_so_that_every_ranks_share_fits_its_kernels(options, multiple):
    assert layout(8, machine=H100, **options).sequence_multiple == multiple


@pytest.mark.parametrize(
    ("machine", "options", "multiple"),
    [
        (H100, {"packing": False, "prefix_sharing": False}, 128),
        (H100, {"packing": False, "prefix_sharing": False, "cp": 2}, 128),
        (H100, {"packing": False}, 1),
        (Machine(has_cuda=True, compute_capability=(9, 0)), {"packing": False, "prefix_sharing": False}, 1),
        (Machine(), {"packing": False, "prefix_sharing": False}, 1),
    ],
)
def test_padded_rows_come_in_few_widths_where_each_costs_a_plan(machine, options, multiple):
    assert layout(8, machine=machine, **options).sequence_multiple == multiple


def test_the_interleaved_schedule_wants_microbatches_in_rounds_of_the_stages():
    assert layout(2, pp=2, vpp=3).microbatch_multiple == 2
    assert layout(2, pp=2).microbatch_multiple == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"world_size": 6, "tp": 4},
            "tensor_model_parallel_size: found 6 ranks, expected a multiple of tp 4 x pp 1 x cp 1 = 4",
        ),
        ({"world_size": 1, "tp": 8}, "torchrun --nproc-per-node 8"),
        ({"world_size": 3, "tp": 3}, "found 3, expected a divisor of the model's 8 attention heads"),
        (
            {"world_size": 4, "tp": 4, "model": SMALL | {"num_attention_heads": 12, "num_query_groups": 3}},
            "found 4, expected a divisor or a multiple of the model's 3 key/value groups",
        ),
        (
            {"world_size": 2, "tp": 2, "model": SMALL | {"ffn_hidden_size": 511}},
            "found 2, expected a divisor of the model's MLP width, 511",
        ),
        (
            {"world_size": 5, "pp": 5},
            "pipeline_model_parallel_size: found 5, expected a divisor of the model's 12",
        ),
        (
            {"world_size": 4, "pp": 4, "vpp": 2},
            "virtual_pipeline_model_parallel_size: found 2, expected a divisor of",
        ),
        (
            {"world_size": 2, "ep": 2},
            "expert_model_parallel_size: found 2, expected a divisor of the model's experts",
        ),
        (
            {"world_size": 6, "pp": 2, "ep": 2},
            "expert_model_parallel_size: found 2, expected a divisor of the 3 ranks of a pipeline stage",
        ),
        ({"moe_aux_loss_coeff": 0.1}, "moe_aux_loss_coeff: found 0.1, expected none; the model has no experts"),
        (
            {"recompute": "selective", "recompute_modules": ("core_attn", "moe")},
            "recompute_modules: found 'moe', expected mlp in its place",
        ),
        ({"world_size": 4, "global_batch_size": 3}, "global_batch_size: found 3, expected at least 4"),
        (
            {"world_size": 4, "pp": 2, "vpp": 2, "global_batch_size": 3},
            "global_batch_size: found 3, expected at least 4",
        ),
        (
            {"world_size": 2, "tp": 2, "sequence_parallel": True, "tokens_per_microbatch": 8191},
            "tokens_per_microbatch: found 8191, expected a multiple of 2",
        ),
        ({"model": SMALL, "data": ()}, "data: found none, expected preference files; add --data FILE"),
    ],
)
def test_a_layout_that_cannot_run_is_refused_with_the_numbers(options, expected):
    assert expected in refusal(**options)


def test_all_that_cannot_be_had_of_model_and_machine_is_told():
    options = {"tp": 3, "pp": 5, "ep": 2, "fp8": "delayed", "lora_rank": 500}
    with pytest.raises(ConfigError) as refused:
        layout(world_size=30, **options)
    told = "\n".join((str(refused.value), *refused.value.details))
    for key in ("tensor_model_parallel_size: found 3", "pipeline_model_parallel_size: found 5", "fp8_recipe: found"):
        assert key in told
    assert "expert_model_parallel_size: found 2" in told and "lora_rank: found 500" in told


def test_a_preset_without_a_model_says_what_its_runs_started_from():
    with pytest.raises(ConfigError, match=r"model: found none.*Meta-Llama-3-8B-Instruct.*add --model DIR"):
        resolve(config_from(preset="llama3-instruct"), world_size=1, model=SMALL, machine=Machine())


@pytest.mark.parametrize(
    ("recipe", "machine", "expected"),
    [
        ("tensorwise", Machine(), "a CUDA device, and none is there"),
        ("tensorwise", Machine(has_cuda=True, compute_capability=(9, 0)), "Transformer Engine"),
        ("mxfp8", H100, "compute capability 10.0, found 9.0"),
        (
            "blockwise",
            Machine(has_cuda=True, has_transformer_engine=True, compute_capability=(8, 9)),
            "9.0, found 8.9",
        ),
        (
            "blockwise",
            Machine(has_cuda=True, has_transformer_engine=True, compute_capability=(9, 0), cuda=(12, 8)),
            "a torch built with CUDA 12.9 or later, found 12.8",
        ),
        (
            "mxfp8",
            Machine(has_cuda=True, has_transformer_engine=True, compute_capability=(12, 0)),
            "compute capability below 12.0, found 12.0",
        ),
    ],
)
def test_fp8_is_an_error_where_it_would_silently_not_happen(recipe, machine, expected):
    message = refusal(machine=machine, fp8=recipe)
    assert message.startswith(f"fp8_recipe: found '{recipe}', expected ") and expected in message


def test_fp8_is_refused_for_widths_its_kernels_cannot_take():
    assert "hidden size, 120" in refusal(machine=H100, fp8="tensorwise", model=SMALL | {"hidden_size": 120})
    assert layout(machine=H100, fp8="blockwise").sequence_multiple == 128
    narrow = refusal(machine=H100, fp8="blockwise", world_size=8, tp=8)
    assert "MLP width per rank, 64" in narrow
    odd = refusal(machine=H100, fp8="tensorwise", world_size=4, tp=4, model=SMALL | {"kv_channels": 20})
    assert "query width per rank, 40" in odd
    # As in DeepSeek-V2-Lite, whose first layer is dense: 10,944 over 8 ranks.
    moe = SMALL | {"num_moe_experts": 4, "moe_ffn_hidden_size": 1408, "ffn_hidden_size": 10_944}
    eight = {"machine": H100, "fp8": "tensorwise", "world_size": 8, "tp": 8, "sequence_parallel": True}
    layout(model=moe, **eight)
    assert "MLP width per rank, 1368" in refusal(model=moe | {"moe_layer_freq": [0] + [1] * 11}, **eight)
    assert "shared experts per rank, 88" in refusal(model=moe | {"moe_shared_expert_intermediate_size": 704}, **eight)


@pytest.mark.parametrize("module", ["layernorm", "moe_act"])
def test_delayed_scaling_refuses_recomputed_norms_and_activations(module):
    moe = SMALL | {"num_moe_experts": 4, "moe_ffn_hidden_size": 64}
    options = {"recompute": "selective", "recompute_modules": (module,), "world_size": 1, "machine": H100}
    layout(model=moe, fp8="tensorwise", **options)
    assert f"recompute_modules: found '{module}', expected another fp8_recipe than delayed" in refusal(
        model=moe, fp8="delayed", **options
    )
