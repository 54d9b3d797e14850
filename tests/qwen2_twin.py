"""A Qwen2 of random numbers as a Hugging Face folder, and what each tensor-parallel rank must hold of it.

The obvious way: whole parameters are assembled by loops and then cut; a module with megatron's names stands in for a
chunk of the model.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from simpo_megatron.mcore.families import ModelDescription, describe_hf_model, padded_vocab_size

VOCAB, HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, LAYERS = 131, 24, 20, 12, 4, 6, 2
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def random_weights() -> dict[str, Tensor]:
    """A Qwen2 of random numbers, under transformers' names."""
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", HEADS * HEAD_DIM), ("k", GROUPS * HEAD_DIM), ("v", GROUPS * HEAD_DIM)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (FFN, HIDDEN)
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, FFN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (HIDDEN,)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def write_folder(folder: Path, weights: dict[str, Tensor], **changes) -> ModelDescription:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(weights, folder / "model.safetensors")
    return describe_hf_model(folder)


def twin_parameters(weights: dict[str, Tensor], tp_rank: int, tp_size: int, *, te: bool) -> dict[str, Tensor]:
    """Every parameter of a rank that holds all layers, assembled whole and then cut."""

    def rows(whole: Tensor) -> Tensor:
        return whole.chunk(tp_size)[tp_rank]

    def padded(table: Tensor) -> Tensor:
        whole = torch.zeros(padded_vocab_size(VOCAB, tp_size), HIDDEN)
        whole[:VOCAB] = table
        return whole

    def interleaved(prefix: str, kind: str) -> Tensor:
        q, k, v = (weights[f"{prefix}self_attn.{name}_proj.{kind}"] for name in "qkv")
        parts = []
        for group in range(GROUPS):
            for head in range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS):
                parts.append(q[head * HEAD_DIM : (head + 1) * HEAD_DIM])
            parts.append(k[group * HEAD_DIM : (group + 1) * HEAD_DIM])
            parts.append(v[group * HEAD_DIM : (group + 1) * HEAD_DIM])
        return torch.cat(parts)

    found = {
        "embedding.word_embeddings.weight": rows(padded(weights["model.embed_tokens.weight"])),
        "output_layer.weight": rows(padded(weights["lm_head.weight"])),
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
    }
    for layer in range(LAYERS):
        prefix, to = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        norm1, norm2 = (
            ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
            if te
            else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        )
        found[to + norm1] = weights[f"{prefix}input_layernorm.weight"]
        found[to + norm2] = weights[f"{prefix}post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            found[f"{to}self_attention.linear_qkv.{kind}"] = rows(interleaved(prefix, kind))
        gate, up = (rows(weights[f"{prefix}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        found[f"{to}mlp.linear_fc1.weight"] = torch.cat((gate, up))
        for name, source in (
            ("self_attention.linear_proj", "self_attn.o_proj"),
            ("mlp.linear_fc2", "mlp.down_proj"),
        ):
            found[f"{to}{name}.weight"] = weights[f"{prefix}{source}.weight"].chunk(tp_size, dim=1)[tp_rank]
    return found


def stand_in(parameters: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module with these parameters, filled with NaN, and megatron's layer numbers."""
    chunk = nn.Module()
    for name, value in parameters.items():
        *path, leaf = name.split(".")
        module = chunk
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.ModuleList() if part == "layers" else nn.Module())
            module = getattr(module, part) if not isinstance(module, nn.ModuleList) else module[int(part)]
        module.register_parameter(leaf, nn.Parameter(torch.full_like(value, float("nan"), dtype=dtype)))
    for index, layer in enumerate(chunk.decoder.layers):
        layer.layer_number = index + 1
    chunk.pre_process = True
    return chunk
