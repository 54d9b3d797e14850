"""Megatron-LM's own pretrain() with our hooks: it trains, saves and resumes, and the layout changes nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from ranks import REPOSITORY

from simpo_megatron.demo import prepare_demo

pytestmark = pytest.mark.skipif(
    find_spec("megatron.training") is None,
    reason="Megatron-LM's training comes with megatron-core from 0.17 on, which needs Python 3.12",
)
WORKER = REPOSITORY / "tests" / "distributed" / "megatron_lm_worker.py"
MODEL = """--num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --max-position-embeddings 512 --seq-length 512"""
# Megatron-LM's defaults are for GPUs.
ON_THE_CPU = """--transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion"""
TRAINING = """--micro-batch-size 2 --global-batch-size 8 --train-iters 3 --lr 1e-3 --lr-warmup-iters 1 --log-interval 1
    --attention-dropout 0 --hidden-dropout 0 --simpo-beta 2.5"""
# Megatron-LM insists on the last of them for sequence parallelism.
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
TWO_RANKS = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
# Rows of one length, shorter than two of the longest pairs that the tokenizer may make.
TWO_STAGES = ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1")
TWO_STAGES += ("--seq-length", "96", "--simpo-max-length", "512")


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory):
    """A function from ranks and further arguments to what pretrain() printed."""
    folder = tmp_path_factory.mktemp("megatron_lm")
    demo = prepare_demo(folder / "demo")
    data = ["--tokenizer-model", str(demo.model_dir), "--simpo-data", str(demo.train_file)]
    data += ["--simpo-data-cache", str(folder / "cache")]

    def run(num_ranks: int, *arguments: str) -> str:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        done = subprocess.run(
            [sys.executable, *torchrun, str(WORKER), *f"{MODEL} {ON_THE_CPU} {TRAINING}".split(), *data, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    return run


def steps(printed: str) -> dict[int, tuple[float, float]]:
    """{iteration: (loss, gradient norm)} of Megatron-LM's log lines."""
    found = re.findall(r"iteration +(\d+)/.*? loss: (\S+) .*?grad norm: (\S+)", printed)
    return {int(iteration): (float(loss), float(norm)) for iteration, loss, norm in found}


def test_pretrain_trains_saves_and_resumes_alike_on_one_rank_two_and_two_stages(pretrain, tmp_path: Path):
    held_out = ["--simpo-valid-data", str(REPOSITORY / "simpo_megatron" / "demo" / "validation_pairs.jsonl")]
    printed = pretrain(1, *held_out, "--eval-iters", "2")
    alone = steps(printed)
    assert sorted(alone) == [1, 2, 3] and alone[3][0] < alone[1][0]
    assert float(re.search(r"validation loss .* rewards/accuracies value: (\S+)", printed).group(1)) > 0.7

    checkpoints = ("--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2")
    first = steps(pretrain(2, *TWO_RANKS, *checkpoints, "--exit-interval", "2"))
    printed = pretrain(2, *TWO_STAGES, *checkpoints)
    second = steps(printed)
    assert re.search(r"training rows: 192 tokens each, \d\d% of them padding", printed)
    assert (sorted(first), sorted(second)) == ([1, 2], [3])
    for iteration, numbers in {**first, **second}.items():
        assert numbers == pytest.approx(alone[iteration], rel=1e-3)
