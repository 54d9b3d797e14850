"""Files of torch.save read as values alone: equal to torch's own reading, and refused where they would do anything."""

import copy
import io
import os
import pickle
import zipfile

import pytest
import torch

from simpo_megatron.checkpoint.torch_files import read_torch_file

VALUES = {
    "numbers": [1, -2.5, True, None, 2**40, float("inf")],
    "names": ("a", {"b": ["c"]}, {3: "d"}),
    "tensors": {
        "bf16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "part": torch.arange(10)[3:7],
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "fp8": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
        "none": torch.empty(0, 4),
        "one": torch.tensor(7.0, dtype=torch.float64),
    },
}


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bytes(as_bytes(a)) == bytes(as_bytes(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def as_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def test_what_a_checkpoint_holds_is_read_as_torch_reads_it(tmp_path):
    (tmp_path / "file").write_bytes(saved(VALUES))
    for source in (tmp_path / "file", str(tmp_path / "file"), io.BytesIO(saved(VALUES))):
        assert same(read_torch_file(source, map_location="cpu"), torch.load(tmp_path / "file", weights_only=True))


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def with_pickle(content, size=4):
    """A file of torch.save whose pickle is `content`, beside one storage of `size` bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(size))
    return buffer.getvalue()


def tensor_pickle(kind=b"torch\nFloatStorage", numel=1, offset=0, size=(1,), stride=(1,)):
    storage = b"(Vstorage\nc" + kind + b"\nV0\nVcpu\nI" + str(numel).encode() + b"\ntQ"
    shape = b"".join(b"(" + b"".join(b"L%dL\n" % extent for extent in extents) + b"t" for extents in (size, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"I%d\n" % offset + shape + b"I00\n}tR."


def nested(depth):
    return b"]" * depth + b"a" * (depth - 1) + b"."


def doubled_tuples(depth):
    """A tuple of two references to a tuple of two, and so on: its hash takes 2**depth steps."""
    return b"()q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(depth)) + b"1h%c" % depth


DOUBLED = b"]q\x00" + b"".join(b"]q%c(h%ch%ce" % (n, n - 1, n - 1) for n in range(1, 31)) + b"."

BOMBS = {
    "call": pickle.dumps(Calls(os.mkdir, "made")),
    "eval": pickle.dumps(Calls(eval, "__import__('os').mkdir('made')")),
    "allowed by torch": b"ctorch.serialization\n_get_layout\n(Vtorch.strided\ntR.",
    "rebuild by another name": b"ctorch._utils\n_rebuild_parameter\n(I1\nI2\nI3\ntR.",
    "build on a class": b"ctorch\nFloatStorage\n}Vdtype\nI1\nsb.",
    "build on a function": b"ctorch._utils\n_rebuild_tensor_v2\n}Vcache\nI1\nsb.",
    "a class for a value": b"ctorch\nFloatStorage\n.",
    "no memo of that number": b"j\xff\xff\xff\xff.",
    "a large number in the memo": b"I1\nr\xff\xff\xff\xff0h\x00.",
    "a text of more bytes than there are": b"\x8d" + (1 << 40).to_bytes(8, "little") + b"a.",
    "a number of many digits": b"L" + b"9" * 5000 + b"L\n.",
    "deep": nested(100_000),
    "leads back to itself": b"]q\x00h\x00a.",
    "doubled thirty times": DOUBLED,
    "an extension": b"\x82\x01.",
    "a persistent value": b"I1\nQ.",
    "bytes": b"C\x01a.",
    "cut short": b"(",
    "storage beyond its bytes": tensor_pickle(size=(2,)),
    "storage far beyond its bytes": tensor_pickle(offset=1 << 40),
    "negative offset": tensor_pickle(offset=-1),
    "negative size": tensor_pickle(size=(-1,)),
    "a tensor of zero strides, larger than its bytes": tensor_pickle(size=(10**6, 10**6), stride=(0, 0)),
    "a key that is hashed without an end": b"}" + doubled_tuples(60) + b"I1\ns.",
    "keys that are hashed without an end": b"}(" + doubled_tuples(60) + b"I1\nu.",
    "a dict of keys that are hashed without an end": b"(" + doubled_tuples(60) + b"I1\nd.",
    "a table of such a key": b"ccollections\nOrderedDict\n(((" + doubled_tuples(60) + b"I1\ntttR.",
    "a set of such values": b"\x8f(" + doubled_tuples(60) + b"\x90.",
    "a frozen set of such values": b"(" + doubled_tuples(60) + b"\x91.",
    "an array of a terabyte": b"\x96" + (1 << 40).to_bytes(8, "little") + b"a.",
    "an array of sixty gigabytes": b"\x96" + (60 << 30).to_bytes(8, "little") + b"a.",
    "a buffer outside of it": b"\x97.",
    "a number of a million digits": b"\x8b" + (400_000).to_bytes(4, "little") + b"\x7f" * 400_000 + b".",
    "build on a table's class": b"ccollections\nOrderedDict\nN}Vx\nI1\ns\x86b.",
    "an object of a module's class": b"(ios\nmkdir\n.",
    "more dimensions than strides": tensor_pickle(size=(1, 1)),
    "a million marks": b"(" * 1_000_000,
    "a million lists": b"]" * 1_000_000 + b".",
    "a million tables": b"}" * 1_000_000 + b".",
    "no dtype": tensor_pickle(kind=b"torch\nStorage"),
    "a module for a storage": tensor_pickle(kind=b"os\nStorage"),
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_a_file_that_would_call_build_or_grow_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(vars(torch._utils._rebuild_tensor_v2)), dict(vars(torch.FloatStorage))
    with pytest.raises(pickle.UnpicklingError):
        read_torch_file(io.BytesIO(with_pickle(content)))
    assert (dict(vars(torch._utils._rebuild_tensor_v2)), dict(vars(torch.FloatStorage))) == before
    assert not os.listdir(tmp_path)


def test_a_tensor_of_the_bytes_beside_it_is_read():
    assert read_torch_file(io.BytesIO(with_pickle(tensor_pickle()))).tolist() == [0.0]


def test_entries_that_share_their_bytes_are_refused_and_tensors_that_do_are_read_once():
    tensor = tensor_pickle()[:-1]
    several = b"(" + 9 * tensor + b"l."
    tensors = read_torch_file(io.BytesIO(with_pickle(several)))
    assert len(tensors) == 9 and len({values.data_ptr() for values in tensors}) == 1
    buffer = io.BytesIO(with_pickle(several, size=10_000))
    with zipfile.ZipFile(buffer, "a") as archive:
        entry = copy.copy(archive.getinfo("archive/data/0"))
        entry.filename = "archive/data/1"
        archive.filelist.append(entry)
        archive.writestr("archive/version", b"3")
    with pytest.raises(pickle.UnpicklingError, match="more bytes than the file"):
        read_torch_file(buffer)


@pytest.mark.parametrize("end", [0, 1, 100, -1, -30])
def test_a_file_cut_anywhere_is_refused(end):
    with pytest.raises(pickle.UnpicklingError):
        read_torch_file(io.BytesIO(saved(VALUES)[:end]))


def test_compressed_entries_and_pickles_without_an_archive_are_refused():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"]" * 10_000_000)
    for content in (buffer.getvalue(), pickle.dumps({"a": 1}), b""):
        with pytest.raises(pickle.UnpicklingError):
            read_torch_file(io.BytesIO(content))
