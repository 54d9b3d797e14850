"""A resume refuses another model, precision, tokenizer, order of pairs or objective, naming each with both values."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_tokenizers import llama_like
from tokenizers import Tokenizer

from simpo_megatron.config import config_from
from simpo_megatron.data import PairOptions, build_preference_dataset
from simpo_megatron.data.store import digest_of_tokenizer
from simpo_megatron.errors import CheckpointError
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.mcore.families import describe_hf_model

cpu_patches.install()

from simpo_megatron.checkpoint import tensor_index  # noqa: E402
from simpo_megatron.checkpoint.manifest import Checkpoint  # noqa: E402
from simpo_megatron.training.saving import resume  # noqa: E402

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1003,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
PAIRS = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"It is {n + 1}."} for n in range(4)]
OPTIONS = {"beta": 2.0, "gamma_beta_ratio": 0.5, "lr": 1e-6, "train_iters": 8, "global_batch_size": 2}


@dataclass
class Plan:
    description: Any


@dataclass
class Job:
    """The parts of a job that `describe_run` reads."""

    plan: Plan
    tokenizer: Any
    train_data: Any
    train_iters: int
    reference_model: str | None = None


def other_merges():
    """A tokenizer of the same vocabulary, two of whose merges have changed places."""
    tokenizer = llama_like()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = spec["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    backend, names = Tokenizer.from_str(json.dumps(spec)), ("bos_token", "eos_token")
    other = type(tokenizer)(tokenizer_object=backend, **{name: getattr(tokenizer, name) for name in names})
    other.chat_template = tokenizer.chat_template
    assert len(other) == len(tokenizer)
    return other


def other_template():
    tokenizer = copy.deepcopy(llama_like())
    tokenizer.chat_template = tokenizer.chat_template.replace("\n\n", "\n")
    return tokenizer


def describe(folder: Path, *, model=None, tokenizer=None, pairs=None, **options) -> dict[str, Any]:
    """The facts that a run of these writes into its checkpoints."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**MODEL, **(model or {})}))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs or PAIRS))
    config = config_from(model=str(folder), data=(str(folder / "pairs.jsonl"),), **{**OPTIONS, **options})
    tokenizer = tokenizer or llama_like()
    data = build_preference_dataset([str(folder / "pairs.jsonl")], tokenizer, PairOptions(), folder / "cache")
    of_run = SimpleNamespace(facts=SimpleNamespace(digest=digest_of_tokenizer(tokenizer, config.pairs)))
    job = Job(Plan(describe_hf_model(folder)), of_run, data, config.optimizer.train_iters, None)
    return resume.describe_run(config, job)


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Checkpoint:
    monkeypatch.setattr(resume.dist, "get_world_size", lambda: 1)
    return Checkpoint(tmp_path / "iter_0000004", 4, describe(tmp_path / "saved"), {})


def refused(saved: Checkpoint, now: dict[str, Any], *, override: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        resume._refuse_changes(saved, now, override=override)
    return str(caught.value)


def test_the_same_run_is_not_refused(saved, tmp_path):
    assert resume._refuse_changes(saved, describe(tmp_path / "now"), override=False) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"hidden_size": 64}}, "model.hidden_size: 32 when saved, 64 now"),
        ({"model": {"num_hidden_layers": 3}}, "model.num_layers: 2 when saved, 3 now"),
        ({"model": {"vocab_size": 1004}}, "model.vocab_size: 1003 when saved, 1004 now"),
        ({"model": {"rope_theta": 5e5}}, "model.rotary_base: 10000.0 when saved, 500000.0 now"),
        ({"bf16": False}, "precision.bf16: True when saved, False now"),
        ({"use_distributed_optimizer": True}, "precision.use_distributed_optimizer: False when saved, True now"),
    ],
)
def test_another_model_or_precision_is_refused_whatever_is_said(saved, tmp_path, changes, said):
    now = describe(tmp_path / "now", **changes)
    for override in (False, True):
        message = refused(saved, now, override=override)
        assert said in message and "cannot change within a run" in message and "--model of this one" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta": 2.5}, "training.beta: 2.0 when saved, 2.5 now"),
        ({"gamma_beta_ratio": 0.3}, "training.gamma"),
        ({"lr": 2e-6}, "training.lr: 1e-06 when saved, 2e-06 now"),
        ({"train_iters": 9}, "training.train_iters: 8 when saved, 9 now"),
        ({"global_batch_size": 4}, "training.global_batch_size: 2 when saved, 4 now"),
        ({"seed": 1}, "training.seed: 42 when saved, 1 now"),
        ({"tokenizer": other_merges}, "inputs.tokenizer: "),
        ({"tokenizer": other_template}, "inputs.tokenizer: "),
        ({"pairs": [*PAIRS[:3], {**PAIRS[3], "chosen": "It is 3!"}]}, "inputs.data: "),
        ({"pairs": [PAIRS[1], PAIRS[0], *PAIRS[2:]]}, "inputs.data: "),
        ({"pairs": PAIRS[:3]}, "inputs.num_pairs: 4 when saved, 3 now"),
    ],
)
def test_another_objective_tokenizer_or_data_is_refused_unless_told(saved, tmp_path, changes, said):
    changes = {key: value() if callable(value) else value for key, value in changes.items()}
    now = describe(tmp_path / "now", **changes)
    message = refused(saved, now)
    assert said in message and "--override-on-resume" in message
    notes = resume._refuse_changes(saved, now, override=True)
    assert any(said in note for note in notes) and all(note.startswith("WARNING") for note in notes)


def test_tensors_that_a_checkpoint_lacks_or_has_beside_are_counted_and_ten_of_each_are_named(tmp_path):
    kept, lacking, beside = ({f"{name}{n:02}" for n in range(number)} for name, number in zip("kwx", (3, 12, 11)))
    never = {"optimizer.state.exp_avg.k00", "rng.torch", "common_state/shard_0_1"}
    tensor_index.refuse_other_names(kept | never, kept, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        tensor_index.refuse_other_names(kept | beside | never, kept | lacking, tmp_path)
    assert "12 tensors of this run are not in it: w00, w01" in str(caught.value)
    assert "11 tensors in it are no part of this run's model: x00, x01" in str(caught.value)
    assert all(name in str(caught.value) for name in ("w09", "x09"))
    assert not any(name in str(caught.value) for name in ("w10", "x10", "k00", "optimizer"))
