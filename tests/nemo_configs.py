"""The NeMo files of the tests: one by its name as a configuration, or what is refused of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpo_megatron.nemo import load_nemo_config
from simpo_megatron.nemo.rules import Obstacle

CONFIGS = Path(__file__).parent / "unit" / "nemo_configs"
MEGATRON = "policy.megatron_cfg."


def load(name, *overrides):
    return load_nemo_config(CONFIGS / name, overrides)


def obstacles(name, *overrides):
    """(messages, remedies) of a refusal."""
    with pytest.raises(Obstacle) as refused:
        load(name, *overrides)
    details, remedies = list(refused.value.details), list(refused.value.remedies)
    if not details:
        assert str(refused.value).endswith(f"; add {' '.join(remedies)}")
        return [str(refused.value)], remedies
    start = details.index("to go on, add these behind the file's name:")
    assert details[start + 1 :] == [f"  {line}" for line in remedies]
    return [str(refused.value), *details[:start]], remedies
