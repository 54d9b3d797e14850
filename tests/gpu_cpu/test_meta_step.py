"""A training microbatch asks nothing of a GPU and sends it nothing, counted on the meta device (`meta_step.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


CASES = {
    "2 layers, packed": one_rank(2, **PACKED),
    "4 layers, packed": one_rank(4, **PACKED),
    "2 layers, padded": one_rank(2, **PADDED),
    "4 layers, padded": one_rank(4, **PADDED),
    "2 layers, cp 2": one_rank(2, **PACKED, sequence_multiple=4) | {"options": {"cp": 2}},
    "4 layers, cp 2": one_rank(4, **PACKED, sequence_multiple=4) | {"options": {"cp": 2}},
    **{f"70B, stage {stage}": of_70b(stage) for stage in range(4)},
    "70B, stage 3, cp 2": of_70b(3, cp=2),
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict[str, dict]:
    """By case, what a rank's GPU would be asked."""
    folder = tmp_path_factory.mktemp("meta")
    (folder / "job.json").write_text(json.dumps(CASES))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, WORKER, folder], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.pop("case"): line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.processes
def test_nothing_is_copied_within_a_microbatch(asked):
    assert list(asked) == list(CASES), "none waited for the device, which raises"
    for name, found in asked.items():
        assert found["copies"] == [], name


@pytest.mark.processes
def test_one_copy_brings_a_microbatch_and_nobody_waits(asked):
    for name, found in asked.items():
        assert [copy["waits"] for copy in found["transfers"]] == [False], name
        assert found["to_microbatch"] == {}, name
