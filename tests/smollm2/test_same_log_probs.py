"""A real model, SmolLM2-135M-Instruct, gives the same log-probs in megatron as in transformers, and comes back whole.

Budget. Its logits have a standard deviation near 7 and pass thirty layers: 1e-4 of that deviation for a logit. The
average log-prob of an answer, whose rounding errors cancel, within 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import REPOSITORY, run_ranks
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo_megatron.convert.stored_tensors import stored_tensors

pytestmark = pytest.mark.slow
WORKER = REPOSITORY / "tests" / "distributed" / "convert_worker.py"

LAYOUTS = {
    "tp1": {},
    "tp3": {"tensor_model_parallel_size": 3},
    "pp3": {"pipeline_model_parallel_size": 3},
}
NUM_PAIRS = 4


def answers(smollm2: Path) -> tuple[Tensor, Tensor]:
    """Tokens [B, S], padded on the right, and True [B, S] at each token of an answer."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    pairs_file = REPOSITORY / "simpo_megatron" / "demo" / "pairs.jsonl"
    rows = []
    for line in pairs_file.read_text(encoding="utf-8").splitlines()[:NUM_PAIRS]:
        pair = json.loads(line)
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(pair["prompt"] + pair[side], return_dict=False)
            rows.append((whole, len(prompt)))
    tokens = torch.full((len(rows), max(len(whole) for whole, _ in rows)), tokenizer.pad_token_id)
    is_answer = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (whole, num_prompt) in enumerate(rows):
        tokens[row, : len(whole)] = torch.tensor(whole)
        is_answer[row, num_prompt : len(whole)] = True
    return tokens, is_answer


def average_log_probs(logits: Tensor, tokens: Tensor, is_answer: Tensor) -> Tensor:
    log_probs = logits[:, :-1].double().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    mask = is_answer[:, 1:]
    return (log_probs * mask).sum(1) / mask.sum(1)


def contents(folder: Path) -> dict[str, Tensor]:
    files = {tensor.file for tensor in stored_tensors(folder).values()}
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_log_probs_agree_and_every_weight_comes_back(smollm2: Path, tmp_path: Path) -> None:
    tokens, is_answer = answers(smollm2)
    (tmp_path / "smollm2").symlink_to(smollm2, target_is_directory=True)
    job = {
        "models": {"smollm2": "bfloat16"},
        "layouts": LAYOUTS,
        "runs": [("smollm2", layout) for layout in LAYOUTS],
        "tokens": tokens.tolist(),
        "max_shard_bytes": 100 << 20,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    run_ranks(WORKER, 3, str(tmp_path), timeout=500)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)(tokens).logits
    weights = contents(smollm2)
    for layout in LAYOUTS:
        found = load_file(tmp_path / f"smollm2-{layout}.safetensors")["logits"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.std().item())
        torch.testing.assert_close(
            average_log_probs(found, tokens, is_answer),
            average_log_probs(expected, tokens, is_answer),
            rtol=0,
            atol=1e-5,
        )
        exported = contents(tmp_path / f"smollm2-{layout}")
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())
