"""Weights kept in FP8 are made of the masters, which are the values of the file or checkpoint, and nothing else is."""

from pathlib import Path

import torch
from ranks import run_ranks
from tiny_models import DENSE, write_model

WORKER = Path(__file__).with_name("fp8_weights_worker.py")


def test_masters_are_the_file_and_fp8_follows_them(tmp_path):
    torch.manual_seed(3)
    config, _ = DENSE["llama31_scaled_rope"]
    write_model(config, tmp_path / "model", "bfloat16")
    run_ranks(WORKER, 2, str(tmp_path), fresh=True)
