"""The load-balancing loss of an MoE is a float64 reference's, however tokens are divided and padded.

Budget: as in test_layouts, 1e-5 relative, of which two steps use less than ten do.
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
from simpo_megatron.data.batching.padding import microbatch_shape

WORKER = Path(__file__).with_name("layout_worker.py")
NUM_RANKS, NUM_STEPS, BATCH = 4, 2, 8
SETTINGS = TwinSettings()
PIPELINE = {"pipeline_model_parallel_size": 2}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# Every stage of a pipeline pads packs to one length, sequence and context parallelism to a multiple of 2 and 4.
LAYOUTS = {
    "pp2_dp2": PIPELINE,
    "pp2_vpp2_dp2": PIPELINE | {"virtual_pipeline_model_parallel_size": 2},
    "pp2_tp2_ep2_full_recompute": {
        **PIPELINE,
        **TENSOR,
        "expert_model_parallel_size": 2,
        "recompute_granularity": "full",
    },
    "ep2_dp4": {"expert_model_parallel_size": 2},
    "tp2_dp2_fixed_pack_length": TENSOR | {"fixed_pack_length": True},
    "cp2_dp2_ep2": {"context_parallel_size": 2, "expert_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the twin's record, its weights, the initial model, the folder of the layouts' results)."""
    folder = tmp_path_factory.mktemp("balance")
    torch.manual_seed(3)
    config = MixtralConfig(**TINY, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model.save_pretrained(folder / "model")
    pairs = random_pairs(NUM_STEPS * BATCH)
    options = SETTINGS.of_trainer(batch_size=BATCH, num_steps=NUM_STEPS) | {
        "beta": SETTINGS.beta, "gamma_beta_ratio": SETTINGS.gamma_beta_ratio, "tokens_per_microbatch": 64,
        "moe_aux_loss_coeff": COEFFICIENT, "max_length": 40, "max_prompt_length": 20,
    }  # fmt: skip
    job = dict(model=str(folder / "model"), pairs=pairs, num_steps=NUM_STEPS, options=options, layouts=LAYOUTS)
    (folder / "job.json").write_text(json.dumps(job | {"poisoned": ()}))
    run_ranks(WORKER, NUM_RANKS, str(folder))

    lengths = np.array([[len(ids) for ids in pair] for pair in pairs])
    batch = BatchOptions(global_batch_size=BATCH, tokens_per_microbatch=64)
    steps = []
    for step in range(NUM_STEPS):
        plans = [plan_step(lengths, step * BATCH, batch, dp_size=1, microbatch_multiple=n) for n in (1, 2, 4)]
        assert plans[0] == plans[1] == plans[2], "no layout cuts pairs into other microbatches"
        widths = {microbatch_shape(lengths[list(microbatch)], batch).width for microbatch in plans[0][0]}
        assert len(widths) > 1, "packs of a step differ in length, so that some are padded"
        steps.append([[pairs[index] for index in microbatch] for microbatch in plans[0][0]])
    logged, record, weights = train_balanced(model, steps, SETTINGS, folder / "twin")
    return (*zip(*logged, strict=True), record.grad_norm), weights, folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_twins_losses_and_gradients_and_padding_counts_nowhere(runs, layout):
    expected, weights, folder = runs
    steps = json.loads((folder / f"{layout}.json").read_text())
    for key, values in zip(("loss", "load_balancing_loss", "grad_norm"), expected, strict=True):
        assert [step[key] for step in steps] == pytest.approx(values, rel=RELATIVE), key
    found = weights_in(folder / layout)
    assert found.keys() == weights.keys()
    for part in ("gate", "experts", ""):
        names = [name for name in weights if part in name]
        assert names and relative_difference(found, weights, names) <= RELATIVE, part
