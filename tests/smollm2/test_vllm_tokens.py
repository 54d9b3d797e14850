"""vLLM and transformers give a real model's greedy answers token for token, by the command that a user types.

Needs vLLM in an environment of its own: `make test-vllm`, or SIMPO_VLLM_PYTHON names its Python. In float32 no two
tokens of these answers are so close that the order of additions decides.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from simpo_megatron.commands import generate
from simpo_megatron.generation.lines import read_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SIMPO_VLLM_PYTHON" not in os.environ, reason="SIMPO_VLLM_PYTHON names no Python with vLLM"),
]
PROMPTS = [
    {"id": "sky", "prompt": "Why is the sky blue? Answer in two sentences."},
    {"id": "bread", "prompt": "Give me three tips for baking sourdough bread."},
    {"id": "poem", "turns": ["Write a four-line poem about the sea.", "Now make it about a mountain instead."]},
    {
        "id": "mail",
        "messages": [
            {"role": "system", "content": "You answer briefly."},
            {"role": "user", "content": "Draft an email declining a meeting on Friday."},
        ],
    },
]


def test_greedy_answers_agree_token_for_token(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    found = {}
    for engine, options in {"transformers": [], "vllm": ["--gpu-memory-utilization", "0.3"]}.items():
        asked = ["--model", str(smollm2), "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "48"]
        out = ["--engine", engine, "--dtype", "float32", "--out", str(tmp_path / engine)]
        assert generate.main([*asked, *out, *options]) == 0
        found[engine] = {row["id"]: row for row in read_lines(tmp_path / engine / "answers.jsonl")}
    assert found["vllm"] == found["transformers"]
    assert len({row["answers"][0] for row in found["vllm"].values()}) == len(PROMPTS)
    assert sum(row["num_tokens"] for row in found["vllm"].values()) > 4 * 40
