"""The store: megatron reads the files, and nothing is built twice or half."""

import errno
import fcntl
import json
import os
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_stores import build, folders, write_pairs
from data_tokenizers import llama_like, qwen_like

from simpo_megatron import atomic
from simpo_megatron.data import PairOptions
from simpo_megatron.data.store import check_first_records, chunks, read_progress, store_writer
from simpo_megatron.data.store import pair_store as store_module
from simpo_megatron.errors import DataError


def test_megatron_reads_the_same_sequences_and_documents(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dataset = build(write_pairs(tmp_path / "pairs.jsonl", 41), tmp_path)
    theirs = indexed_dataset.IndexedDataset(str(folders(tmp_path)[0] / "pairs"))
    assert len(theirs) == 3 * len(dataset) == 123
    assert theirs.document_indices.tolist() == list(range(0, 124, 3))
    assert np.array_equal(theirs.sequence_lengths.reshape(-1, 3), dataset.lengths)
    for i in range(len(dataset)):
        pair = dataset[i]
        for j, part in enumerate((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)):
            assert theirs[3 * i + j].dtype == part.dtype == np.int32
            assert np.array_equal(theirs[3 * i + j], part)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_megatron_writes_the_same_index_and_tokens(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    dataset = build(write_pairs(tmp_path / "pairs.jsonl", 5), tmp_path)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for i in range(len(dataset)):
        pair = dataset[i]
        parts = [torch.from_numpy(part.copy()) for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
        builder.add_document(torch.cat(parts), [len(part) for part in parts])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (folders(tmp_path)[0] / f"pairs.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


FIRST_RECORDS = {
    "empty.jsonl": b"",
    "empty.json": b"[]",
    "text.jsonl": b"Dear diary,\n",
    "no_object.jsonl": b'["a"]\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "columns.jsonl": b'{"question": "a", "good": "b", "bad": "c"}\n',
    "columns.csv": b"question,good,bad\na,b,c\n",
    "ragged.csv": b"prompt,chosen,rejected\na,b\n",
    "a_number.jsonl": b'{"prompt": "a", "chosen": 3, "rejected": "c"}\n',
}


@pytest.mark.parametrize("name", FIRST_RECORDS)
def test_a_first_record_that_stops_a_build_is_told_before_it_in_the_same_words(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FIRST_RECORDS[name])
    with pytest.raises(DataError) as built:
        build(path, tmp_path)
    with pytest.raises(DataError) as told:
        check_first_records(str(path), PairOptions())
    assert str(told.value) == str(built.value)


def test_a_first_record_that_a_build_passes_over_is_no_mistake(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    for first, options in (
        (b"\n", PairOptions(bad_record="skip")),
        (b"{}\n", PairOptions(bad_record="skip", max_bad_fraction=0.5)),
        (good.replace(b'"c"', b'"b"'), PairOptions()),
    ):
        path.write_bytes(first + good)
        check_first_records(str(path), options)
        assert len(build(path, tmp_path, options=options)) == 1


def test_a_store_is_built_once_and_again_when_anything_changed(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 10)
    first = build(path, tmp_path)
    [folder] = folders(tmp_path)
    built_at = (folder / "store.json").stat().st_mtime_ns
    assert build(path, tmp_path).fingerprint == first.fingerprint
    llama_like()(["a", "b c d e"], padding=True, truncation=True, max_length=3)  # leaves its marks on the backend
    assert build(path, tmp_path, build=False).fingerprint == first.fingerprint
    assert (folder / "store.json").stat().st_mtime_ns == built_at
    fingerprints = {first.fingerprint}
    fingerprints.add(build(path, tmp_path, tokenizer=qwen_like()).fingerprint)
    assert len(folders(tmp_path)) == 2
    fingerprints.add(build(path, tmp_path, options=PairOptions(max_length=20, max_prompt_length=15)).fingerprint)
    assert len(folders(tmp_path)) == 3
    fingerprints.add(build(path, tmp_path, options=PairOptions(chat_template="none")).fingerprint)
    with open(path, "a") as file:
        file.write(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(DataError, match="found no tokenized store"):
        build(path, tmp_path, build=False)
    fingerprints.add(build(path, tmp_path).fingerprint)
    assert len(folders(tmp_path)) == len(fingerprints) == 5


def test_the_tokenizer_is_hashed_once_for_all_shards(tmp_path, monkeypatch):
    files = [str(write_pairs(tmp_path / f"{name}.jsonl", 10)) for name in "abc"]
    identity, asked = store_module.tokenizer_identity, []
    monkeypatch.setattr(store_module, "tokenizer_identity", lambda *of: asked.append(of) or identity(*of))
    dataset = build(files, tmp_path)
    assert len(asked) == 1 and len(dataset.stores) == 3
    monkeypatch.undo()
    assert build(files[0], tmp_path, build=False).stores[0].fingerprint == dataset.stores[0].fingerprint


def test_the_fingerprint_depends_on_the_tokens_and_not_on_where_they_came_from(tmp_path):
    a = build(write_pairs(tmp_path / "a.jsonl", 10), tmp_path)
    b = build(write_pairs(tmp_path / "b.jsonl", 10), tmp_path / "elsewhere")
    assert a.fingerprint == b.fingerprint
    assert a.select(np.arange(9)).fingerprint != a.fingerprint
    assert a.select(np.arange(10)[::-1]).fingerprint != a.fingerprint


@pytest.mark.processes
def test_worker_processes_build_the_same_store(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 1000)
    with open(path, "a") as file:
        file.write("{\n")
    options = PairOptions(bad_record="skip")
    alone = build(path, tmp_path, options=options, num_workers=1)
    many = build(path, tmp_path / "many", options=options, num_workers=2)
    assert many.fingerprint == alone.fingerprint
    assert vars(many.report) == vars(alone.report)
    assert many.report.first["bad_json"].startswith(f"{path}:1001: ")


def test_a_build_that_fails_or_is_killed_leaves_no_store(tmp_path, monkeypatch):
    path = write_pairs(tmp_path / "pairs.jsonl", 10)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_index_bytes", lambda lengths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(path, tmp_path)
    assert folders(tmp_path) == []
    half = tmp_path / "cache" / f"pairs-0.tmp-{'0' * 32}"
    half.mkdir()
    (half / "pairs.bin").write_bytes(b"1234")
    assert len(build(path, tmp_path)) == 10


def stop_behind(num_chunks, monkeypatch):
    """Lets a build be stopped in front of a chunk; returns the first lines of the chunks that are encoded."""
    encode, lines = chunks.encode_chunk, []

    def stopping(raw, *arguments):
        if len(lines) == num_chunks:
            raise KeyboardInterrupt
        lines.append(raw[0].line)
        return encode(raw, *arguments)

    monkeypatch.setattr(chunks, "encode_chunk", stopping)
    return lines


def append(path, data):
    path.write_bytes(path.read_bytes() + data)


def damage_tokens(building):
    tokens = bytearray((building / "pairs.bin").read_bytes())
    with np.load(building / "part-00000.npz") as first:
        tokens[4 * first["lengths"].sum()] ^= 1  # the first one of the second part
    (building / "pairs.bin").write_bytes(tokens)


@pytest.mark.parametrize(
    ("damage", "goes_on_at"),
    [
        (lambda building: None, 257),
        (lambda building: append(building / "pairs.bin", b"the beginning of a chunk"), 257),
        (lambda building: (building / "part-00001.npz").write_bytes(b"PK"), 129),
        (damage_tokens, 129),
        (lambda building: (building / "part-00000.npz").unlink(), 1),
        (lambda building: (building / "pairs.bin").unlink(), 1),
    ],
)
def test_a_build_that_was_stopped_goes_on_behind_its_last_sound_part(damage, goes_on_at, tmp_path, monkeypatch):
    path = write_pairs(tmp_path / "pairs.jsonl", 400)
    with path.open("a") as file:
        file.write("{\n")
    options = PairOptions(bad_record="skip")
    whole = build(path, tmp_path / "whole", options=options, num_workers=1)
    monkeypatch.setattr(store_writer, "PART_CHUNKS", 2)
    with monkeypatch.context() as patch:
        stop_behind(5, patch)
        with pytest.raises(KeyboardInterrupt):
            build(path, tmp_path, options=options, num_workers=1)
    [building] = folders(tmp_path)
    assert sorted(file.name for file in building.iterdir()) == [
        ".lock",
        "pairs.bin",
        "part-00000.npz",
        "part-00001.npz",
    ]
    damage(building)
    lines = stop_behind(None, monkeypatch)
    again = build(path, tmp_path, options=options, num_workers=1)
    assert lines == list(range(goes_on_at, 402, 64))
    assert again.fingerprint == whole.fingerprint and vars(again.report) == vars(whole.report)
    [store], [expected] = folders(tmp_path), folders(tmp_path / "whole")
    for name in ("pairs.bin", "pairs.idx", "pairs.npy"):
        assert (store / name).read_bytes() == (expected / name).read_bytes()


def test_a_build_that_another_process_works_on_is_left_alone(tmp_path, monkeypatch):
    path = write_pairs(tmp_path / "pairs.jsonl", 300)
    monkeypatch.setattr(store_writer, "PART_CHUNKS", 2)
    with monkeypatch.context() as patch:
        stop_behind(3, patch)
        with pytest.raises(KeyboardInterrupt):
            build(path, tmp_path, num_workers=1)
    [building] = folders(tmp_path)
    held = atomic.lock(building / ".lock")
    lines = stop_behind(None, monkeypatch)
    assert len(build(path, tmp_path, num_workers=1)) == 300 and lines[0] == 1
    held.release()
    assert building.exists() and len(folders(tmp_path)) == 2


def test_a_stopped_build_of_a_bad_record_leaves_nothing(tmp_path, monkeypatch):
    path = write_pairs(tmp_path / "pairs.jsonl", 300)
    with path.open("a") as file:
        file.write("{\n")
    monkeypatch.setattr(store_writer, "PART_CHUNKS", 2)
    with pytest.raises(DataError, match="pairs.jsonl:301: bad_json"):
        build(path, tmp_path, num_workers=1)
    assert folders(tmp_path) == []


def test_progress_is_a_line_in_the_log_where_no_terminal_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(read_progress, "_SECONDS_BETWEEN_LINES", 0.0)
    path = write_pairs(tmp_path / "pairs.jsonl", 128)
    with caplog.at_level("INFO"):
        build(path, tmp_path, num_workers=1)
    assert f"{path}: 128 records (100%) are tokenised" in caplog.messages


def test_what_a_killed_build_has_left_is_removed_by_a_later_one_and_a_living_build_stays(tmp_path):
    source = write_pairs(tmp_path / "pairs.jsonl", 3)
    build(source, tmp_path)
    (store,) = folders(tmp_path)
    shutil.rmtree(store)
    killed, just_begun, long_begun, living = (store.with_name(f"{store.name}.tmp-{number:032x}") for number in range(4))
    for draft in (killed, just_begun, long_begun, living):
        draft.mkdir()
        (draft / "pairs.bin").write_bytes(b"1234")
    (killed / ".lock").touch()
    os.utime(long_begun, (time.time() - 3600,) * 2)
    held = atomic.lock(living / ".lock")
    build(source, tmp_path)
    held.release()
    assert folders(tmp_path) == sorted((store, just_begun, living))


@pytest.fixture
def delayed_files(monkeypatch):
    """Other threads come in between any two steps, above all between calls that look up, make and rename files."""

    def delayed(call):
        def called(*arguments, **named):
            time.sleep(random.choice([0, 0, random.uniform(0, 1e-3)]))
            return call(*arguments, **named)

        return called

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for name in ("open", "stat", "rename", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, delayed(getattr(os, name)))
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_several_builders_at_once_end_with_one_good_store(is_damaged, tmp_path, delayed_files):
    path = write_pairs(tmp_path / "pairs.jsonl", 300)
    if is_damaged:
        build(path, tmp_path)
        (folders(tmp_path)[0] / "pairs.bin").write_bytes(b"1234")
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(lambda _: build(path, tmp_path, num_workers=1), range(4)))
    assert len({dataset.fingerprint for dataset in datasets}) == 1
    assert len(folders(tmp_path)) == 1


def test_drafts_of_one_folder_never_take_each_other_for_abandoned(tmp_path, delayed_files):
    def make(path):
        with atomic.new_folder(path, first_wins=True) as draft:
            (draft / "file").write_text("whole")

    with ThreadPoolExecutor(4) as pool:
        for number in range(40):
            list(pool.map(make, [tmp_path / f"{number}"] * 4))
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, range(40)))
    assert {path.name for path in tmp_path.glob("*/*")} == {"file"}


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:flock not supported on this filesystem")
def test_where_there_is_no_flock_a_draft_of_a_dead_process_goes_and_that_of_a_living_one_stays(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "folder"
    with pytest.raises(BlockingIOError), atomic.new_folder(path), atomic.new_folder(path):
        pass
    assert list(tmp_path.iterdir()) == []
    process = os.fork()
    if process == 0:
        making = atomic.new_folder(path)
        making.__enter__()
        os._exit(0)
    os.waitpid(process, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic.new_folder(path):
        pass
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_was_made_anew_is_not_removed_for_the_one_before(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    before = folder.stat().st_ino
    folder.rename(tmp_path / "kept, so that its inode is not used again")
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        atomic.remove_folder(folder, inode=before)
    atomic.remove_folder(folder, inode=folder.stat().st_ino)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write_pairs(tmp_path / "pairs.jsonl", 10)
    write_store = store_module._write_store

    def write_and_touch(*arguments):
        sidecar = write_store(*arguments)
        write_pairs(path, 11)
        return sidecar

    monkeypatch.setattr(store_module, "_write_store", write_and_touch)
    with pytest.raises(DataError, match="found a change while it was read"):
        build(path, tmp_path)


def test_a_path_with_a_colon_and_a_blank_names_its_records(tmp_path):
    path = tmp_path / "part 1: pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n{")
    with pytest.raises(DataError, match=f"{path}:2: truncated_json"):
        build(path, tmp_path)
    dataset = build(path, tmp_path, options=PairOptions(bad_record="skip", max_bad_fraction=1.0))
    assert dataset.report.place("truncated_json") == f"{path}:2"
