"""Twenty optimizer steps of TRL's CPOTrainer on SimPO's loss and twenty of ours are the same twenty steps.

TRL renders the chat template, tokenises, pads, runs transformers' model and computes the loss from whole
logits; we pack, share prompts, run megatron's model and never build the logits. Both get the same records
in the same order and the same AdamW.

Budget: 2e-5 absolute on each step's loss, rewards and margin. Rewards here are numbers of about 10, so
that is 2e-6 relative, over twenty fp32 updates whose first ones divide by gradients near zero. Measured:
at most 1.4e-6; a learning rate of 1e-3, at which the run amplifies rounding, gives 1.5e-4.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from transformers import AutoTokenizer

from simpo_megatron.data import BatchOptions, PairOptions, build_preference_dataset
from simpo_megatron.data.batching import step_pairs
from simpo_megatron.demo import prepare_demo


def has_trl() -> bool:
    """True when the installed trl has CPOTrainer in its experimental API."""
    try:
        return importlib.util.find_spec("trl.experimental.cpo") is not None
    except ImportError:
        return False


pytestmark = pytest.mark.skipif(not has_trl(), reason="no trl with trl.experimental.cpo (0.29 or later)")

HERE = Path(__file__).parent
NUM_STEPS, BATCH, NUM_PAIRS = 20, 8, 100
BETA, GAMMA = 2.0, 1.0
ABSOLUTE = 2e-5
KEYS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
OPTIONS = dict(
    model="given by the job",
    data=("given by the job",),
    bf16=False,
    beta=BETA,
    gamma_beta_ratio=GAMMA / BETA,
    global_batch_size=BATCH,
    tokens_per_microbatch=512,
    lr=3e-4,
    weight_decay=0.1,
    lr_warmup_fraction=0.0,
    lr_decay_style="constant",
    train_iters=NUM_STEPS,
)
# Two ranks: one tensor-parallel rank on each half of the pairs, and two on all of them.
LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sequence_parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp2_padded_rows": {"tensor_model_parallel_size": 2, "packing": False, "prefix_sharing": False},
}


def run_trl(folder: Path, model: Path, records: list[dict]) -> None:
    arguments = dict(
        beta=BETA,
        simpo_gamma=GAMMA,
        learning_rate=OPTIONS["lr"],
        weight_decay=OPTIONS["weight_decay"],
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        max_length=1024,  # nothing is cut
        max_steps=NUM_STEPS,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
    )
    job = dict(model=str(model), records=records, arguments=arguments)
    (folder / "trl.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "trl_worker.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(our token ids in TRL's order, TRL's token ids, TRL's steps, our steps by layout)."""
    folder = tmp_path_factory.mktemp("trl_parity")
    demo = prepare_demo(folder / "demo")
    lines = demo.train_file.read_text(encoding="utf-8").splitlines()[:NUM_PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    dataset = build_preference_dataset(
        [str(folder / "pairs.jsonl")],
        AutoTokenizer.from_pretrained(demo.model_dir),
        PairOptions(max_length=512, max_prompt_length=400),
        folder / "cache",
    )
    pairs = [[ids.tolist() for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)] for p in dataset]
    assert len(pairs) == NUM_PAIRS

    job = dict(model=str(demo.model_dir), pairs=pairs, num_steps=NUM_STEPS, options=OPTIONS)
    job |= dict(layouts=LAYOUTS, poisoned=[])
    (folder / "job.json").write_text(json.dumps(job))
    run_ranks(HERE / "layout_worker.py", 2, str(folder), timeout=300)
    ours = {name: json.loads((folder / f"{name}.json").read_text()) for name in LAYOUTS}

    # Two epochs, the second in an order of its own: TRL is handed the records as our plan takes them.
    options = BatchOptions(global_batch_size=BATCH)
    order = np.concatenate([step_pairs(NUM_PAIRS, step * BATCH, options) for step in range(NUM_STEPS)])
    run_trl(folder, demo.model_dir, [json.loads(lines[index]) for index in order])
    trl_ids = json.loads((folder / "trl_ids.json").read_text())
    trl_steps = json.loads((folder / "trl_steps.json").read_text())
    return [pairs[index] for index in order], trl_ids, trl_steps, ours


def test_trl_makes_the_same_token_ids_of_every_record(runs):
    ours, trl, *_ = runs
    assert len(ours) == len(trl) == NUM_STEPS * BATCH
    for number, (our_pair, trl_pair) in enumerate(zip(ours, trl, strict=True)):
        assert our_pair == trl_pair, f"record {number} of the run"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_step_agrees_with_trl(runs, layout):
    *_, trl_steps, ours = runs
    assert len(trl_steps) == NUM_STEPS
    for key in KEYS:
        found = np.array([step[key] for step in ours[layout]])
        expected = np.array([step[key] for step in trl_steps])
        error = np.abs(found - expected).max()
        print(f"{layout} {key}: at most {error:.1e}")
        assert error <= ABSOLUTE, f"{key} is off by {error:.1e}: {found} {expected}"


def test_the_steps_learn_so_that_agreeing_on_them_means_something(runs):
    *_, trl_steps, _ = runs
    margins = [step["rewards/margins"] for step in trl_steps]
    assert np.mean(margins[-3:]) > np.mean(margins[:3]) + 0.3
