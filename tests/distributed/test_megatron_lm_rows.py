"""Under pipelines the hooks for Megatron-LM give rows of one length, and the run is the twin's.

No stage asks for a shape.
Budget: as in test_load_balancing, 1e-5 relative.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from balanced_twin import CHOSEN, COEFFICIENT, EXPERTS, relative_difference, train_balanced, weights_in
from ranks import run_ranks
from test_layouts import RELATIVE, TINY, random_pairs
from transformers import AutoModelForCausalLM, MixtralConfig
from twin import TwinSettings

from simpo_megatron.data import BatchOptions, plan_step

WORKER = Path(__file__).with_name("megatron_lm_rows_worker.py")
NUM_STEPS, BATCH, MICRO_BATCH, SEQ_LENGTH = 2, 8, 2, 46
SETTINGS = TwinSettings()
PIPELINE = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "pp2_tp2": PIPELINE | {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2_vpp2_dp2": PIPELINE | {"virtual_pipeline_model_parallel_size": 2},
}
MEGATRON = dict(
    seq_length=SEQ_LENGTH, micro_batch_size=MICRO_BATCH, global_batch_size=BATCH, rampup_batch_size=None, fp8=None,
    context_parallel_size=1, expert_model_parallel_size=1, tp_comm_overlap=False, seed=42, transformer_impl="local",
    max_position_embeddings=TINY["max_position_embeddings"], position_embedding_type="rope", rotary_percent=1.0,
    use_rope_scaling=False, rotary_seq_len_interpolation_factor=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """((loss, load-balancing loss, gradient norm) of each step of the twin, its weights, the layouts' results)."""
    folder = tmp_path_factory.mktemp("rows")
    torch.manual_seed(3)
    config = MixtralConfig(**TINY, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model.save_pretrained(folder / "model")
    pairs = random_pairs(NUM_STEPS * BATCH)
    for pair in pairs[::4]:
        pair[0] = [*range(1, 31), *pair[0]]  # fills a row of its own
    options = SETTINGS.of_trainer(batch_size=BATCH, num_steps=NUM_STEPS) | {"moe_aux_loss_coeff": COEFFICIENT}
    flags = [f"--simpo-beta={SETTINGS.beta}", f"--simpo-gamma-beta-ratio={SETTINGS.gamma_beta_ratio}"]
    job = dict(model=str(folder / "model"), pairs=pairs, num_steps=NUM_STEPS, options=options, layouts=LAYOUTS)
    (folder / "job.json").write_text(json.dumps(job | {"megatron": MEGATRON, "flags": flags}))
    run_ranks(WORKER, 4, str(folder))

    lengths = np.array([[len(ids) for ids in pair] for pair in pairs])
    batch = BatchOptions(
        global_batch_size=BATCH, tokens_per_microbatch=SEQ_LENGTH * MICRO_BATCH, one_shape_per_step=True
    )
    steps = []
    for step in range(NUM_STEPS):
        (microbatches,) = plan_step(lengths, step * BATCH, batch, dp_size=1, microbatch_multiple=BATCH // MICRO_BATCH)
        assert len(microbatches) == BATCH // MICRO_BATCH
        steps.append([[pairs[index] for index in microbatch] for microbatch in microbatches])
    assert len({len(microbatch) for step in steps for microbatch in step}) > 1, "rows differ in their pairs"
    logged, record, weights = train_balanced(model, steps, SETTINGS, folder / "twin")
    expected = [(*of_step, norm) for of_step, norm in zip(logged, record.grad_norm, strict=True)]
    return expected, weights, folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_twins_losses_and_weights(runs, layout):
    expected, weights, folder = runs
    found_steps = json.loads((folder / f"{layout}.json").read_text())
    assert len(found_steps) == NUM_STEPS
    for found, of_twin in zip(found_steps, expected, strict=True):
        assert found == pytest.approx(of_twin, rel=RELATIVE)
    found = weights_in(folder / layout)
    assert found.keys() == weights.keys()
    assert relative_difference(found, weights, list(weights)) <= RELATIVE
