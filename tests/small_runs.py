"""The small runs of the bundled model that fault tests stop, kill and resume."""

from __future__ import annotations

from pathlib import Path

from simpo_megatron.demo import prepare_demo


def small_run(folder: Path) -> dict[str, object]:
    """Options of a run over 20 of the bundled pairs in batches of 8; what it needs is made in `folder`."""
    demo, pairs = prepare_demo(folder / "demo"), folder / "pairs.jsonl"
    pairs.write_text("\n".join(demo.train_file.read_text().splitlines()[:20]) + "\n")
    return {
        "model": str(demo.model_dir),
        "data": [str(pairs)],
        "data_cache": str(folder / "cache"),
        "bf16": False,
        "global_batch_size": 8,
        "max_length": 256,
        "max_prompt_length": 128,
        "tokens_per_microbatch": 512,
        "lr": 1e-3,
    }
