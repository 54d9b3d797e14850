"""Configurations of a test's own YAML file, and what a user reads of one that is refused."""

import pytest

from simpo_megatron.config import load_config
from simpo_megatron.errors import ConfigError


def load_yaml(tmp_path, text, *arguments):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(["--config", str(path), *arguments])


def refusal(tmp_path, text, *arguments):
    """The one line a user sees, with the folder of the test cut away."""
    with pytest.raises(ConfigError) as refused:
        load_yaml(tmp_path, text, *arguments)
    message = str(refused.value)
    assert "\n" not in message
    return message.replace(f"{tmp_path}/", "")
