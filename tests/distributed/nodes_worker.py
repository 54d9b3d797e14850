"""Load pairs on three ranks that play two nodes: rank 0 alone, and ranks 1 and 2, each node in a folder of its own.

`nodes_worker.py FOLDER`: FOLDER/model is a tokenizer, FOLDER/node0 and FOLDER/node1 hold a copy of the file each, and
FOLDER/shared one that both see. Every rank leaves FOLDER/<rank>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from simpo_megatron.checkpoint.model_source import ModelSource
from simpo_megatron.config import config_from
from simpo_megatron.errors import DataError
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.training.start.inputs import Sources
from simpo_megatron.training.start.run_tokenizer import share_tokenizer
from simpo_megatron.training.start.setup import load_data

cpu_patches.install()


def load(cache: Path, file: str, local_rank: str) -> tuple[str, int, list[str], bool]:
    """(fingerprint, pairs, stores that this rank sees, whether it read the tokenizer) of `file` with this `cache`."""
    os.environ["LOCAL_RANK"] = local_rank
    config = config_from(model=str(folder / "model"), data=(file,), data_cache=str(cache))
    sources = Sources(model_source=ModelSource(folder / "model"), train=(file,), valid={})
    tokenizer = share_tokenizer(folder / "model", config.pairs)
    dataset, _ = load_data(config, sources, tokenizer)
    stores = sorted(path.name for path in (cache / "pairs").iterdir())
    return dataset.fingerprint, len(dataset), stores, "loaded" in vars(tokenizer)


def refusal(cache: Path, file: str) -> str:
    try:
        load(cache, file, "1")
    except DataError as error:
        return str(error)
    return "nothing was refused"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    node, local_rank = (0, "0") if rank == 0 else (1, str(rank - 1))
    os.chdir(folder / f"node{node}")
    found = {
        "apart": load(Path("cache"), "pairs.jsonl", local_rank),
        "shared": load(folder / "cache", str(folder / "shared.jsonl"), local_rank),
        "split": refusal(Path(f"cache_of_rank{rank}"), "pairs.jsonl"),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
