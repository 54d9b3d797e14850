"""Hugging Face folders of every family, loaded under every layout, compute what transformers computes.

Budget. Logits have a standard deviation of about one; fp32 matrix products summed in another order over four
layers differ by a few 1e-6. 1e-4 is the promise; a wrong layout, bias, norm or rotary frequency misses it by
orders of magnitude. The way back has no budget: every bit of every tensor.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import DENSE, FIRST_MOES, MOES, VOCAB, tokenizer_of_bytes, write_model
from transformers import AutoModelForCausalLM

from simpo_megatron.convert.stored_tensors import stored_tensors
from simpo_megatron.data import PairOptions, build_preference_dataset
from simpo_megatron.mcore.families import FAMILIES

WORKER = Path(__file__).with_name("convert_worker.py")
# Two ranks: what tp and pp leave over is data parallelism, of which one rank writes.
LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2_sequence_parallel_ep2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
    },
}
# (model, layout): experts of each family in every way that divides them; what chunks of a stage divide, and a rank
# alone, is the same in all families.
RUNS = [(name, layout) for name in DENSE for layout in ("tp2", "pp2")]
RUNS += [(name, layout) for name in ("llama32_tied", "gemma2", "smollm3") for layout in ("tp1", "pp2_vpp2")]
RUNS += [(name, layout) for name in MOES for layout in ("pp2", "tp2_sequence_parallel_ep2")]
RUNS += [(name, layout) for name in FIRST_MOES for layout in ("tp2", "ep2")]
MODELS = DENSE | MOES
# What the trainer, too, is to give the log-probs of: with tensor parallelism, it divides the sequence of an MoE.
SCORED = [(next(iter(family.tests)), "pp2") for family in FAMILIES.values()]
SCORED += [(name, layout) for name, layout in RUNS if layout in ("tp1", "tp2_sequence_parallel_ep2")]


@torch.no_grad()
def logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    # Loaded, not cast: a cast would round the rotary frequencies as well.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


@torch.no_grad()
def averages_of_transformers(folder: Path, pairs: list) -> torch.Tensor:
    """float64 [P, 2]: of each response, one sequence for each, padded behind its end."""
    responses = [(prompt, response) for prompt, *both in pairs for response in both]
    tokens = torch.zeros(len(responses), max(len(prompt) + len(response) for prompt, response in responses)).long()
    for row, (prompt, response) in enumerate(responses):
        tokens[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
    averages = []
    for (prompt, response), logits in zip(responses, logits_of_transformers(folder, tokens), strict=True):
        log_probs = logits[len(prompt) - 1 : len(prompt) + len(response) - 1].double().log_softmax(-1)
        averages.append(log_probs.gather(1, torch.tensor(response)[:, None]).mean())
    return torch.stack(averages).view(-1, 2)


def real_pairs(cache: Path) -> list:
    """20 pairs of token ids, from all over the files that SIMPO_REAL_PAIRS names; none when it names nothing."""
    place = os.environ.get("SIMPO_REAL_PAIRS")
    if not place:
        return []
    files = sorted(map(str, Path(place).glob("*.jsonl"))) if Path(place).is_dir() else [place]
    options = PairOptions(max_length=256, max_prompt_length=128, chat_template="none", bad_record="skip")
    dataset = build_preference_dataset(files, tokenizer_of_bytes(), options, cache)
    pairs = (dataset[index] for index in range(0, len(dataset) // 20 * 20, len(dataset) // 20))
    return [[pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()] for pair in pairs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every model, loaded and exported under every layout by one start of two ranks."""
    folder = tmp_path_factory.mktemp("convert")
    torch.manual_seed(5)
    tokens = torch.randint(VOCAB, (2, 38))
    pairs = real_pairs(folder / "cache")
    expected, averages = {}, {}
    for name, (config, dtype) in MODELS.items():
        write_model(config, folder / name, dtype)
        expected[name] = logits_of_transformers(folder / name, tokens)
        if pairs:
            averages[name] = averages_of_transformers(folder / name, pairs)
    torch.save(expected, folder / "expected.pt")
    torch.save(averages, folder / "averages.pt")
    job = {
        "models": {name: dtype for name, (_, dtype) in MODELS.items()},
        "layouts": LAYOUTS,
        "runs": RUNS,
        "tokens": tokens.tolist(),
        "pairs": pairs,
        "scored": SCORED if pairs else [],
        "max_shard_bytes": 60_000,
    }
    (folder / "job.json").write_text(json.dumps(job))
    run_ranks(WORKER, 2, str(folder), timeout=400)
    return folder


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_megatron_computes_the_logits_that_transformers_computes(folder: Path, name: str, layout: str) -> None:
    expected = torch.load(folder / "expected.pt", weights_only=True)[name]
    found = load_file(folder / f"{name}-{layout}.safetensors")["logits"]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "layout"), SCORED)
def test_average_log_probs_of_real_pairs_are_those_of_transformers(folder: Path, name: str, layout: str) -> None:
    averages = torch.load(folder / "averages.pt", weights_only=True)
    if not averages:
        pytest.skip("SIMPO_REAL_PAIRS names no file or folder of real preference pairs")
    expected, found = averages[name], load_file(folder / f"{name}-{layout}.safetensors")["averages"]
    assert expected.shape == found.shape == (20, 2) and expected.std() > 0.01
    *others, worst = (found - expected).abs().flatten().sort().values.tolist()
    print(f"{name} {layout}: {worst:.1e}, {others[-1]:.1e}")
    # Among thousands of tokens one may have two experts whose router scores are equal to fp32's rounding. It then takes
    # either, and its response, of some hundred tokens, is off by a share of a nat.
    assert worst <= (1e-2 if name in MOES else 1e-4) and others[-1] <= 1e-4


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_an_exported_model_has_every_bit_of_the_imported_one(folder: Path, name: str, layout: str) -> None:
    def contents(of: Path) -> dict[str, torch.Tensor]:
        files = {tensor.file for tensor in stored_tensors(of).values()}
        return {key: value for file in files for key, value in load_file(file).items()}

    before, after = contents(folder / name), contents(folder / f"{name}-{layout}")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key


def test_an_export_is_sharded_and_transformers_loads_it(folder: Path) -> None:
    exported = folder / "llama31_scaled_rope-pp2"
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    sizes = [path.stat().st_size for path in exported.glob("model-*.safetensors")]
    assert len(sizes) > 4 and max(sizes) < 70_000
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * 2 for path in exported.glob("model-*") for tensor in load_file(path).values()
    )
    assert (exported / "tokenizer_config.json").is_file()
    job = json.loads((folder / "job.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(exported, dtype="auto").dtype == torch.bfloat16
    expected = torch.load(folder / "expected.pt", weights_only=True)["llama31_scaled_rope"]
    assert torch.equal(logits_of_transformers(exported, torch.tensor(job["tokens"])), expected)


def test_nothing_is_left_beside_the_exports(folder: Path) -> None:
    assert not list(folder.glob(".*"))
