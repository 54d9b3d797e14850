"""Hugging Face's side of a model: its folder, its config.json, and the hub that it comes from.

Nothing here needs torch or Megatron when it is imported.
"""

from simpo_megatron.mcore.hf.hf_config import (
    FULL,
    MAX_COUNT,
    MAX_COUNTS,
    WINDOWED,
    check_counts,
    configuration,
    kind_of_rope,
    rope_parameters,
    windowed_rope_parameters,
)
from simpo_megatron.mcore.hf.hf_files import (
    INDEX_FILE,
    MAX_JSON_BYTES,
    SINGLE_FILE,
    load_transformers_model,
    own_file,
    read_hf_json,
    without_code,
)
from simpo_megatron.mcore.hf.hub import (
    FILES_BESIDE_WEIGHTS,
    file_of_model,
    hub_name,
    is_hub_name,
    model_folder,
    push_folder,
    revision_of,
)

__all__ = [
    "FILES_BESIDE_WEIGHTS",
    "FULL",
    "INDEX_FILE",
    "MAX_COUNT",
    "MAX_COUNTS",
    "MAX_JSON_BYTES",
    "SINGLE_FILE",
    "WINDOWED",
    "check_counts",
    "configuration",
    "file_of_model",
    "hub_name",
    "is_hub_name",
    "kind_of_rope",
    "load_transformers_model",
    "model_folder",
    "own_file",
    "push_folder",
    "read_hf_json",
    "revision_of",
    "rope_parameters",
    "windowed_rope_parameters",
    "without_code",
]
