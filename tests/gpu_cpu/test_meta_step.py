"""A training microbatch asks nothing of a GPU and sends it nothing, counted on the meta device (`meta_step.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
from counts import check_counts

# One process plays all cases; the tests are few, so that one worker has them all.
pytestmark = pytest.mark.processes
WORKER = Path(__file__).with_name("meta_step.py")
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
# Tokens of prompt, chosen, rejected: 8 pairs, 8,176 tokens in all where each prompt stands once.
PAIRS = [[200 + 11 * i, 380 - 7 * i, 390 + 9 * i] for i in range(8)]
PACKED = {"tokens_per_microbatch": 8192}
PADDED = {"packing": False, "prefix_sharing": False, "micro_batch_size": 8}


def one_rank(num_layers: int, **batch) -> dict:
    return {"model": {**TINY, "num_hidden_layers": num_layers}, "pairs": PAIRS, "batch": batch, "options": {}}


def of_70b(stage: int, **options) -> dict:
    layout = {"tp": 8, "pp": 4, "sequence_parallel": True, "use_distributed_optimizer": True} | options
    ranks = layout["tp"] * 2 * layout.get("cp", 1)
    batch = {**PACKED, "sequence_multiple": ranks, "fixed_pack_length": True}
    return {"model": LLAMA_70B, "pairs": PAIRS, "batch": batch, "options": layout, "stage": stage}


NUM_EXPERTS = 8


def moe(num_layers: int, **options) -> dict:
    """Packs of one length, whose tokens the experts divide."""
    shape = {**TINY, "num_hidden_layers": num_layers, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
    batch = {**PACKED, "sequence_multiple": 16, "fixed_pack_length": True}
    return {"kind": "mixtral", "model": shape, "pairs": PAIRS, "batch": batch, "options": options}


CASES = {
    "2 layers, packed": one_rank(2, **PACKED),
    "4 layers, packed": one_rank(4, **PACKED),
    "2 layers, padded": one_rank(2, **PADDED),
    "4 layers, padded": one_rank(4, **PADDED),
    "2 layers, cp 2": one_rank(2, **PACKED, sequence_multiple=4) | {"options": {"cp": 2}},
    "4 layers, cp 2": one_rank(4, **PACKED, sequence_multiple=4) | {"options": {"cp": 2}},
    **{f"70B, stage {stage}": of_70b(stage) for stage in range(4)},
    "70B, stage 3, cp 2": of_70b(3, cp=2),
    "70B, stage 1, recomputed": of_70b(1, recompute="full"),
    "2 layers, padded, cp 2": one_rank(2, **PADDED, sequence_multiple=4) | {"options": {"cp": 2}},
}
MOE_CASES = {
    "2 layers, MoE": moe(2),
    "4 layers, MoE": moe(4),
    "2 layers, MoE over 2 ranks": moe(2, tp=2, ep=2, sequence_parallel=True),
}
PLANTED = {plant: one_rank(1, **PACKED) | {"plant": plant} for plant in ("a number", "a tensor", "an index")}
WAITS = {plant: one_rank(1, **PACKED) | {"plant": plant} for plant in ("a wait", "a question")}

# A router and a permutation more than in a dense layer, and two weight gradients of each expert, not an MLP's two.
MAX_OF_MOE = {"forward": 70, "backward": 74 + 2 * NUM_EXPERTS}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict[str, dict]:
    """By case, what a rank's GPU would be asked."""
    folder = tmp_path_factory.mktemp("meta")
    (folder / "job.json").write_text(json.dumps(CASES | MOE_CASES | PLANTED | WAITS | {"check": {"check": True}}))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, WORKER, folder], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.pop("case"): line for line in map(json.loads, done.stdout.splitlines())}


def test_nothing_is_copied_or_waited_for_within_a_microbatch(asked):
    for case in CASES:
        assert "raised" not in asked[case], (case, asked[case])
        assert asked[case]["copies"] == [], case


def test_an_moe_waits_for_the_counts_of_megatrons_dispatcher_alone(asked):
    """A layer sends its experts' counts to the host, which splits tokens by them, and one copy of them back.

    megatron-core 0.16 waits twice more, for the number of permuted tokens, unless Transformer Engine permutes.
    """
    for case in MOE_CASES:
        assert "raised" not in asked[case], (case, asked[case])
        num_layers = MOE_CASES[case]["model"]["num_hidden_layers"]
        copies = [(copy["where"].partition(":")[0], copy["waits"]) for copy in asked[case]["copies"]]
        assert copies == [("transfer.py", False)] * num_layers, case
        waits = Counter(place.partition(":")[0] for place in asked[case]["waits"])
        # The counts of experts and of each rank's tokens, in one wait for a stream beside.
        of_counts = 5 if "ranks" in case else 2
        of_permutation = {"moe_utils.py": 2 * num_layers} if version("megatron-core") < "0.17" else {}
        assert waits == {"token_dispatcher.py": of_counts * num_layers, **of_permutation}, case


def test_an_moe_layer_takes_few_operations(asked):
    for phase, most in MAX_OF_MOE.items():
        two, four = (sum(asked[f"{layers} layers, MoE"][phase].values()) for layers in (2, 4))
        assert (four - two) / 2 <= most, (phase, two, four)
    assert asked["4 layers, MoE"]["forward"]["_grouped_mm"] == 4 * 2


def test_one_copy_brings_a_microbatch_and_nobody_waits(asked):
    for case in (*CASES, *MOE_CASES):
        assert [copy["waits"] for copy in asked[case]["transfers"]] == [False], case
        assert asked[case]["to_microbatch"] == {}, case


def test_a_layer_takes_no_more_operations_than_are_kept_whatever_the_segments_of_a_pack(asked):
    # On a GPU fewer are launched: of those forward 24 are the rotary embedding's and 3 SwiGLU's, all of which are
    # compiled to three kernels.
    found = {}
    for kind in ("packed", "padded", "cp 2"):
        for phase in ("forward", "backward"):
            two, four = (sum(asked[f"{layers} layers, {kind}"][phase].values()) for layers in (2, 4))
            found[f"{kind}, {phase}"] = four - two
    check_counts("operations of two layers", found)


def test_a_layer_has_one_attention_two_norms_and_four_products_each_way(asked):
    two, four = (asked[f"{layers} layers, packed"] for layers in (2, 4))
    kernels = {"forward": {"mm": 4, "_varlen_attn": 1, "_fused_rms_norm": 2}}
    # The gradients of the four inputs, and of the four weights, added to main_grad in fp32.
    kernels["backward"] = {"mm": 4, "addmm.dtype_out": 4, "_varlen_attn_backward": 1, "_fused_rms_norm_backward": 2}
    for phase, expected in kernels.items():
        assert {name: (four[phase][name] - two[phase][name]) / 2 for name in expected} == expected
    assert "grad accumulation fusion: on" in two["kernels"]


def test_the_model_of_gpu_check_runs_as_on_a_gpu_and_asks_nothing(asked):
    """Checks B1, B2 and S1 compute with it; on a GPU, unlike on a CPU, megatron's layers want a `main_grad`."""
    assert "raised" not in asked["check"], asked["check"]
    assert asked["check"]["copies"] == [] and asked["check"]["forward"]["addmm.dtype_out"] >= 4 * 4


def test_what_is_planted_is_found(asked):
    for plant in PLANTED:
        (copy,) = asked[plant]["copies"]
        assert copy["waits"] == (plant != "a tensor"), plant
    for plant in WAITS:
        assert "meta" in asked[plant]["raised"].lower(), asked[plant]
