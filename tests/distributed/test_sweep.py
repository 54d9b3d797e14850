"""A trial of a sweep is, bit for bit, the run that it would be alone, whatever its ranks did before it.

Each layout sweeps once: two trials that diverge, then two with other seeds. The last of them is run alone as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import stored_values
from ranks import run_ranks
from run_records import read_records
from transformers import LlamaConfig, LlamaForCausalLM

from simpo_megatron.demo import prepare_demo

WORKER = Path(__file__).with_name("sweep_worker.py")
NUM_STEPS = 4
AXES = ["lr=1e38,1e-2", "seed=1,2"]
LAST = "lr=0.01,seed=2"
LAYOUTS = {
    "tp2": ["--tp", "2", "--sequence-parallel", "--hidden-dropout", "0.1", "--fp32"],
    "pp2": ["--pp", "2", "--fp32", "--objective", "dpo"],
    "dp2": ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
    "fp8_masters": ["--use-distributed-optimizer", "--fp8-recipe", "tensorwise", "--fp8-param-gather"],
    "lora": ["--tp", "2", "--lora-rank", "4", "--lora-dropout", "0.1", "--use-distributed-optimizer", "--fp32"],
}
pytest.importorskip("optuna", reason="the extra [sweep] is not installed")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """Options of every trial: a tiny model, 20 pairs to train on and 12 to compare by."""
    folder = tmp_path_factory.mktemp("sweep_inputs")
    demo = prepare_demo(folder / "model")
    torch.manual_seed(3)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1100,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            max_position_embeddings=256,
        )
    ).save_pretrained(demo.model_dir)
    for name, source, count in (("train", demo.train_file, 20), ("valid", demo.valid_file, 12)):
        (folder / f"{name}.jsonl").write_text("\n".join(source.read_text().splitlines()[:count]) + "\n")
    options = ["--model", str(demo.model_dir), "--data", str(folder / "train.jsonl")]
    options += ["--valid-data", str(folder / "valid.jsonl"), "--data-cache", str(folder / "cache")]
    options += ["--global-batch-size", "8", "--max-length", "256", "--max-prompt-length", "128"]
    return [*options, "--tokens-per-microbatch", "512", "--train-iters", str(NUM_STEPS)]


@pytest.fixture(scope="module", params=LAYOUTS)
def swept(request, inputs, tmp_path_factory) -> tuple[Path, Path]:
    """(folder of a sweep, folder of its last trial run alone)."""
    folder = tmp_path_factory.mktemp(request.param)
    asked = {"argv": [*inputs, *LAYOUTS[request.param], "--save", str(folder / "sweep")], "axes": AXES}
    (folder / "sweep.json").write_text(json.dumps(asked))
    run_ranks(WORKER, 2, "sweep", str(folder / "sweep.json"))
    run_ranks(WORKER, 2, "run", str(folder / "sweep" / LAST / "config.yaml"), str(folder / "alone"))
    return folder / "sweep", folder / "alone"


def records(folder: Path) -> list[dict]:
    return read_records(folder / "metrics.jsonl")


def test_a_trial_is_the_run_that_it_would_be_alone(swept):
    sweep, alone = swept
    trial = sweep / LAST
    assert records(trial) == records(alone)
    assert len(records(trial)) == NUM_STEPS + 2
    checkpoint = f"iter_{NUM_STEPS:07}"
    assert stored_values(trial / checkpoint) == stored_values(alone / checkpoint)
    with np.load(trial / "validation_pairs.npz") as one, np.load(alone / "validation_pairs.npz") as other:
        assert set(one) == set(other) == {"fingerprint", "lengths", "before", "after", "iteration"}
        assert all(np.array_equal(one[name], other[name]) for name in one)
        assert not np.array_equal(one["before"], one["after"])
    other_seed = sweep / "lr=0.01,seed=1"
    assert stored_values(other_seed / checkpoint) != stored_values(trial / checkpoint), "seeds differ"


def test_the_pairs_that_are_kept_are_those_that_the_metrics_are_means_of(swept):
    trial = swept[0] / LAST
    last = records(trial)[-1]
    with np.load(trial / "validation_pairs.npz") as kept:
        chosen, rejected = kept["after"].astype(np.float64).T
    # Sums of float32 values in another order.
    assert last["eval/logps/chosen"] == pytest.approx(chosen.mean(), rel=1e-6)
    assert last["eval/logps/rejected"] == pytest.approx(rejected.mean(), rel=1e-6)


def test_a_trial_that_diverges_is_recorded_and_the_sweep_goes_on(swept):
    sweep, _ = swept
    for seed in (1, 2):
        ended = json.loads((sweep / f"lr=1e+38,seed={seed}" / "trial.json").read_text())
        assert ended["status"] == "diverged" and "finite" in ended["why"]
    found = json.loads((sweep / "sweep.json").read_text())
    assert found["best"] == "lr=0.01" and list(found["failed"]) == ["lr=1e+38"]
    assert len(found["settings"][0]["accuracies"]) == 2
    kept = json.loads((sweep / "counts.json").read_text())
    optimizers = kept["optimizers"]
    assert len(optimizers) == 4 and max(optimizers) == optimizers[0], "moments of earlier trials are gone"
    # A model that each trial builds anew is evaluated anew.
    is_built_anew = "--fp8-param-gather" in json.loads((sweep.parent / "sweep.json").read_text())["argv"]
    assert kept["initial_passes"] == (4 if is_built_anew else 1)


def test_a_sweep_that_was_stopped_goes_on_in_the_trial_that_was_broken(inputs, tmp_path, monkeypatch, capfd):
    """One rank, in this process: a signal comes in the second step of the second of three trials."""
    from simpo_megatron.errors import StoppedBySignal
    from simpo_megatron.sweep.driver import run_sweep
    from simpo_megatron.sweep.request import read_sweep

    sweep = read_sweep([*inputs, "--fp32", "--save", str(tmp_path)], ["beta=1,2,4"], keep=1)
    monkeypatch.setenv("SIMPO_FAULT", f"step@{NUM_STEPS + 2}:0:sigterm")
    with pytest.raises(StoppedBySignal, match="the same command continues from there"):
        run_sweep(sweep)
    first = (tmp_path / "beta=1" / "metrics.jsonl").stat().st_mtime_ns
    assert not (tmp_path / "beta=2" / "trial.json").exists()
    monkeypatch.delenv("SIMPO_FAULT")
    capfd.readouterr()
    run_sweep(sweep)
    printed = capfd.readouterr().out
    assert "trial     2 of 3: beta=2" in printed and f"beta=2/iter_{2:07}: step 2" in printed
    counts = [printed.count(f"\n{begin}") for begin in ("options ", "records ", "ranks ", "objective ")]
    assert counts == [1, 1, 1, 2], "what is the same for all trials is said once"
    assert (tmp_path / "beta=1" / "metrics.jsonl").stat().st_mtime_ns == first, "a finished trial is not touched"
    steps = [line["iteration"] for line in records(tmp_path / "beta=2") if "loss" in line]
    assert steps == list(range(1, NUM_STEPS + 1))
    best = json.loads((tmp_path / "sweep.json").read_text())["best"]
    with_checkpoints = {path.parent.name for path in tmp_path.glob("*/iter_*")}
    assert with_checkpoints == {best}, "--keep 1"
    assert f"{best} is the best of 3" in printed
    run_sweep(sweep)
    assert "trial     " not in capfd.readouterr().out, "nothing is left to do"


def test_halving_trains_the_better_part_longer_and_every_seed_at_the_end(inputs, tmp_path, monkeypatch, capfd):
    """One rank: three settings of four steps, then the better two of eight with both seeds."""
    from simpo_megatron.sweep.driver import run_sweep
    from simpo_megatron.sweep.request import read_sweep

    options = [*inputs, "--fp32", "--train-iters", str(2 * NUM_STEPS), "--save", str(tmp_path)]
    run_sweep(read_sweep(options, ["lr=1e-7,1e38,1e-2", "seed=1,2"], halving=2, keep=1))
    rungs = {name: sorted(path.name for path in (tmp_path / name).glob("lr=*")) for name in ("rung-0", "rung-1")}
    assert rungs["rung-0"] == ["lr=0.01,seed=1", "lr=1e+38,seed=1", "lr=1e-07,seed=1"]
    assert rungs["rung-1"] == ["lr=0.01,seed=1", "lr=0.01,seed=2", "lr=1e-07,seed=1", "lr=1e-07,seed=2"]
    lengths = [max(line["iteration"] for line in records(tmp_path / rung / "lr=0.01,seed=1")) for rung in rungs]
    assert lengths == [NUM_STEPS, 2 * NUM_STEPS]
    schedule = [line["learning_rate"] for line in records(tmp_path / "rung-0" / "lr=0.01,seed=1") if "loss" in line]
    whole = [line["learning_rate"] for line in records(tmp_path / "rung-1" / "lr=0.01,seed=1") if "loss" in line]
    assert schedule[-1] < schedule[1] / 2 < whole[len(schedule) - 1], "a whole schedule of its own"
    found = json.loads((tmp_path / "sweep.json").read_text())
    capfd.readouterr()
    monkeypatch.setattr("simpo_megatron.sweep.page.render", lambda *_, **values: values["nothing"])
    run_sweep(read_sweep(options, ["lr=1e-7,1e38,1e-2", "seed=1,2"], halving=2, keep=1))
    assert "WARNING   no sweep.html was written: KeyError: 'nothing'\n" in capfd.readouterr().out, "and no more"
    assert {row["name"]: len(row["accuracies"]) for row in found["settings"]} == {"lr=0.01": 2, "lr=1e-07": 2}
    ((title, earlier),) = found["earlier_rounds"].items()
    assert title == f"Round 1 of 2: {NUM_STEPS} steps each" and list(earlier["failed"]) == ["lr=1e+38"]
    assert [row["name"] for row in earlier["settings"]][-1] == "lr=1e-07"
    assert f"<h2>{title}</h2>" in (tmp_path / "sweep.html").read_text()
    assert len({path.parent for path in tmp_path.glob("rung-*/*/iter_*")}) == 2, "the best setting's seeds"
