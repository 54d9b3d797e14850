"""Small token stores for tests: files of pairs, and the datasets that are built from them."""

import json

import numpy as np
from data_tokenizers import llama_like

from simpo_megatron.data import PairOptions, build_preference_dataset

OPTIONS = PairOptions(max_length=256, max_prompt_length=128)


def write_pairs(path, count, offset=0, num_prompts=None):
    """`path`, with `count` pairs of short texts written into it."""
    rows = [
        {
            "prompt": f"question {(offset + i) % (num_prompts or count)}",
            "chosen": "the answer " * (1 + i % 7),
            "rejected": f"no {offset + i}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(path, tmp_path, tokenizer=None, options=OPTIONS, **arguments):
    """The dataset of one file or several, in the cache of `tmp_path`."""
    paths = path if isinstance(path, list) else [str(path)]
    return build_preference_dataset(paths, tokenizer or llama_like(), options, tmp_path / "cache", **arguments)


def folders(tmp_path):
    """The stores in the cache of `tmp_path`."""
    return sorted(p for p in (tmp_path / "cache").iterdir())


def same(a, b):
    """True when two datasets hold the same tokens."""
    return len(a) == len(b) and all(
        np.array_equal(getattr(a[i], part), getattr(b[i], part))
        for i in range(len(a))
        for part in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
