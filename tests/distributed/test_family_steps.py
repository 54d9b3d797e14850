"""Models of every family take the training steps of a float64 reference, over tensor-parallel ranks and stages.

Budget: as in test_layouts, 1e-5 relative, of which two steps use less than ten do.
"""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import random_config
from ranks import run_ranks
from safetensors.torch import load_file
from test_layouts import RELATIVE, random_pairs
from tiny_models import DENSE, MOES
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from twin import TwinSettings, train

from simpo_megatron.data import BatchOptions, plan_step
from simpo_megatron.mcore.families import FAMILIES

WORKER = Path(__file__).with_name("layout_worker.py")
NUM_STEPS, BATCH = 2, 4
SETTINGS = TwinSettings(gamma_beta_ratio=0.3)
# What ranks share of a layer, and what stages share of a model.
TENSOR, PIPELINE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 2}
# One model of each family, and those whose arithmetic is not in it; test_layouts has Llama, Gemma 2 and Mixtral.
ELSEWHERE = {"llama", "gemma2", "mixtral", "mistral"}
MODELS = {
    name: (DENSE | MOES)[name][0]
    for name in (
        *(next(iter(family.tests)) for name, family in FAMILIES.items() if name not in ELSEWHERE),
        "llama_biases_of_attention",
        "phi3_partial_longrope",
        "qwen2_yarn",
    )
}
# Models of shapes that nobody has, over four ranks.
ODD = {
    f"odd_{name}": AutoConfig.for_model(**random_config(name, random.Random(f"odd {name}"), num_ranks=4))
    for name in ("deepseek_v2", "gemma3_text", "gpt_oss")
}
ON_TWO = {"tensor": TENSOR, "pipeline": PIPELINE}
ON_FOUR = {
    "tensor_4": TENSOR | {"tensor_model_parallel_size": 4},
    "tensor_pipeline": TENSOR | PIPELINE,
    "tensor_experts": TENSOR | {"expert_model_parallel_size": 2},
}
RUNS = [(name, layout) for name in MODELS for layout in ON_TWO]
RUNS += [("odd_deepseek_v2", "tensor_4"), ("odd_gemma3_text", "tensor_4"), ("odd_gemma3_text", "tensor_pipeline")]
RUNS += [("odd_gpt_oss", layout) for layout in ON_FOUR]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every model trained by one start of two ranks, or of four, and by the twin."""
    folder = tmp_path_factory.mktemp("families")
    for name, config in (MODELS | ODD).items():
        layouts = {layout: (ON_TWO | ON_FOUR)[layout] for model, layout in RUNS if model == name}
        write_job(folder / name, name, config, layouts)
    run_ranks(WORKER, 2, *(str(folder / name) for name in MODELS), timeout=500)
    run_ranks(WORKER, 4, *(str(folder / name) for name in ODD), timeout=200)
    return folder


def write_job(folder: Path, name: str, config: PretrainedConfig, layouts: dict[str, dict]) -> None:
    """A model of random weights, the worker's job, and what the twin makes of the same steps."""
    # Each prompt has the padding token, whose row of the embedding transformers gives no gradient.
    most, pad = config.vocab_size, config.pad_token_id
    pairs = [
        [[pad, *(id % most for id in prompt)], *([id % most for id in ids] for ids in responses)]
        for prompt, *responses in random_pairs(NUM_STEPS * BATCH)
    ]
    lengths = np.array([[len(ids) for ids in pair] for pair in pairs])
    options = SETTINGS.of_trainer(batch_size=BATCH, num_steps=NUM_STEPS) | {
        "beta": SETTINGS.beta, "gamma_beta_ratio": SETTINGS.gamma_beta_ratio,
        "max_length": 64, "max_prompt_length": 32,
    }  # fmt: skip
    plan = BatchOptions(global_batch_size=BATCH, tokens_per_microbatch=128)
    batches = [
        [pairs[i] for rank in plan_step(lengths, step * BATCH, plan, dp_size=1) for mb in rank for i in mb]
        for step in range(NUM_STEPS)
    ]
    # By its name, so that a model's weights do not change when another is added.
    torch.manual_seed(zlib.crc32(name.encode()))
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for values in (*model.parameters(), *biases):
            values.add_(0.05 * torch.randn_like(values))
    model.save_pretrained(folder / "model")
    job = dict(model=str(folder / "model"), pairs=pairs, num_steps=NUM_STEPS, options=options, layouts=layouts)
    (folder / "job.json").write_text(json.dumps(job | {"poisoned": ()}))
    record = train(model.double(), batches, SETTINGS)
    model.save_pretrained(folder / "twin")
    (folder / "twin.json").write_text(json.dumps({"loss": record.loss, "grad_norm": record.grad_norm}))


def tensors(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_a_family_takes_the_twins_steps(folder: Path, name: str, layout: str) -> None:
    expected = json.loads((folder / name / "twin.json").read_text())
    steps = json.loads((folder / name / f"{layout}.json").read_text())
    for key, values in expected.items():
        assert [step[key] for step in steps] == pytest.approx(values, rel=RELATIVE), key
    weights, found = tensors(folder / name / "twin"), tensors(folder / name / layout)
    assert found.keys() == weights.keys()
    norm = torch.sqrt(sum(value.pow(2).sum() for value in weights.values()))
    difference = torch.sqrt(sum((found[key].double() - value).pow(2).sum() for key, value in weights.items()))
    assert float(difference / norm) <= RELATIVE
