"""The cache lies where somebody named it, or in the user's own cache folder, and says so when it cannot be written."""

import errno
import os
from pathlib import Path

import pytest

from simpo_megatron.config import config_from
from simpo_megatron.errors import DataError
from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from simpo_megatron.training.start import inputs  # noqa: E402


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({"data_cache": "here"}, {"SIMPO_MEGATRON_CACHE": "/site"}, "here"),
        ({"save": "runs/a"}, {"SIMPO_MEGATRON_CACHE": "/site", "XDG_CACHE_HOME": "/xdg"}, "/site"),
        ({"save": "runs/a"}, {"XDG_CACHE_HOME": "/xdg"}, "/xdg/simpo_megatron"),
        ({}, {"HOME": "/home/me"}, "/home/me/.cache/simpo_megatron"),
    ],
)
def test_the_cache_is_never_in_a_folder_that_nobody_named(options, environment, expected, monkeypatch):
    for name in ("SIMPO_MEGATRON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert inputs.cache_folder(config_from(model="m", data=("a",), **options)) == Path(expected)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_an_embedded_default_that_cannot_be_written_is_one_line(code, tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(inputs, "prepare_demo", fail)
    with pytest.raises(DataError, match=f"data_cache: found {tmp_path}.*{os.strerror(code)}.*--data-cache$"):
        inputs.locate_sources(config_from(preset="demo", data_cache=str(tmp_path)))
