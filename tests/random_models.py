"""Small models of each family in shapes that no public model has."""

from __future__ import annotations

import random
from typing import Any

from simpo_megatron.mcore.families import FAMILIES
from simpo_megatron.mcore.family import TINY_MODEL

_LATENT = {
    "q_lora_rank": (None, 7, 20),
    "kv_lora_rank": (9, 24),
    "qk_nope_head_dim": (3, 12),
    "qk_rope_head_dim": (2, 8),
    "v_head_dim": (1, 5),
}


def random_config(model_type: str, draw: random.Random, *, num_ranks: int = 1) -> dict[str, Any]:
    """Keys of a config.json: odd heads, groups, widths and vocabulary, tied or not, head size apart from the width.

    Heads, groups and widths are such that `num_ranks` tensor-parallel ranks, one or four, can divide a layer.
    """
    keys = dict(draw.choice(list(FAMILIES[model_type].tests.values())))
    groups = draw.choice((1, 3, 5)) if num_ranks == 1 else draw.choice((1, 2, 4))
    heads = groups * draw.choice((1, 2, 3)) if num_ranks == 1 else draw.choice((4, 12))
    sizes: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": heads * draw.choice((6, 10) if num_ranks == 1 else (5, 9)),
        "intermediate_size": draw.choice((33, 47, 50) if num_ranks == 1 else (36, 44, 52)),
        "vocab_size": draw.choice((31, 257, 384)),
        "tie_word_embeddings": draw.random() < 0.5,
        # An odd number would leave an element of a head without a partner to turn with.
        "head_dim": draw.choice((8, 12, 20)),
    }
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if key in keys:
            sizes[key] = draw.choice((11, 30) if num_ranks == 1 else (12, 20))
    if "kv_lora_rank" in keys:
        sizes |= {key: draw.choice(values) for key, values in _LATENT.items()}
        sizes["num_key_value_heads"] = heads
        del sizes["head_dim"]
    if "short_factor" in keys.get("rope_parameters", {}):
        # A factor for every pair of elements that turns: the size of a head is given.
        sizes |= {"head_dim": 8, "hidden_size": 8 * heads}
    return {**TINY_MODEL, **keys, **sizes, "model_type": model_type}
