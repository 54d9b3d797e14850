"""A NeMo file in place of flags: the real script starts the ranks it needs and trains what the file says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from ranks import python_output

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
SIMPO = (
    "{preset: demo, beta: 2.5, log_interval: 1, lr_warmup_init: 1e-4, export_hf: FOLDER/hf, data_cache: FOLDER/cache}"
)
FILES = {
    "NeMo 1 / Aligner": """
trainer: {devices: 1, precision: 32, max_steps: 3}
exp_manager: {exp_dir: FOLDER, name: run, resume_if_exists: true}
model:
  global_batch_size: 8
  micro_batch_size: 2
  encoder_seq_length: 256
  optim:
    name: fused_adam
    lr: 1e-3
    betas: [0.9, 0.98]
    sched: {name: CosineAnnealing, warmup_steps: 1, max_steps: 6, min_lr: 0}
  simpo: SIMPO
""",
    "NeMo 2": """
_target_: nemo.collections.llm.api.finetune
trainer: {max_steps: 3, strategy: {tensor_model_parallel_size: 1}, plugins: {precision: 32}}
data: {global_batch_size: 8, micro_batch_size: 2, seq_length: 256, seed: 7}
log: {log_dir: FOLDER, name: run}
optim:
  config: {optimizer: adam, lr: 1e-3, adam_beta2: 0.98}
  lr_scheduler:
    _target_: nemo.lightning.pytorch.optim.lr_scheduler.CosineAnnealingScheduler
    warmup_steps: 1
    max_steps: 6
simpo: SIMPO
""",
    "NeMo-RL": """
dpo: {max_num_steps: 3, max_num_epochs: 1, seed: 7}
checkpointing: {enabled: true, checkpoint_dir: FOLDER/run}
policy:
  precision: float32
  train_global_batch_size: 8
  train_micro_batch_size: 2
  max_total_sequence_length: 256
  dtensor_cfg: {enabled: false}
  megatron_cfg:
    enabled: true
    optimizer: {optimizer: adam, lr: 1e-3, adam_beta2: 0.98}
    scheduler: {lr_decay_style: cosine, lr_warmup_iters: 1, lr_decay_iters: 6}
simpo: SIMPO
""",
    "Megatron-Bridge": """
model: {tensor_model_parallel_size: 1, bf16: false, seq_length: 256}
train: {train_iters: 3, global_batch_size: 8, micro_batch_size: 2}
optimizer: {optimizer: adam, lr: 1e-3, adam_beta2: 0.98}
scheduler: {lr_decay_style: cosine, lr_warmup_iters: 1, lr_decay_iters: 6}
checkpoint: {save: FOLDER/run}
rng: {seed: 7}
simpo: SIMPO
""",
}
SETTINGS = ("beta: 2.5", "seed: 7", "train_iters: 3", "tokens_per_microbatch: 1024", "bf16: false", "adam_beta2: 0.98")


def write(dialect: str, folder: Path) -> str:
    """The path of a file of `dialect` whose run lies in `folder`."""
    path = folder / "nemo.yaml"
    path.write_text(FILES[dialect].replace("SIMPO", SIMPO).replace("FOLDER", str(folder)))
    return str(path)


def losses(folder: Path) -> list[float]:
    """The loss of each of the three steps of the run in `folder`, which was told SETTINGS."""
    saved = (folder / "run" / "config.yaml").read_text()
    assert [setting for setting in SETTINGS if setting not in saved] == []
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    steps = [record for record in records if "loss" in record]
    assert [record["iteration"] for record in steps] == [1, 2, 3]
    # From lr_warmup_init up to lr in one step, and a fifth of a cosine down to 0.
    rates = [1e-4, 1e-3, 1e-3 * (1 + math.cos(math.pi / 5)) / 2]
    assert [record["learning_rate"] for record in steps] == pytest.approx(rates, rel=1e-12)
    return [record["loss"] for record in steps]


def test_the_script_trains_what_a_nemo_file_says(tmp_path):
    overrides = ["model.seed=7", "+model.tensor_model_parallel_size=2"]
    file = write("NeMo 1 / Aligner", tmp_path)
    printed = python_output(*TORCHRUN, "examples/pretrain_simpo.py", "--nemo-config", file, *overrides)
    assert printed.count("NeMo 1 / Aligner configuration") == 1, "two ranks run, and one of them speaks"
    assert len(losses(tmp_path)) == 3


def test_dialects_that_say_the_same_train_the_same(tmp_path):
    dialects = [dialect for dialect in FILES if dialect != "NeMo 1 / Aligner"]
    folders = [tmp_path / dialect for dialect in dialects]
    for folder in folders:
        folder.mkdir()
    files = [write(dialect, folder) for dialect, folder in zip(dialects, folders, strict=True)]
    script = (
        "import sys\n"
        "from simpo_megatron.training.launch import main\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(max(main(['--nemo-config', file], '') for file in sys.argv[1:]))\n"
    )
    (tmp_path / "script.py").write_text(script)
    printed = python_output(*TORCHRUN, str(tmp_path / "script.py"), *files)
    for dialect in dialects:
        assert f"{dialect} configuration, keys: " in printed
    first, *others = [losses(folder) for folder in folders]
    assert len(set(first)) == 3
    for other in others:
        assert other == pytest.approx(first, rel=1e-6)
