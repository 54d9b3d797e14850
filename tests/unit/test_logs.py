"""Messages name their rank and go where they are asked to; importing the package changes nothing of others."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from extras import installed_alone

from simpo_megatron.errors import ConfigError
from simpo_megatron.logs import LOGGER, _Unbroken, logged

PACKAGE = Path(__file__).parents[2] / "simpo_megatron"


def test_a_message_names_its_rank_and_level_and_leaves_no_handler_behind(capsys):
    with logged("info", rank=3):
        LOGGER.info("reference: %d of %d pairs", 8, 60)
        LOGGER.debug("not asked for")
    assert capsys.readouterr().err == "INFO simpo_megatron rank 3: reference: 8 of 60 pairs\n"
    assert LOGGER.handlers == [] and LOGGER.propagate and LOGGER.level == logging.NOTSET


def test_a_level_above_keeps_quiet(capsys):
    with logged("error"):
        LOGGER.warning("no model card")
    assert capsys.readouterr().err == ""


def test_each_rank_writes_its_own_file(tmp_path, capsys):
    for rank in (0, 3):
        with logged(rank=rank, folder=tmp_path / "logs"):
            LOGGER.warning("here")
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank0000.log", "rank0003.log"]
    assert (tmp_path / "logs" / "rank0003.log").read_text().endswith(" WARNING rank 3: here\n")
    assert capsys.readouterr().err.count("WARNING simpo_megatron rank") == 2


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with (
        pytest.raises(ConfigError, match="save: found .*rank0000.log, expected a file that can be written"),
        logged(folder=tmp_path / "logs"),
    ):
        pass


@pytest.mark.processes
def test_importing_the_package_needs_no_extra_and_changes_neither_warnings_nor_loggers(tmp_path):
    script = f"""
import importlib, logging, pkgutil, sys, warnings
import simpo_megatron
changes = []
def watched(owner, name):
    original = getattr(owner, name)
    def call(*args, **kwargs):
        if sys._getframe(1).f_code.co_filename.startswith({str(PACKAGE)!r}):
            changes.append((name, sys._getframe(1).f_code.co_filename))
        return original(*args, **kwargs)
    setattr(owner, name, call)
for name in ("filterwarnings", "simplefilter"):
    watched(warnings, name)
for name in ("addFilter", "addHandler", "setLevel"):
    watched(logging.Logger, name)
names = [module.name for module in pkgutil.walk_packages(simpo_megatron.__path__, "simpo_megatron.")]
for name in names:
    if not name.endswith("__main__"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name == "triton", error
print(len(names) > 50, changes, logging.getLogger("simpo_megatron").handlers)
"""
    python = installed_alone(tmp_path / "packages")
    done = subprocess.run([*python, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["True [] []"], done.stderr


def test_a_reader_that_goes_away_and_a_full_disk_stop_nobody_who_prints():
    read, write = os.pipe()
    os.close(read)
    gone = _Unbroken(os.fdopen(write, "w", buffering=1))
    print("a line", file=gone, flush=True)
    print("and more", file=gone, flush=True)
    gone.close()
    full = io.TextIOWrapper(io.BufferedWriter(FullDisk()))
    print("a line", file=_Unbroken(full), flush=True)
    assert _Unbroken(full).encoding == full.encoding
    FullDisk.has_room = True
    print("another", file=_Unbroken(full), flush=True)
    assert FullDisk.written == b"a line\nanother\n"


@pytest.mark.processes
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_output_that_was_closed_from_the_start_stops_nobody(closed, tmp_path):
    script = (
        "import sys; from simpo_megatron.logs import outlive_readers; outlive_readers(); print('out'); "
        "print('err', file=sys.stderr); open('done', 'w').write('in a file')"
    )
    command = ["bash", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, script]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)}, timeout=60)
    assert done.returncode == 0 and (tmp_path / "done").read_text() == "in a file"


class FullDisk(io.RawIOBase):
    has_room, written = False, b""

    def writable(self):
        return True

    def write(self, content):
        if not self.has_room:
            raise OSError(errno.ENOSPC, "No space left on device")
        FullDisk.written += bytes(content)
        return len(content)
