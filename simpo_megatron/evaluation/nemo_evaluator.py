"""The same task as a configuration of NeMo Evaluator's launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from simpo_megatron.errors import ConfigError, require

# Tasks of nemo-evaluator-launcher 0.2.6; it has none for AlpacaEval.
_TASKS = {"mt-bench": "mtbench", "arena-hard": "ns_arena_hard_v2"}


def launcher_config(benchmark: str, model: str, name: str, url: str | None, out: Path) -> str:
    """YAML for `nemo-evaluator-launcher run --config FILE`: an existing server, or vLLM started on a folder.

    The launcher's mtbench answers at one temperature, not at MT-Bench's by category. Its Arena-Hard is
    v2.0. Neither score can be compared with that of `simpo evaluate`.

    Raises: ConfigError for a benchmark that the launcher does not have.

    Source: nemo-evaluator-launcher 0.2.6, `resources/all_tasks_irs.yaml` and `configs/`.
    """
    require(benchmark in _TASKS, "emit", "nemo-evaluator", f"one of {', '.join(_TASKS)}, which it has tasks for")
    config: dict[str, Any] = {
        "defaults": [{"execution": "local"}, {"deployment": "none" if url else "vllm"}, "_self_"],
        "execution": {"output_dir": str(out)},
    }
    if url:
        config["target"] = {
            "api_endpoint": {
                "model_id": model,
                "url": f"{url.rstrip('/')}/chat/completions",
                "api_key_name": "OPENAI_API_KEY",
            }
        }
    else:
        if not Path(model).is_dir():
            raise ConfigError(f"model: found {model!r}, expected a Hugging Face folder, or a name with --url")
        config["deployment"] = {
            "checkpoint_path": str(Path(model).absolute()),
            "served_model_name": name,
            "tensor_parallel_size": 1,
        }
    config["evaluation"] = {"tasks": [{"name": _TASKS[benchmark]}]}
    return yaml.safe_dump(config, sort_keys=False)
