"""Files written past the system's memory: their bytes, their hashes, and disks that refuse."""

import errno
import fcntl
import os

import pytest
import torch

from simpo_megatron.checkpoint import manifest
from simpo_megatron.convert import direct_io
from simpo_megatron.convert.direct_io import DirectFile

PARTS = {
    "nothing": [],
    "less than a block": [b"abc"],
    "a block": [bytes(range(256)) * 16],
    "a buffer": [bytes(range(256)) * 16 * 16],
    "odd parts over several buffers": [os.urandom(n) for n in (1, 4095, 70_001, 65_536, 200_003)],
}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(direct_io, "_BUFFER_BYTES", 1 << 16)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_bytes_and_hash_are_those_written(tmp_path, parts):
    with DirectFile(tmp_path / "file", hashed=True) as file:
        assert [file.write(part) for part in parts] == [len(part) for part in parts]
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    digest = manifest.digest_file(tmp_path / "file")
    assert (file.size, file.sha256) == (digest.size, digest.sha256)


def test_what_is_handed_in_may_change_afterwards(tmp_path):
    values = torch.arange(1 << 15)
    with DirectFile(tmp_path / "file") as file:
        file.write(values.numpy())
        before = values.clone()
        values.zero_()
    assert torch.equal(torch.frombuffer(bytearray((tmp_path / "file").read_bytes()), dtype=torch.int64), before)


@pytest.mark.parametrize("refuses", ["when asked", "when written"])
def test_a_file_system_without_direct_writes_gets_ordinary_ones(tmp_path, monkeypatch, refuses):
    """Stands for tmpfs before Linux 6.6 and for some file systems in user space."""
    real_fcntl, real_write, flags = fcntl.fcntl, os.write, []

    def set_flags(descriptor, command, argument):
        if refuses == "when asked":
            raise OSError(errno.EINVAL, "Invalid argument")
        flags.append(argument)
        return real_fcntl(descriptor, command, argument)

    def write(descriptor, data):
        if flags and flags[-1] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data)

    monkeypatch.setattr(fcntl, "fcntl", set_flags)
    monkeypatch.setattr(os, "write", write)
    data = os.urandom(200_001)
    with DirectFile(tmp_path / "file") as file:
        file.write(data)
    assert (tmp_path / "file").read_bytes() == data
    assert flags == ([] if refuses == "when asked" else [os.O_DIRECT, 0])


@pytest.mark.parametrize("num_bytes", [10, 1 << 20], ids=["at the end", "in the midst"])
def test_a_full_disk_is_told_whatever_the_caller_makes_of_it(num_bytes):
    with pytest.raises(OSError, match="No space left"), DirectFile("/dev/full") as file:
        try:
            file.write(bytes(num_bytes))
        except OSError:
            raise RuntimeError("of the library that writes") from None


def test_another_error_stays_itself(tmp_path):
    with pytest.raises(RuntimeError, match="of the caller"), DirectFile(tmp_path / "file") as file:
        file.write(bytes(100))
        raise RuntimeError("of the caller")
